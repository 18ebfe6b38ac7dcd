//! Packets that are really sent: with sums left open, longer than a page, and with their headers
//! outside of the linear part.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, OwnedFd};

use aya::programs::TcAttachType;
use aya::programs::links::LinkOrder;
use aya::programs::tc::TcAttachOptions;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, sendmsg, setsockopt, socket, sockopt,
};
use vxcsum::program::Program;
use vxcsum_common::Offload;
use vxcsum_tests::cases::Case;
use vxcsum_tests::netns::NetNs;

use crate::test_run::Way;

/// The device that is watched.
const DEVICE: &str = "watched";
/// Its longest packet.
const MTU: usize = 60_000;

/// A device of which nobody hears, in a namespace of its own.
pub(crate) struct Wire {
    sender: OwnedFd,
    tap: OwnedFd,
    _ns: NetNs,
}

impl Wire {
    /// Makes the device and attaches the program to it.
    pub(crate) fn open(program: &mut Program) -> Self {
        let ns = NetNs::new("wire").unwrap();
        // The other end takes nothing that is not for its address, and nobody talks by itself.
        ns.sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
        let links = format!(
            "link add {DEVICE} mtu {MTU} type veth peer name other mtu {MTU}\n\
             link set {DEVICE} arp off up\n\
             link set other arp off up\n"
        );
        ns.ip(&links).unwrap();
        let classifier = program.classifier().unwrap();
        let (sender, tap) = ns
            .enter(|| {
                let order = TcAttachOptions::TcxOrder(LinkOrder::first());
                classifier.attach_with_options(DEVICE, TcAttachType::Egress, order)?;
                let sender = packet_socket(0)?;
                set(&sender, libc::PACKET_VNET_HDR, 1)?;
                let tap = packet_socket(libc::ETH_P_ALL as u16)?;
                Ok((sender, tap))
            })
            .unwrap();
        Self { sender, tap, _ns: ns }
    }
}

impl Way for Wire {
    fn takes(&self, case: &Case, offload: Offload) -> bool {
        let len = case.frame.bytes.len();
        let is_within = match offload {
            Offload::Partial { field, .. } => field + 2 <= len,
            Offload::Unknown | Offload::Complete => true,
        };
        case.hash == 0 && case.segments == 1 && (14..=MTU).contains(&len) && is_within
    }

    fn pass(&mut self, _: &mut Program, case: &Case, offload: Offload) -> Vec<u8> {
        let header = vnet_header(offload);
        setsockopt(&self.sender, sockopt::Mark, &case.mark).unwrap();
        let parts = [IoSlice::new(&header), IoSlice::new(&case.frame.bytes)];
        let fd = self.sender.as_raw_fd();
        let sent = sendmsg::<()>(fd, &parts, &[], MsgFlags::empty(), None);
        sent.unwrap_or_else(|error| panic!("{} ({offload:?}): {error}", case.name));
        let mut frame = vec![0; 1 << 16];
        // The device has no queue: what is sent has passed it.
        let len = recv(self.tap.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT);
        let len = len.unwrap_or_else(|error| panic!("{}: did not leave: {error}", case.name));
        frame.truncate(len);
        let more = recv(self.tap.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_DONTWAIT);
        assert_eq!(more, Err(Errno::EAGAIN), "{}: more than was sent", case.name);
        frame
    }
}

/// A `struct virtio_net_hdr` of `include/uapi/linux/virtio_net.h`. Of a packet longer than a page, no
/// more becomes linear than the link header and what is announced here.
fn vnet_header(offload: Offload) -> [u8; 10] {
    const NEEDS_CSUM: u8 = 1;
    let mut header = [0; 10];
    if let Offload::Partial { start, field } = offload {
        header[0] = NEEDS_CSUM;
        header[6..8].copy_from_slice(&(start as u16).to_ne_bytes());
        header[8..10].copy_from_slice(&((field - start) as u16).to_ne_bytes());
    }
    header
}

/// A packet socket of the device, for packets of a protocol; 0 to hear none.
fn packet_socket(protocol: u16) -> anyhow::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
    // SAFETY: every bit pattern is a valid `sockaddr_ll`, zero among them.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = if_nametoindex(DEVICE)?.cast_signed();
    let len = size_of_val(&address) as u32;
    // SAFETY: the pointer is to a live address of the length passed with it.
    let done = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
    anyhow::ensure!(done == 0, "bind: {}", io::Error::last_os_error());
    Ok(fd)
}

fn set(fd: &OwnedFd, option: libc::c_int, value: libc::c_int) -> anyhow::Result<()> {
    let len = size_of_val(&value) as u32;
    // SAFETY: the pointer is to a live integer of the size passed with it.
    let done = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_PACKET, option, (&raw const value).cast(), len)
    };
    anyhow::ensure!(done == 0, "option {option}: {}", io::Error::last_os_error());
    Ok(())
}
