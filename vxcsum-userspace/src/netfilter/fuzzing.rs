//! For fuzz targets: the readers of what other programs and the kernel say.

use super::legacy::{Info, Table};
use super::{Backend, Family, Ruleset, nft, save};

fn ruleset(chains: Vec<super::Chain>) -> Ruleset {
    let addresses =
        [("eth0", "10.0.0.11"), ("eth0", "fd00:10::11"), ("vxlan.calico", "172.29.0.0")];
    let addresses = addresses.map(|(name, address)| (name.to_owned(), address.parse()));
    let local = addresses.into_iter().filter_map(|(name, address)| Some((name, address.ok()?)));
    Ruleset::new(chains, local.collect(), Vec::new())
}

const fn family(is_ipv6: bool) -> Family {
    if is_ipv6 { Family::Ipv6 } else { Family::Ipv4 }
}

/// What `nft -j list ruleset` has written.
pub fn from_nft(json: &[u8]) -> Option<Ruleset> {
    nft::parse(json).ok().map(ruleset)
}

/// How many tables there are in what `nft -j list tables` has written.
pub fn tables(json: &[u8]) -> Option<usize> {
    Some(
        nft::parse_tables(json)
            .ok()?
            .iter()
            .filter(|table| !nft::may_be_of_iptables(table))
            .count(),
    )
}

/// What `iptables-save -c` or `ip6tables-save -c` has written.
pub fn from_save(text: &str, is_ipv6: bool) -> Ruleset {
    ruleset(save::parse(text, Backend::IptablesNft, family(is_ipv6)))
}

/// What the kernel says of a table of `x_tables`, as `iptables-save -c` would write it.
pub fn legacy_to_save(info: &[u8], entries: &[u8], is_ipv6: bool) -> Option<String> {
    Table { name: "nat", family: family(is_ipv6), info: Info::read(info)?, bytes: entries }.save()
}
