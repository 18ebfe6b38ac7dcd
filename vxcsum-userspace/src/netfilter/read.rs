//! Reading everything that there is.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use nix::ifaddrs::getifaddrs;

use super::{Backend, Chain, Family, Ruleset, legacy, nft, process, save};

/// Reads the rules of this network namespace, and changes nothing there. It takes `CAP_NET_ADMIN`, and
/// `nft` and `iptables-nft-save` for the rules of `nf_tables`; what cannot be read is named in
/// [`Ruleset::unread`]. Takes seconds where there are tens of thousands of rules: not for a thread
/// that others wait for.
pub fn read() -> Ruleset {
    let (mut chains, mut unread) = (Vec::new(), Vec::new());
    for family in [Family::Ipv4, Family::Ipv6] {
        read_legacy(family, &mut chains, &mut unread);
    }
    read_nf_tables(&mut chains, &mut unread);
    Ruleset::new(chains, local_addresses(), unread)
}

fn read_legacy(family: Family, chains: &mut Vec<Chain>, unread: &mut Vec<String>) {
    let what = if family == Family::Ipv6 { "ip6tables-legacy" } else { "iptables-legacy" };
    let tables = match legacy::tables(family) {
        Ok(tables) => tables,
        Err(error) => {
            unread.push(format!("{what}: cannot tell which tables there are: {error}"));
            return;
        }
    };
    for table in tables {
        match legacy::save(family, &table) {
            Ok(text) => {
                chains.extend(save::parse(&text, Backend::IptablesLegacy, family));
            }
            Err(error) => unread.push(format!("{what}: table {table}: {error}")),
        }
    }
}

fn read_nf_tables(all: &mut Vec<Chain>, unread: &mut Vec<String>) {
    let listed = process::output("nft", &["-j", "list", "ruleset"])
        .and_then(|json| nft::parse(&json).map_err(|error| format!("nft: {error}")));
    let (mut chains, is_listed) = match listed {
        Ok(chains) => (chains, true),
        Err(error) => {
            unread.push(format!("nftables: {error}"));
            (Vec::new(), false)
        }
    };
    for (family, program, what) in [
        (Family::Ipv4, "iptables-nft-save", "iptables-nft"),
        (Family::Ipv6, "ip6tables-nft-save", "ip6tables-nft"),
    ] {
        let is_own =
            |chain: &Chain| chain.backend == Backend::IptablesNft && chain.family == family;
        // It makes no tables that are not there, but there is no need to ask either.
        if is_listed && !chains.iter().any(is_own) {
            continue;
        }
        let saved = process::output(program, &["-c"]).and_then(|text| {
            String::from_utf8(text).map_err(|error| format!("{program}: {error}"))
        });
        match saved {
            Ok(text) => {
                replace_tables(&mut chains, save::parse(&text, Backend::IptablesNft, family));
            }
            // Without it the extensions of iptables are only known by name.
            Err(error) => unread.push(format!("{what}: {error}")),
        }
    }
    all.append(&mut chains);
}

/// Puts tables in place of others of the same name. Tables that iptables finds incompatible with
/// itself are missing there, and stay as nft shows them.
fn replace_tables(chains: &mut Vec<Chain>, by: Vec<Chain>) {
    let key = |chain: &Chain| (chain.family, chain.table.clone());
    let replaced: BTreeSet<Arc<str>> = by.iter().map(|chain| chain.table.clone()).collect();
    let Some(family) = by.first().map(|chain| chain.family) else { return };
    let is_replaced = |chain: &Chain| {
        let (its_family, table) = key(chain);
        its_family == family && replaced.contains(&table)
    };
    let at = chains.iter().position(is_replaced).unwrap_or(chains.len());
    chains.retain(|chain| !is_replaced(chain));
    // Where the first of them was: the order tells of age.
    chains.splice(at..at, by);
}

/// The addresses of every interface. Without them, no rule can be told to be about this node.
fn local_addresses() -> Vec<(String, IpAddr)> {
    let Ok(interfaces) = getifaddrs() else { return Vec::new() };
    let address = |it: nix::ifaddrs::InterfaceAddress| {
        let address = it.address?;
        let ip = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(ipv4), _) => IpAddr::from(ipv4.ip()),
            (None, Some(ipv6)) => IpAddr::from(ipv6.ip()),
            (None, None) => return None,
        };
        Some((it.interface_name, ip))
    };
    interfaces.filter_map(address).collect()
}
