//! What may be written into a broken packet.

use crate::layout::{Action, FixMode};
use crate::verdict::{Finding, Verdict};

/// What to do with a broken packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// What is done, or why nothing is.
    pub action: Action,
    /// The value for the checksum field, host byte order, where the action writes one.
    pub check: u16,
}

impl Remedy {
    /// Whether [`Remedy::check`] is to be written.
    pub const fn writes(self) -> bool {
        Action::writes(self.action as u8)
    }
}

/// Decides what `mode` does with a broken packet. Only what is explained is rewritten, unless
/// `unproven` says otherwise, and never a field that the NIC or GSO will still work on.
#[inline(always)]
pub const fn remedy(mode: FixMode, unproven: bool, finding: &Finding) -> Remedy {
    let is_zero_device = matches!(finding.verdict, Verdict::MangledZero);
    let (action, check) = match mode {
        FixMode::Off => (Action::None, 0),
        _ if matches!(finding.verdict, Verdict::Bad) && !unproven => (Action::RefusedUnproven, 0),
        FixMode::Zero if finding.is_ipv6 => (Action::RefusedIpv6, 0),
        _ if !is_zero_device && finding.expected == 0 => (Action::RefusedUnknownSum, 0),
        FixMode::Zero => (Action::Zeroed, 0),
        FixMode::Restore if is_zero_device => (Action::Restored, 0),
        FixMode::Restore => (Action::Restored, finding.expected),
    };
    Remedy { action, check }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Policy, Proof};

    fn finding(verdict: Verdict, is_ipv6: bool, expected: u16) -> Finding {
        Finding {
            verdict,
            proof: Proof::None,
            policy: Policy::Unknown,
            is_ipv6,
            udp: 34,
            check: 0x1111,
            expected,
            source_port_before_nat: 0,
        }
    }

    #[test]
    fn modes_write_only_what_is_explained() {
        use Action::{None, RefusedIpv6, RefusedUnknownSum, RefusedUnproven, Restored, Zeroed};
        use Verdict::{Bad, MangledZero, StaleNat};
        for (mode, unproven, verdict, is_ipv6, expected, action, check) in [
            (FixMode::Off, true, StaleNat, false, 0x2222, None, 0),
            (FixMode::Zero, false, StaleNat, false, 0x2222, Zeroed, 0),
            (FixMode::Zero, false, StaleNat, true, 0x2222, RefusedIpv6, 0),
            (FixMode::Zero, false, MangledZero, false, 0, Zeroed, 0),
            (FixMode::Zero, false, MangledZero, true, 0, RefusedIpv6, 0),
            (FixMode::Zero, false, Bad, false, 0x2222, RefusedUnproven, 0),
            (FixMode::Zero, true, Bad, false, 0x2222, Zeroed, 0),
            (FixMode::Zero, true, Bad, false, 0, RefusedUnknownSum, 0),
            (FixMode::Restore, false, StaleNat, false, 0x2222, Restored, 0x2222),
            (FixMode::Restore, false, StaleNat, true, 0x2222, Restored, 0x2222),
            (FixMode::Restore, false, MangledZero, false, 0x2222, Restored, 0),
            (FixMode::Restore, false, MangledZero, true, 0, Restored, 0),
            (FixMode::Restore, false, Bad, true, 0x2222, RefusedUnproven, 0),
            (FixMode::Restore, true, Bad, true, 0x2222, Restored, 0x2222),
            (FixMode::Restore, true, Bad, false, 0, RefusedUnknownSum, 0),
        ] {
            let remedy = remedy(mode, unproven, &finding(verdict, is_ipv6, expected));
            assert_eq!(remedy, Remedy { action, check }, "{mode:?} {verdict:?} ipv6={is_ipv6}");
            assert_eq!(remedy.writes(), matches!(action, Zeroed | Restored));
        }
    }
}
