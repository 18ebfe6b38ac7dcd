//! What fuzzing starts from: the packets of the tests, written anew each time so that they stay true.
//! Texts are kept in `fuzz/seeds`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use vxcsum_tests::capture::Recording;
use vxcsum_tests::cases::{self, Case};
use vxcsum_tests::check::{compress, editcap};
use vxcsum_tests::folder::Folder;
use vxcsum_tests::records;
use vxcsum_tests::scene::Scene;

/// Packets of one capture, so few that it is changed as a whole.
const CAPTURE_PACKETS: usize = 4;
/// Captures; the formats matter more than what is in them.
const CAPTURES: usize = 24;

/// Writes a folder for each target that is made of packets.
pub(super) fn write(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let cases = cases::all()?;
    save(folder, "verdict", scenes(&cases))?;
    save(folder, "event", events(&cases))?;
    save(folder, "capture", captures(&cases)?)?;
    save(folder, "dns", queries())
}

fn save(folder: &Path, target: &str, seeds: Vec<Vec<u8>>) -> Result<()> {
    let folder = folder.join(target);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for (number, seed) in seeds.into_iter().enumerate() {
        let file = folder.join(format!("{number:04}"));
        fs::write(&file, seed).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

fn scenes(cases: &[Case]) -> Vec<Vec<u8>> {
    let scene = |case: &Case, offload| Scene { case: case.clone(), offload, missing: 0 }.to_bytes();
    cases.iter().flat_map(|case| case.offloads.iter().map(|&it| scene(case, it))).collect()
}

/// Two times a broken packet, then the same whole; and dropped packets.
fn events(cases: &[Case]) -> Vec<Vec<u8>> {
    let told = |record: &[u8], program| {
        [&(record.len() as u16).to_le_bytes(), &[program][..], record].concat()
    };
    let sent = cases.iter().filter_map(|case| {
        let broken = told(&records::event(case)?, 0);
        Some([&broken[..], &broken, &told(&records::followed(case), 0)].concat())
    });
    let dropped = cases.iter().map(|case| told(&records::dropped(case), 1));
    sent.chain(dropped).collect()
}

/// In each format, after the byte that says in what pieces they come.
fn captures(cases: &[Case]) -> Result<Vec<Vec<u8>>> {
    let folder = Folder::new()?;
    let converted = folder.path().join("capture");
    let mut captures = Vec::new();
    for some in cases.chunks(CAPTURE_PACKETS).step_by(cases.len() / CAPTURE_PACKETS / CAPTURES) {
        let frames = some.iter().map(|case| case.frame.bytes.clone()).collect();
        let plain = Recording { frames }.file()?;
        captures.push(fs::read(plain.path())?);
        for format in ["pcapng", "nsecpcap", "modpcap"] {
            editcap(&["-F", format], plain.path(), &converted)?;
            captures.push(fs::read(&converted)?);
        }
        for tool in ["gzip", "zstd"] {
            compress(tool, &[], plain.path(), &converted)?;
            captures.push(fs::read(&converted)?);
        }
    }
    Ok((0..).zip(captures).map(|(piece, capture)| [&[piece], &capture[..]].concat()).collect())
}

fn queries() -> Vec<Vec<u8>> {
    let query = |labels: &[&str], kind: u8| {
        let mut query = vec![0x1d, 0x2b, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in labels {
            query.push(label.len() as u8);
            query.extend(label.bytes());
        }
        query.extend([0, 0, kind, 0, 1]);
        query
    };
    vec![query(&["kube-dns", "kube-system", "svc", "cluster", "local"], 1), query(&[], 2)]
}
