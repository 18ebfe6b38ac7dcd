//! For fuzz targets: one client of the daemon.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// Serves a client that says this, and then nothing more; returns what it was answered. The daemon
/// knows nothing, and does as it is told.
pub fn answer(said: &[u8], is_root: bool) -> io::Result<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut client, stream) = UnixStream::pair()?;
        let (requests, mut asked) = mpsc::channel(1);
        let lines = Framed::new(stream, LinesCodec::new_with_max_length(MAX_LINE_LEN));
        let served = tokio::spawn(Client { is_root, lines, requests }.serve(Channels::new(1)));
        tokio::spawn(async move {
            while let Some(request) = asked.recv().await {
                // A client that is gone needs no answer.
                let _: Result<(), ()> = match request {
                    Request::Status(reply) => {
                        reply.send(Err(anyhow::anyhow!("nothing is known"))).map_err(drop)
                    }
                    Request::Count(reply) => reply.send(Ok(Metered::default())).map_err(drop),
                    Request::Fix(_, reply) => reply.send(Ok(())).map_err(drop),
                };
            }
        });
        // The server hangs up on a client that says too much.
        let _ = client.write_all(said).await;
        let _ = client.shutdown().await;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await?;
        served.await.map_err(io::Error::other)?;
        Ok(answer)
    })
}
