//! Where a capture comes from: a file or standard input, plain or compressed.

use std::error::Error;
use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, IsTerminal as _, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use indicatif::ProgressBar;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// RFC 1952 §2.3.1.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// RFC 8878 §3.1.1.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// What a decompressor is fed with at a time.
const COMPRESSED_LEN: usize = 256 * 1024;

/// What the command line names: a file, or standard input by `-`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Stdin,
    File(PathBuf),
}

impl From<&Path> for Source {
    fn from(path: &Path) -> Self {
        if path == Path::new("-") { Self::Stdin } else { Self::File(path.to_owned()) }
    }
}

impl Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("-"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// An open source.
pub(super) struct Input {
    /// The capture, decompressed.
    pub(super) stream: Box<dyn Read>,
    /// Whether it can be read again from the start.
    pub(super) is_repeatable: bool,
}

impl Source {
    /// Opens it. What is read from a file moves `bar` on.
    pub(super) fn open(&self, bar: &ProgressBar) -> io::Result<Input> {
        let (raw, is_repeatable): (Box<dyn Read>, bool) = match self {
            Self::Stdin if io::stdin().is_terminal() => {
                return Err(io::Error::other(
                    "standard input is a terminal, pipe a capture into it",
                ));
            }
            Self::Stdin => (Box::new(io::stdin()), false),
            Self::File(path) => {
                let file = File::open(path)?;
                let metadata = file.metadata()?;
                if metadata.is_dir() {
                    return Err(io::ErrorKind::IsADirectory.into());
                }
                bar.set_length(metadata.len());
                bar.set_position(0);
                let is_file = metadata.is_file();
                (if is_file { Box::new(bar.wrap_read(file)) } else { Box::new(file) }, is_file)
            }
        };
        Ok(Input { stream: decompressed(raw)?, is_repeatable })
    }
}

/// Decompresses what starts like something compressed.
pub(super) fn decompressed(mut raw: Box<dyn Read>) -> io::Result<Box<dyn Read>> {
    let mut magic = Vec::new();
    raw.by_ref().take(ZSTD_MAGIC.len() as u64).read_to_end(&mut magic)?;
    let (is_gzip, is_zstd) = (magic.starts_with(&GZIP_MAGIC), magic == ZSTD_MAGIC);
    let whole = Cursor::new(magic).chain(raw);
    let buffered = |whole| BufReader::with_capacity(COMPRESSED_LEN, whole);
    Ok(if is_gzip {
        Box::new(MultiGzDecoder::new(buffered(whole)))
    } else if is_zstd {
        Box::new(Zstd::new(buffered(whole)))
    } else {
        Box::new(whole)
    })
}

/// Frame after frame of a zstd file: writers that use several threads make many.
struct Zstd<R> {
    compressed: R,
    decoder: FrameDecoder,
    is_within_frame: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(compressed: R) -> Self {
        Self { compressed, decoder: FrameDecoder::new(), is_within_frame: false }
    }

    /// Starts with the next frame that holds data; false where there is none.
    fn start_frame(&mut self) -> io::Result<bool> {
        while !self.compressed.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.compressed) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.compressed).take(length), &mut io::sink())? < length
                    {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io_error(error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.is_within_frame && !self.start_frame()? {
                return Ok(0);
            }
            self.is_within_frame = true;
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let some = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.compressed, some).map_err(io_error)?;
            }
            let len = self.decoder.read(buffer)?;
            if len > 0 || buffer.is_empty() {
                return Ok(len);
            }
            let promised = self.decoder.get_checksum_from_data();
            if promised.is_some() && promised != self.decoder.get_calculated_checksum() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "zstd checksum is wrong"));
            }
            self.is_within_frame = false;
        }
    }
}

/// Passes an I/O error on that is the cause of a decoder's: the end of the file says that it was cut
/// short, not that it is damaged.
fn io_error(error: FrameDecoderError) -> io::Error {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return io::Error::new(error.kind(), error.to_string());
        }
        cause = error.source();
    }
    io::Error::new(io::ErrorKind::InvalidData, error)
}
