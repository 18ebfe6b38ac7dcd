//! Inner TCP flows that user space follows: those whose SYNs were broken, until they get through.
//!
//! A broken packet has an event. What is missing without this is the end of the story: a packet that
//! leaves as it should has none. At most two packets of a flow are told, so the rate limit need
//! not know of them.

use vxcsum_common::inner::TcpSegment;
use vxcsum_common::layout::{Action, SYN_TOLD};
use vxcsum_common::outer::Outer;
use vxcsum_common::{Finding, Policy, Proof, Verdict};

use crate::broken;
use crate::kernel::Draft;
use crate::maps::FOLLOWED;
use crate::skb::Skb;

/// Tells of a packet that has no event, where its flow is followed: of the first SYN that leaves
/// whole, and of the first other packet that does, with which the following ends. Broken SYNs are
/// only counted.
///
/// What finds no room in the event buffer changes nothing: the next packet of the flow is told
/// instead. CPUs race for the map value, and may tell the same thing twice.
#[inline(always)]
pub(crate) fn tell(skb: &Skb, outer: &Outer, segment: TcpSegment, verdict: u8, action: u8) {
    let Some(told) = FOLLOWED.get_ptr_mut(segment.flow) else { return };
    // SAFETY: a value that is deleted is not reused before the program is done (RCU).
    let told = unsafe { &mut *told };
    let is_syn = segment.flags & TcpSegment::SYN != 0;
    if is_broken(verdict) && !Action::writes(action) {
        if is_syn {
            *told += 1;
        }
        return;
    }
    if is_syn && *told & SYN_TOLD != 0 {
        return;
    }
    let Some(mut draft) = Draft::new() else { return };
    let out = draft.as_mut_ptr();
    let finding = Finding {
        verdict: Verdict::Valid,
        proof: Proof::None,
        policy: Policy::Unknown,
        is_ipv6: outer.at.is_ipv6,
        udp: outer.at.udp,
        check: outer.check,
        expected: 0,
        source_port_before_nat: 0,
    };
    // SAFETY: `out` is valid for a whole `Event`, and each field is written before it is sent.
    unsafe {
        broken::write(out, skb, &finding);
        (*out).verdict = verdict;
        (*out).action = action;
        (*out).is_followed = 1;
        (*out).held_back = *told & !SYN_TOLD;
    }
    if !draft.send(skb.ctx) {
        return;
    }
    if is_syn {
        *told |= SYN_TOLD;
    } else {
        // Fails only where another CPU was first.
        let _ = FOLLOWED.remove(segment.flow);
    }
}

#[inline(always)]
const fn is_broken(verdict: u8) -> bool {
    verdict >= Verdict::MangledZero as u8 && verdict <= Verdict::Bad as u8
}
