//! Packet sockets: whole Ethernet frames in and out of one device.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockType, recvmsg, send,
    setsockopt, socket, sockopt,
};

/// The kernel keeps what has arrived until it is read.
const BUFFER_BYTES: usize = 64 << 20;
const MAX_FRAME_BYTES: usize = 1 << 17;

/// A packet socket of a device in the namespace of the thread that opens it.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl PacketSocket {
    /// For sending.
    pub(crate) fn sender(device: &str) -> Result<Self> {
        let socket = Self::open()?;
        socket.bind(device, 0)?;
        Ok(socket)
    }

    /// For seeing all that passes the device from now on, in both directions.
    pub(crate) fn tap(device: &str) -> Result<Self> {
        let socket = Self::open()?;
        setsockopt(&socket.fd, sockopt::RcvBufForce, &BUFFER_BYTES)?;
        socket.request_auxdata()?;
        socket.bind(device, libc::ETH_P_ALL as u16)?;
        Ok(socket)
    }

    fn open() -> Result<Self> {
        // Without a protocol it sees nothing of other devices before it is bound to one.
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .context("open a packet socket")?;
        Ok(Self { fd, buffer: vec![0; MAX_FRAME_BYTES] })
    }

    fn bind(&self, device: &str, protocol: u16) -> Result<()> {
        let index = if_nametoindex(device).with_context(|| device.to_owned())?;
        // SAFETY: every bit pattern is a valid `sockaddr_ll`, zero among them.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = index.cast_signed();
        let len = size_of_val(&address) as u32;
        // SAFETY: the pointer is to a live address of the length passed with it.
        let done = unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), len) };
        ensure!(done == 0, "packet socket on {device}: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Sends one frame.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        self.try_send(frame).context("send a frame")
    }

    /// The same, with the error as it is: ENOBUFS where it passed TC egress and was dropped behind.
    pub(crate) fn try_send(&self, frame: &[u8]) -> nix::Result<()> {
        send(self.fd.as_raw_fd(), frame, MsgFlags::empty()).map(drop)
    }

    /// The next frame that has passed, and whether it was sent; none when there is no more.
    pub(crate) fn receive(&mut self) -> Result<Option<(Vec<u8>, bool)>> {
        let mut control = cmsg_space!(libc::tpacket_auxdata);
        let mut parts = [IoSliceMut::new(&mut self.buffer)];
        let fd = self.fd.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<LinkAddr>(fd, &mut parts, Some(&mut control), flags) {
            Err(Errno::EAGAIN) => return Ok(None),
            message => message.context("receive a frame")?,
        };
        ensure!(!message.flags.contains(MsgFlags::MSG_TRUNC), "a frame was cut short");
        let sent = message.address.context("no address")?.pkttype() == libc::PACKET_OUTGOING;
        let mut tag = None;
        for message in message.cmsgs()? {
            if let ControlMessageOwned::Unknown(message) = message {
                tag = tag_beside(&message.data_bytes);
            }
        }
        let len = message.bytes;
        let mut frame = self.buffer[..len].to_vec();
        if let Some(tag) = tag {
            frame.splice(12..12, tag);
        }
        Ok(Some((frame, sent)))
    }

    /// Frames that did not fit into the buffer since the last call.
    pub(crate) fn lost(&self) -> Result<u32> {
        let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut len = size_of_val(&stats) as u32;
        // SAFETY: both pointers are to live memory, `len` is the size of what the first points to.
        let done = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut len,
            )
        };
        ensure!(done == 0, "packet socket statistics: {}", io::Error::last_os_error());
        Ok(stats.tp_drops)
    }

    /// Has the kernel tell of VLAN tags that it carries beside the data.
    fn request_auxdata(&self) -> Result<()> {
        let on: libc::c_int = 1;
        // SAFETY: the pointer is to a live integer of the size passed with it.
        let done = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_AUXDATA,
                (&raw const on).cast(),
                size_of_val(&on) as u32,
            )
        };
        ensure!(done == 0, "ask for VLAN tags: {}", io::Error::last_os_error());
        Ok(())
    }
}

/// The four bytes of a VLAN tag from a `struct tpacket_auxdata`, if there is one.
fn tag_beside(auxdata: &[u8]) -> Option<[u8; 4]> {
    let status = u32::from_ne_bytes(auxdata.get(..4)?.try_into().ok()?);
    let field = |at: usize| Some(u16::from_ne_bytes(auxdata.get(at..at + 2)?.try_into().ok()?));
    if status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let [tci, tpid] = [field(16)?, field(18)?].map(u16::to_be_bytes);
    Some([tpid[0], tpid[1], tci[0], tci[1]])
}
