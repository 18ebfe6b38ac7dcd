//! The tables of `x_tables`, asked of the kernel itself.
//!
//! `iptables-legacy-save` does the same over a raw socket, which takes `CAP_NET_RAW`. Any other
//! socket of the family will do (`nf_getsockopt` in `net/netfilter/nf_sockopt.c`), and then
//! `CAP_NET_ADMIN` is enough (`do_ipt_get_ctl` in `net/ipv4/netfilter/ip_tables.c`). What comes is
//! written down as `iptables-save -c` would, so that there is one reader of rules. Layouts are those
//! of include/uapi/linux/netfilter*/.

use std::ffi::c_int;
use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd as _;

use super::{Family, contiguous};

/// `IPT_SO_GET_INFO`, `IP6T_SO_GET_INFO`
const GET_INFO: c_int = 64;
/// `IPT_SO_GET_ENTRIES`, `IP6T_SO_GET_ENTRIES`
const GET_ENTRIES: c_int = 65;
/// `struct ipt_getinfo`, `struct ip6t_getinfo`
const INFO_LEN: usize = 84;
const TABLE_NAME_LEN: usize = 32;
/// `struct ipt_get_entries` up to its entries, which hold 64-bit counters.
const ENTRIES_AT: usize = (TABLE_NAME_LEN + 4).next_multiple_of(align_of::<u64>());
/// No more than this of a table is read, in bytes. 20,000 rules take some 10 MiB.
const MAX_LEN: usize = 128 << 20;

/// The names of the tables that there are. Asking the kernel for another one would make it.
pub(super) fn tables(family: Family) -> io::Result<Vec<String>> {
    let names = if family == Family::Ipv6 { "ip6_tables_names" } else { "ip_tables_names" };
    match std::fs::read_to_string(format!("/proc/thread-self/net/{names}")) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        // The kernel knows no such tables, or has not loaded what knows them.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A table, as `iptables-save -c` writes it.
pub(super) fn save(family: Family, table: &str) -> io::Result<String> {
    const TRIES: usize = 8;
    let address = if family == Family::Ipv6 { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(address)?;
    let level = if family == Family::Ipv6 { libc::IPPROTO_IPV6 } else { libc::IPPROTO_IP };
    let mut name = [0; TABLE_NAME_LEN];
    match name.get_mut(..table.len()) {
        Some(place) => place.copy_from_slice(table.as_bytes()),
        None => return Err(malformed("its name is too long")),
    }
    for _ in 0..TRIES {
        let mut info = [0; INFO_LEN];
        info[..TABLE_NAME_LEN].copy_from_slice(&name);
        get(&socket, level, GET_INFO, &mut info)?;
        let info = Info::read(&info).ok_or_else(|| malformed("its description is cut short"))?;
        if info.len > MAX_LEN {
            return Err(malformed("it is larger than vxcsum reads"));
        }
        let mut entries = vec![0; ENTRIES_AT + info.len];
        entries[..TABLE_NAME_LEN].copy_from_slice(&name);
        entries[TABLE_NAME_LEN..TABLE_NAME_LEN + 4]
            .copy_from_slice(&(info.len as u32).to_ne_bytes());
        match get(&socket, level, GET_ENTRIES, &mut entries) {
            // It has been changed in between.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) => return Err(error),
            Ok(()) => {
                let table = Table { name: table, family, info, bytes: &entries[ENTRIES_AT..] };
                return table.save().ok_or_else(|| malformed("a rule of it makes no sense"));
            }
        }
    }
    Err(malformed("it is being changed all the time"))
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn get(socket: &UdpSocket, level: c_int, option: c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut len = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes no more than `len` bytes to the buffer, which is as long as that.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            buffer.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the kernel says of a table as a whole.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Info {
    /// Offset of the first rule of each hook that there is.
    hooks: [Option<usize>; 5],
    /// Offset of the rule that is the policy of each hook.
    policies: [usize; 5],
    /// Of all rules, in bytes.
    len: usize,
}

impl Info {
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let valid = u32_at(bytes, 32)?;
        let mut info = Self { len: u32_at(bytes, 80)? as usize, ..Self::default() };
        for hook in 0..5 {
            let entry = u32_at(bytes, 36 + 4 * hook)? as usize;
            info.hooks[hook] = (valid & 1 << hook != 0).then_some(entry);
            info.policies[hook] = u32_at(bytes, 56 + 4 * hook)? as usize;
        }
        Some(info)
    }
}

/// In the order of `enum nf_inet_hooks`.
const HOOKS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

pub(super) struct Table<'a> {
    pub(super) name: &'a str,
    pub(super) family: Family,
    pub(super) info: Info,
    pub(super) bytes: &'a [u8],
}

/// `struct ipt_entry` or `struct ip6t_entry`
struct Entry<'a> {
    next: usize,
    /// The addresses and interfaces that it is about.
    head: &'a [u8],
    matches: &'a [u8],
    target: &'a [u8],
    packets: u64,
    bytes: u64,
}

impl<'a> Table<'a> {
    fn entry(&self, at: usize) -> Option<Entry<'a>> {
        let fixed = if self.family == Family::Ipv6 { 136 } else { 84 };
        let rest = self.bytes.get(at..)?;
        let target_at = usize::from(u16_at(rest, fixed + 4)?);
        let len = usize::from(u16_at(rest, fixed + 6)?);
        let counters = (fixed + 12).next_multiple_of(align_of::<u64>());
        let matches_at = counters + 16;
        // Also keeps a walk from standing still.
        if target_at < matches_at || len < target_at {
            return None;
        }
        Some(Entry {
            next: at + len,
            head: rest.get(..fixed)?,
            matches: rest.get(matches_at..target_at)?,
            target: rest.get(target_at..len)?,
            packets: u64_at(rest, counters)?,
            bytes: u64_at(rest, counters + 8)?,
        })
    }

    pub(super) fn save(&self) -> Option<String> {
        // First what chains there are, by where they begin: that is what jumps name.
        let mut chains: Vec<(usize, String)> = Vec::new();
        for (hook, name) in HOOKS.iter().enumerate() {
            if let Some(at) = self.info.hooks[hook] {
                chains.push((at, (*name).to_owned()));
            }
        }
        let mut declared = String::new();
        for (_, name) in &chains {
            let _ = writeln!(declared, ":{name} ACCEPT [0:0]");
        }
        let mut at = 0;
        while at < self.bytes.len() {
            let entry = self.entry(at)?;
            // The last one only marks the end of the table.
            if let Some(name) = entry.chain_name()
                && entry.next < self.bytes.len()
            {
                let _ = writeln!(declared, ":{name} - [0:0]");
                // Jumps lead to the first rule after the name.
                chains.push((entry.next, name));
            }
            at = entry.next;
        }
        chains.sort();
        let mut text = format!("*{}\n{declared}", self.name);
        let mut chain = "";
        let mut at = 0;
        while at < self.bytes.len() {
            let entry = self.entry(at)?;
            if let Ok(found) = chains.binary_search_by(|(begin, _)| begin.cmp(&at)) {
                chain = &chains[found].1;
            }
            let is_policy = self
                .info
                .hooks
                .iter()
                .zip(self.info.policies)
                .any(|(hook, policy)| hook.is_some() && policy == at);
            // Every own chain ends in a rule that returns, which is none of its owner's.
            let is_end = !is_policy && entry.chain_name().is_none() && self.ends_chain(&entry);
            if entry.chain_name().is_none() && !is_policy && !is_end {
                let _ = write!(text, "[{}:{}] -A {chain}", entry.packets, entry.bytes);
                self.write_rule(&mut text, &entry, &chains)?;
                text.push('\n');
            }
            at = entry.next;
        }
        text.push_str("COMMIT\n");
        Some(text)
    }

    fn ends_chain(&self, entry: &Entry<'_>) -> bool {
        let next = self.entry(entry.next);
        next.is_some_and(|next| next.chain_name().is_some())
            && entry.matches.is_empty()
            && entry.head.iter().all(|byte| *byte == 0)
            && entry.verdict() == Some(RETURN)
    }

    fn write_rule(
        &self,
        text: &mut String,
        entry: &Entry<'_>,
        chains: &[(usize, String)],
    ) -> Option<()> {
        self.write_head(text, entry.head)?;
        let mut rest = entry.matches;
        while !rest.is_empty() {
            let extension = Extension::read(rest)?;
            write_match(text, &extension);
            rest = rest.get(extension.len..)?;
        }
        let (flags, goto) =
            if self.family == Family::Ipv6 { (131, IP6T_F_GOTO) } else { (82, IPT_F_GOTO) };
        let is_goto = entry.head.get(flags)? & goto != 0;
        let target = Extension::read(entry.target)?;
        if !target.name.is_empty() {
            write_target(text, &target, self.family);
            return Some(());
        }
        match i32_at(target.data, 0)? {
            ACCEPT => text.push_str(" -j ACCEPT"),
            DROP => text.push_str(" -j DROP"),
            RETURN => text.push_str(" -j RETURN"),
            // To the queue of user space, in its oldest form.
            verdict if verdict < 0 => text.push_str(" -j QUEUE"),
            // A rule without a target goes on with the next one.
            offset if usize::try_from(offset).ok()? == entry.next => {}
            offset => {
                let offset = usize::try_from(offset).ok()?;
                let found = chains.binary_search_by(|(begin, _)| begin.cmp(&offset)).ok()?;
                let option = if is_goto { "-g" } else { "-j" };
                let _ = write!(text, " {option} {}", chains[found].1);
            }
        }
        Some(())
    }

    /// `struct ipt_ip`, `struct ip6t_ip6`
    fn write_head(&self, text: &mut String, head: &[u8]) -> Option<()> {
        let address_len = if self.family == Family::Ipv6 { 16 } else { 4 };
        let after = 4 * address_len;
        let (protocol, inverted) = if self.family == Family::Ipv6 {
            (u16_at(head, 128)?, head[132])
        } else {
            (u16_at(head, 80)?, head[83])
        };
        let field = |number: usize| head.get(number * address_len..(number + 1) * address_len);
        let sides = [("-s", field(0)?, field(2)?, 0x08), ("-d", field(1)?, field(3)?, 0x10)];
        for (option, address, mask, bit) in sides {
            if mask.iter().any(|byte| *byte != 0) {
                let _ = write!(
                    text,
                    "{} {option} {}/{}",
                    not(inverted & bit != 0),
                    ip(address)?,
                    mask_text(mask)?
                );
            }
        }
        let name = |at: usize| head.get(after + at..after + at + 16);
        for (option, name, mask, bit) in
            [("-i", name(0)?, name(32)?, 0x01), ("-o", name(16)?, name(48)?, 0x02)]
        {
            let len = mask.iter().take_while(|byte| **byte != 0).count();
            if len == 0 {
                continue;
            }
            // The mask of a whole name takes in the zero at its end.
            let shown = name.get(..len)?;
            let whole = shown.contains(&0);
            let shown = until_zero(shown);
            let more = if whole { "" } else { "+" };
            let _ = write!(text, "{} {option} {shown}{more}", not(inverted & bit != 0));
        }
        if protocol != 0 {
            let _ = write!(text, "{} -p {}", not(inverted & 0x40 != 0), protocol_name(protocol));
        }
        if self.family == Family::Ipv4 && head[82] & 0x01 != 0 {
            let _ = write!(text, "{} -f", not(inverted & 0x20 != 0));
        }
        Some(())
    }
}

const DROP: i32 = -1;
const ACCEPT: i32 = -2;
const RETURN: i32 = -5;
const IPT_F_GOTO: u8 = 0x02;
const IP6T_F_GOTO: u8 = 0x04;

impl Entry<'_> {
    /// The chain that begins here.
    fn chain_name(&self) -> Option<String> {
        let target = Extension::read(self.target)?;
        (target.name == "ERROR").then(|| until_zero(target.data))
    }

    fn verdict(&self) -> Option<i32> {
        let target = Extension::read(self.target)?;
        if target.name.is_empty() { i32_at(target.data, 0) } else { None }
    }
}

/// `struct xt_entry_match`, `struct xt_entry_target`
struct Extension<'a> {
    len: usize,
    name: String,
    revision: u8,
    data: &'a [u8],
}

impl<'a> Extension<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        const DATA_AT: usize = 32;
        let len = usize::from(u16_at(bytes, 0)?);
        Some(Self {
            len,
            name: until_zero(bytes.get(2..31)?),
            revision: *bytes.get(31)?,
            // Nothing shorter than its head, which would stand still.
            data: bytes.get(DATA_AT..len)?,
        })
    }
}

/// What is not known by layout is named, with an option that no reader understands.
fn write_match(text: &mut String, it: &Extension<'_>) {
    let before = text.len();
    if known_match(text, it).is_none() {
        text.truncate(before);
        let _ = write!(text, " -m {} --?", it.name);
    }
}

fn known_match(text: &mut String, it: &Extension<'_>) -> Option<()> {
    let data = it.data;
    let _ = write!(text, " -m {}", it.name);
    match (it.name.as_str(), it.revision) {
        ("comment", 0) => {
            let comment = until_zero(data).replace('\\', "\\\\").replace('"', "\\\"");
            let _ = write!(text, " --comment \"{comment}\"");
        }
        ("mark", 1) => {
            let (value, mask) = (u32_at(data, 0)?, u32_at(data, 4)?);
            let _ = write!(text, "{} --mark {value:#x}/{mask:#x}", not(*data.get(8)? != 0));
        }
        ("udp", 0) => write_ports(text, data, *data.get(8)?)?,
        ("tcp", 0) => {
            // Flags and options are tested as well.
            if *data.get(8)? != 0 || *data.get(9)? != 0 {
                return None;
            }
            write_ports(text, data, *data.get(11)?)?;
        }
        ("multiport", 1) => {
            let option = ["--sports", "--dports", "--ports"].get(usize::from(*data.first()?))?;
            let count = usize::from(*data.get(1)?).min(15);
            let mut ports = String::new();
            for index in 0..count {
                let port = u16_at(data, 2 + 2 * index)?;
                // A flag says that the next one is the end of a range.
                let ends_range = index > 0 && *data.get(32 + index - 1)? != 0;
                let separator = match (index, ends_range) {
                    (0, _) => "",
                    (_, true) => ":",
                    (_, false) => ",",
                };
                let _ = write!(ports, "{separator}{port}");
            }
            let _ = write!(text, "{} {option} {ports}", not(*data.get(47)? != 0));
        }
        ("conntrack", 1..=3) => {
            // Only the state is tested: anything else is not understood.
            if u16_at(data, 146)? != 1 {
                return None;
            }
            let states =
                if it.revision == 1 { (*data.get(150)?).into() } else { u16_at(data, 150)? };
            let is_negated = u16_at(data, 148)? & 1 != 0;
            write_states(text, "--ctstate", states, is_negated)?;
        }
        ("state", 0) => write_states(text, "--state", u32_at(data, 0)? as u16, false)?,
        ("addrtype", 1) => {
            let flags = u32_at(data, 4)?;
            for (option, types, bit) in
                [("--src-type", u16_at(data, 0)?, 1), ("--dst-type", u16_at(data, 2)?, 2)]
            {
                match types {
                    0 => {}
                    LOCAL => {
                        let _ = write!(text, "{} {option} LOCAL", not(flags & bit != 0));
                    }
                    _ => return None,
                }
            }
            if flags & 4 != 0 {
                return None;
            }
            if flags & 8 != 0 {
                text.push_str(" --limit-iface-out");
            }
        }
        _ => return None,
    }
    Some(())
}

/// `XT_ADDRTYPE_LOCAL`
const LOCAL: u16 = 1 << 2;

/// The begin of `struct xt_udp` and `struct xt_tcp`.
fn write_ports(text: &mut String, data: &[u8], inverted: u8) -> Option<()> {
    for (option, at, bit) in [("--sport", 0, 1), ("--dport", 4, 2)] {
        let (first, last) = (u16_at(data, at)?, u16_at(data, at + 2)?);
        if (first, last) == (0, u16::MAX) && inverted & bit == 0 {
            continue;
        }
        let _ = write!(text, "{} {option} {first}", not(inverted & bit != 0));
        if first != last {
            let _ = write!(text, ":{last}");
        }
    }
    Some(())
}

/// The bits of `XT_CONNTRACK_STATE_BIT`.
fn write_states(text: &mut String, option: &str, states: u16, is_negated: bool) -> Option<()> {
    const NAMES: [(u16, &str); 7] = [
        (1, "INVALID"),
        (2, "ESTABLISHED"),
        (4, "RELATED"),
        (8, "NEW"),
        (64, "SNAT"),
        (128, "DNAT"),
        (256, "UNTRACKED"),
    ];
    let listed: Vec<_> =
        NAMES.iter().filter(|(bit, _)| states & bit != 0).map(|(_, name)| *name).collect();
    if listed.is_empty() {
        return None;
    }
    let _ = write!(text, "{} {option} {}", not(is_negated), listed.join(","));
    Some(())
}

fn write_target(text: &mut String, it: &Extension<'_>, family: Family) {
    let _ = write!(text, " -j {}", it.name);
    let before = text.len();
    if known_target(text, it, family).is_none() {
        text.truncate(before);
    }
}

fn known_target(text: &mut String, it: &Extension<'_>, family: Family) -> Option<()> {
    let data = it.data;
    match (it.name.as_str(), it.revision) {
        ("MARK", 2) => {
            let (value, mask) = (u32_at(data, 0)?, u32_at(data, 4)?);
            let _ = write!(text, " --set-xmark {value:#x}/{mask:#x}");
        }
        // `struct xt_connmark_tginfo1`, `struct xt_connmark_tginfo2`
        ("CONNMARK", 1 | 2) => {
            const RESTORE: u8 = 2;
            let mode = *data.get(if it.revision == 1 { 12 } else { 14 })?;
            if mode == RESTORE {
                let (ctmask, nfmask) = (u32_at(data, 4)?, u32_at(data, 8)?);
                let _ = write!(text, " --restore-mark --nfmask {nfmask:#x} --ctmask {ctmask:#x}");
            }
        }
        // `struct xt_ct_target_info`: XT_CT_NOTRACK
        ("CT", _) if u16_at(data, 0)? & 1 != 0 => text.push_str(" --notrack"),
        ("MASQUERADE" | "SNAT", revision) => {
            // `struct nf_nat_ipv4_multi_range_compat` or `struct nf_nat_range`
            let is_old = family == Family::Ipv4 && revision == 0;
            let (flags, address_len, at) = if is_old { (4, 4, 8) } else { (0, 16, 4) };
            let flags = u32_at(data, flags)?;
            let address = |index: usize| {
                let bytes = data.get(at + index * address_len..at + (index + 1) * address_len)?;
                // Of the longer form, IPv4 uses the first four bytes.
                ip(if family == Family::Ipv4 { bytes.get(..4)? } else { bytes })
            };
            let port = |index: usize| {
                let bytes = data.get(at + 2 * address_len + 2 * index..)?;
                Some(u16::from_be_bytes([*bytes.first()?, *bytes.get(1)?]))
            };
            write_nat(text, flags, (address(0)?, address(1)?), (port(0)?, port(1)?), family);
        }
        _ => return None,
    }
    Some(())
}

fn write_nat(
    text: &mut String,
    flags: u32,
    (first, last): (String, String),
    (low, high): (u16, u16),
    family: Family,
) {
    let ports = if low == high { low.to_string() } else { format!("{low}-{high}") };
    let (has_address, has_ports) = (flags & 1 != 0, flags & 2 != 0);
    if has_address {
        let is_bracketed = family == Family::Ipv6 && has_ports;
        let (open, close) = if is_bracketed { ("[", "]") } else { ("", "") };
        let range = if first == last { first } else { format!("{first}-{last}") };
        let _ = write!(text, " --to-source {open}{range}{close}");
        if has_ports {
            let _ = write!(text, ":{ports}");
        }
    } else if has_ports {
        let _ = write!(text, " --to-ports {ports}");
    }
    for (bit, option) in [(4, " --random"), (16, " --random-fully"), (8, " --persistent")] {
        if flags & bit != 0 {
            text.push_str(option);
        }
    }
}

const fn not(is_negated: bool) -> &'static str {
    if is_negated { " !" } else { "" }
}

fn protocol_name(number: u16) -> String {
    match number {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        number => number.to_string(),
    }
}

fn ip(bytes: &[u8]) -> Option<String> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).to_string()),
        _ => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_string()),
    }
}

/// The length of the prefix, or the mask itself where it has holes.
fn mask_text(mask: &[u8]) -> Option<String> {
    let bits = mask.iter().fold(0, |bits, byte| bits << 8 | u128::from(*byte));
    match contiguous(bits, 8 * mask.len() as u32) {
        Some(prefix_len) => Some(prefix_len.to_string()),
        None => ip(mask),
    }
}

/// Without line breaks, which end a rule.
fn until_zero(bytes: &[u8]) -> String {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..len]).replace(['\n', '\r'], " ")
}

fn array<const LEN: usize>(bytes: &[u8], at: usize) -> Option<[u8; LEN]> {
    bytes.get(at..at.checked_add(LEN)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_ne_bytes)
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    array(bytes, at).map(i32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry for IPv4 with these extensions; the last one is the target.
    fn entry(extensions: &[(&str, u8, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 112];
        let mut target_at = 0;
        for (name, revision, data) in extensions {
            target_at = bytes.len();
            let len = (32 + data.len()).next_multiple_of(8);
            bytes.extend((len as u16).to_ne_bytes());
            bytes.extend(name.as_bytes());
            bytes.resize(target_at + 31, 0);
            bytes.push(*revision);
            bytes.extend(*data);
            bytes.resize(target_at + len, 0);
        }
        let len = bytes.len() as u16;
        bytes[88..90].copy_from_slice(&(target_at as u16).to_ne_bytes());
        bytes[90..92].copy_from_slice(&len.to_ne_bytes());
        bytes[96..104].copy_from_slice(&7_u64.to_ne_bytes());
        bytes
    }

    /// A rule and the policy of POSTROUTING, and the end.
    fn table() -> (Info, Vec<u8>) {
        let mark = [0x4000_u32.to_ne_bytes(), 0x4000_u32.to_ne_bytes(), [0; 4]].concat();
        let mut nat = [1_u32.to_ne_bytes(), 16_u32.to_ne_bytes()].concat();
        nat.extend([0; 12]);
        let mut bytes = entry(&[("mark", 1, &mark), ("MASQUERADE", 0, &nat)]);
        let policy = bytes.len();
        bytes.extend(entry(&[("", 0, &ACCEPT.to_ne_bytes())]));
        bytes.extend(entry(&[("ERROR", 0, b"ERROR")]));
        let mut info = Info { len: bytes.len(), ..Info::default() };
        info.hooks[4] = Some(0);
        info.policies[4] = policy;
        (info, bytes)
    }

    fn save(info: Info, bytes: &[u8], family: Family) -> Option<String> {
        Table { name: "nat", family, info, bytes }.save()
    }

    #[test]
    fn a_table_is_written_down() {
        let (info, bytes) = table();
        let expected = "*nat\n:POSTROUTING ACCEPT [0:0]\n[7:0] -A POSTROUTING -m mark --mark \
                        0x4000/0x4000 -j MASQUERADE --random-fully\nCOMMIT\n";
        assert_eq!(save(info, &bytes, Family::Ipv4).unwrap(), expected);
    }

    /// Numbers that are as good as random, the same each time (xorshift).
    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let (info, good) = table();
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for round in 0..50_000 {
            let mut bytes = good.clone();
            if round % 4 == 0 {
                bytes.fill_with(|| random(&mut state) as u8);
            } else {
                for _ in 0..=round % 5 {
                    let at = random(&mut state) as usize % bytes.len();
                    bytes[at] = random(&mut state) as u8;
                }
            }
            bytes.truncate(random(&mut state) as usize % (2 * good.len()));
            let mut info = info;
            info.hooks[round % 5] = Some(random(&mut state) as usize % (2 * good.len()));
            for family in [Family::Ipv4, Family::Ipv6] {
                if let Some(text) = save(info, &bytes, family) {
                    super::super::save::parse(&text, super::super::Backend::IptablesLegacy, family);
                }
            }
        }
    }
}
