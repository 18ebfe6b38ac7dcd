//! Offload features and drivers of devices.
//!
//! By the ioctl, not by generic netlink: it is the same on every kernel (features by name since
//! 2.6.39, netlink only since 5.6), it is the only way to the driver of a device, and it needs no
//! privilege.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

// include/uapi/linux/ethtool.h
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
/// The set of strings that names features (`ETH_SS_FEATURES`).
const FEATURE_NAMES: u32 = 4;
/// Length of each string (`ETH_GSTRING_LEN`) in bytes.
const STRING_LEN: usize = 32;
/// Bytes of `struct ethtool_drvinfo`.
const DRVINFO_LEN: usize = 196;

nix::ioctl_readwrite_bad! {
    /// netdevice(7), with a command of ethtool inside.
    siocethtool, libc::SIOCETHTOOL, libc::ifreq
}

/// What a device can do for its packets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Name of the driver, for example `vmxnet3`.
    pub driver: Option<String>,
    /// Every feature by the name that `ethtool -k` has for it, and whether it is on.
    pub features: BTreeMap<String, bool>,
}

impl Offloads {
    /// Whether a feature is on; none where the device does not have it.
    pub fn is_on(&self, feature: &str) -> Option<bool> {
        self.features.get(feature).copied()
    }

    /// Asks the kernel.
    pub fn read(device: &str) -> Result<Self, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC;
        // Any socket will do, but a kernel without IPv4 has none of this family.
        let socket = socket(AddressFamily::Inet, SockType::Datagram, flags, None)
            .or_else(|_| socket(AddressFamily::Inet6, SockType::Datagram, flags, None))?;
        let names = feature_names(&socket, device)?;
        let blocks = names.len().div_ceil(32);
        let mut answer = vec![0_u32; 2 + 4 * blocks];
        (answer[0], answer[1]) = (ETHTOOL_GFEATURES, blocks as u32);
        ask(&socket, device, &mut answer)?;
        // Of each 32: available, requested, active, never changed.
        let is_on = |index: usize| answer[2 + index / 32 * 4 + 2] >> (index % 32) & 1 == 1;
        let features = names.into_iter().enumerate().filter(|(_, name)| !name.is_empty());
        let features = features.map(|(index, name)| (name, is_on(index))).collect();
        Ok(Self { driver: driver(&socket, device), features })
    }
}

/// Index and place are the same.
fn feature_names(socket: &OwnedFd, device: &str) -> Result<Vec<String>, Errno> {
    // Command, reserved, mask of sets in two halves, number of names.
    let mut info = [ETHTOOL_GSSET_INFO, 0, 1 << FEATURE_NAMES, 0, 0];
    ask(socket, device, &mut info)?;
    let count = info[4] as usize;
    // Command, set, number, names.
    let mut answer = vec![0_u32; 3 + count * STRING_LEN / 4];
    (answer[0], answer[1], answer[2]) = (ETHTOOL_GSTRINGS, FEATURE_NAMES, count as u32);
    ask(socket, device, &mut answer)?;
    Ok(bytemuck::cast_slice(&answer[3..]).chunks(STRING_LEN).map(text).collect())
}

fn driver(socket: &OwnedFd, device: &str) -> Option<String> {
    let mut answer = [0_u32; DRVINFO_LEN / 4];
    answer[0] = ETHTOOL_GDRVINFO;
    ask(socket, device, &mut answer).ok()?;
    let driver = text(&bytemuck::cast_slice(&answer[1..])[..STRING_LEN]);
    (!driver.is_empty()).then_some(driver)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// `buffer` begins with a command, and is as long as the answer to it.
fn ask(socket: &OwnedFd, device: &str, buffer: &mut [u32]) -> Result<(), Errno> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    if device.len() >= ifr_name.len() {
        return Err(Errno::ENODEV);
    }
    for (to, from) in ifr_name.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    let ifru_data = buffer.as_mut_ptr().cast();
    let mut request =
        libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data } };
    // SAFETY: the request lives through the call, and so does the buffer that it points to. Each
    // caller makes that as long as its command lets the kernel write, by the lengths inside it.
    unsafe { siocethtool(socket.as_raw_fd(), &raw mut request) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_has_features_and_other_names_are_an_error() {
        let offloads = Offloads::read("lo").unwrap();
        assert_eq!(offloads.is_on("loopback"), Some(true), "{offloads:?}");
        assert_eq!(offloads.is_on("tx-vlan-hw-insert"), Some(false), "{offloads:?}");
        assert_eq!(Offloads::read("none-such"), Err(Errno::ENODEV));
        assert_eq!(Offloads::read("a-name-too-long-for-linux"), Err(Errno::ENODEV));
    }
}
