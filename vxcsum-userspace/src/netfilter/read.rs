//! Reading everything that there is.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;

use super::nft::RawTable;
use super::{Backend, Chain, Family, Ruleset, legacy, nft, process, save};
use crate::modules;

/// For all that is asked of other programs together: longer than they take for rules that a node
/// can bear.
const PATIENCE: Duration = Duration::from_secs(30);

/// Reads the rules of this network namespace, and changes nothing there. It takes `CAP_NET_ADMIN`, and
/// `nft` and `iptables-nft-save` for the rules of `nf_tables`; what cannot be read is named in
/// [`Ruleset::unread`]. Takes seconds where there are tens of thousands of rules: not for a thread
/// that others wait for.
pub fn read() -> Ruleset {
    let (mut chains, mut unread) = (Vec::new(), Vec::new());
    for family in [Family::Ipv4, Family::Ipv6] {
        read_legacy(family, &mut chains, &mut unread);
    }
    // Asking would load it; where it is not, it has no rules.
    if modules::may_be_there("nf_tables") {
        read_nf_tables(&mut chains, &mut unread);
    }
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

/// Tables by name and then by family, the oldest first.
///
/// nft is asked only for what iptables does not know: of the extensions of iptables it shows no more
/// than the names, and it takes a hundred times as much memory.
fn read_nf_tables(chains: &mut Vec<Chain>, unread: &mut Vec<String>) {
    let deadline = Instant::now() + PATIENCE;
    let tables = process::output("nft", &["-j", "list", "tables"], deadline)
        .and_then(|json| nft::parse_tables(&json).map_err(|error| format!("nft: {error}")));
    let tables = tables.map_err(|error| unread.push(format!("nftables: {error}"))).ok();
    let mut saved = Vec::new();
    for (family, program) in
        [(Family::Ipv4, "iptables-nft-save"), (Family::Ipv6, "ip6tables-nft-save")]
    {
        let may_be_own = |table: &RawTable| {
            nft::may_be_of_iptables(table) && nft::family(&table.family) == Some(family)
        };
        // It makes no tables that are not there, but there is no need to ask either.
        if tables.as_ref().is_some_and(|tables| !tables.iter().any(may_be_own)) {
            continue;
        }
        let output = process::output(program, &["-c"], deadline).and_then(|text| {
            String::from_utf8(text).map_err(|error| format!("{program}: {error}"))
        });
        match output {
            Ok(text) => saved.extend(save::parse(&text, Backend::IptablesNft, family)),
            Err(error) => unread.push(format!("iptables on nf_tables: {error}")),
        }
    }
    for table in tables.into_iter().flatten() {
        let family = nft::family(&table.family);
        let is_its = |chain: &Chain| Some(chain.family) == family && *chain.table == *table.name;
        // Tables that iptables finds incompatible with itself are missing there.
        let (its, others): (Vec<_>, Vec<_>) = saved.into_iter().partition(is_its);
        saved = others;
        if !its.is_empty() {
            chains.extend(its);
            continue;
        }
        let args = ["-j", "list", "table", &table.family, &table.name];
        let listed = process::output("nft", &args, deadline)
            .and_then(|json| nft::parse(&json).map_err(|error| format!("nft: {error}")));
        match listed {
            Ok(listed) => chains.extend(listed),
            Err(error) => {
                unread.push(format!("nftables: table {} {}: {error}", table.family, table.name));
            }
        }
    }
    // Where nft could not be asked what there is.
    chains.append(&mut saved);
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
