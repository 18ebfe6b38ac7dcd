//! Who sends.

use anyhow::Result;
use vxcsum_common::layout::{ANY_VNI, Port, SEEN_SUM, SEEN_ZERO};
use vxcsum_common::{Device, Policy, Proof, Verdict};

use super::{BAD, Case, MANGLED, OLD_PORT, ONE_PORT, PORT, SOURCE_PORT, open_tcp, port, stale};
use crate::packets::{Check, Frame, Ip, Transport, Vxlan};

/// Who sends, by port and VNI, and what is known or learned of it.
pub(super) fn senders() -> Result<Vec<Case>> {
    use Verdict::{Missing, Zero};
    let frame = |vni, port, check| {
        let vxlan =
            Vxlan { vni, destination_port: port, ..Vxlan::new(SOURCE_PORT, check, open_tcp()) };
        Frame::new(&Ip::v4(Transport::Vxlan(vxlan)).into())
    };
    let mangled = |vni| frame(vni, PORT, Check::Value(0xffff));
    let none = |vni| frame(vni, PORT, Check::Zero);
    let learned =
        |seen| vec![Port { seen_ipv4: seen, seen_ipv6: 3 - seen, ..port(PORT, Policy::Unknown) }];
    let by_vni = || vec![Port { by_vni: 1, ..port(PORT, Policy::Sum) }];
    let zero_device = Device { policy_ipv4: Policy::Zero as u8, ..ONE_PORT };
    let many: Vec<_> = (0..15).map(|at| port(20000 + 1111 * at, Policy::Zero)).collect();
    let many = [many, vec![port(PORT, Policy::Sum)]].concat();
    Ok(vec![
        Case::broken("learned to send none", mangled(1)?, MANGLED).ports(learned(SEEN_ZERO)),
        Case::quiet("learned to send none, none", none(1)?, Zero).ports(learned(SEEN_ZERO)),
        Case::broken("learned to send sums", mangled(1)?, BAD).ports(learned(SEEN_SUM)),
        Case::quiet("learned to send sums, none", none(1)?, Missing).ports(learned(SEEN_SUM)),
        Case::broken("learned to send both", mangled(1)?, BAD)
            .ports(vec![Port { seen_ipv4: 3, ..port(PORT, Policy::Unknown) }]),
        Case::quiet("learned to send both, none", none(1)?, Zero)
            .ports(vec![Port { seen_ipv4: 3, ..port(PORT, Policy::Unknown) }]),
        Case::broken("what is known is not learned", mangled(1)?, BAD)
            .ports(vec![Port { seen_ipv4: SEEN_ZERO, ..port(PORT, Policy::Sum) }]),
        Case::broken("the VNI's device sends none", mangled(5)?, MANGLED)
            .ports(by_vni())
            .device_of(5, zero_device)
            .device_of(6, ONE_PORT),
        Case::broken("the VNI's device sends sums", mangled(6)?, BAD)
            .ports(by_vni())
            .device_of(5, zero_device)
            .device_of(6, ONE_PORT),
        Case::broken("any other VNI's device sends none", mangled(7)?, MANGLED)
            .ports(by_vni())
            .device_of(ANY_VNI, zero_device)
            .device_of(6, ONE_PORT),
        Case::quiet("a VNI without a device", none(7)?, Zero)
            .ports(by_vni())
            .device_of(6, ONE_PORT),
        Case::broken(
            "the device of any VNI proves the port",
            frame(9, PORT, Check::Stale { old_port: OLD_PORT, old_address: None })?,
            stale(Proof::FlowHash),
        )
        .device_of(ANY_VNI, ONE_PORT),
        Case::quiet("the last of 16 ports", none(1)?, Missing).ports(many.clone()),
        Case::quiet("the first of 16 ports", frame(1, 20000, Check::Zero)?, Zero)
            .ports(many.clone()),
        Case::not_vxlan("none of 16 ports", frame(1, 20001, Check::Zero)?).ports(many),
        Case::quiet("port 65535", frame(1, 65535, Check::Zero)?, Missing)
            .ports(vec![port(65535, Policy::Sum)]),
    ])
}
