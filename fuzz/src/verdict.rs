//! The parser and the verdict: any bytes, with any knowledge of their sender.

use vxcsum_common::fix::remedy;
use vxcsum_common::layout::{Action, FixMode, MASQUERADE_MARK};
use vxcsum_common::outer::{Location, locate};
use vxcsum_common::{Captured, Examined, Finding, Offload, Policy, Proof, Verdict, examine};
use vxcsum_tests::packets::UDP_CHECK;
use vxcsum_tests::scene::Scene;
use vxcsum_tests::second_opinion::{Opinion, opinion};

/// Offset of what a UDP checksum is for, in bytes from its header.
const UDP_LEN: usize = 8;

/// Checks a scene ([`Scene`]).
pub fn check(data: &[u8]) {
    let Some(scene) = Scene::read(data) else { return };
    assert_eq!(Scene::read(&scene.to_bytes()).map(|it| it.to_bytes()), Some(scene.to_bytes()));
    let packet = packet(&scene);
    let known = &scene.case.known;
    if let Ok(Some((at, _))) = locate(&packet, known)
        && u16::try_from(packet.len).is_ok()
    {
        assert_eq!(Location::from_bits(at.to_bits()), at, "as the BPF program hands it on");
        assert!(at.ip < at.udp && at.udp + UDP_LEN <= packet.bytes.len());
    }
    let examined = examine(&packet, known);
    if let Examined::Vxlan(finding, _) = &examined {
        finding_holds(&scene, &packet, finding);
    }
    if scene.missing == 0
        && let Some(opinion) = opinion(&scene.case, scene.offload)
    {
        let Examined::Vxlan(finding, _) = examined else {
            panic!("{opinion:?}, but {examined:?}");
        };
        let is_broken = finding.verdict.is_broken();
        let found = Opinion {
            verdict: finding.verdict,
            expected: if is_broken { finding.expected } else { 0 },
            proof: finding.proof,
            source_port_before_nat: finding.source_port_before_nat,
        };
        assert_eq!(found, opinion, "{finding:?}");
    }
}

fn packet(scene: &Scene) -> Captured<'_> {
    let Scene { case, offload, missing } = scene;
    let bytes = &case.frame.bytes;
    Captured {
        len: bytes.len() + missing,
        is_raw_ip: case.frame.is_raw_ip,
        is_gso: case.segments > 1,
        offload: *offload,
        flow_hash: case.hash,
        arithmetic_proves_nat: case.mark & MASQUERADE_MARK != 0,
        ..Captured::new(bytes)
    }
}

fn finding_holds(scene: &Scene, packet: &Captured<'_>, finding: &Finding) {
    let Finding { verdict, proof, policy, check, expected, source_port_before_nat, .. } = *finding;
    let field = finding.udp + UDP_CHECK;
    assert_eq!(check.to_be_bytes(), packet.bytes[field..field + 2]);
    assert_eq!(verdict == Verdict::StaleNat, proof != Proof::None);
    assert!(source_port_before_nat == 0 || verdict == Verdict::StaleNat);
    let is_without = matches!(verdict, Verdict::Zero | Verdict::Missing);
    assert!(if check == 0 { is_without || verdict == Verdict::Unverified } else { !is_without });
    assert!(verdict != Verdict::MangledZero || policy == Policy::Zero);
    assert!(!verdict.is_broken() || policy != Policy::Zero || verdict == Verdict::MangledZero);
    assert!(check != expected || check == 0, "what is right is not wrong");
    for mode in FixMode::ALL {
        for unproven in [false, true] {
            remedy_holds(mode, unproven, finding);
        }
    }
    // An open sum that begins within the UDP header is nothing that a kernel has.
    let is_sane =
        !matches!(scene.offload, Offload::Partial { start, .. } if start < finding.udp + UDP_LEN);
    if expected != 0 && is_sane {
        let mut mended = packet.bytes.to_vec();
        mended[field..field + 2].copy_from_slice(&expected.to_be_bytes());
        let mended = Captured { bytes: &mended, ..*packet };
        match examine(&mended, &scene.case.known) {
            Examined::Vxlan(
                Finding { verdict: Verdict::Valid | Verdict::OffloadPending, .. },
                _,
            ) => {}
            other => panic!("{other:?} with the expected sum in place, after {finding:?}"),
        }
    }
}

fn remedy_holds(mode: FixMode, unproven: bool, finding: &Finding) {
    if !finding.verdict.is_broken() {
        return;
    }
    let remedy = remedy(mode, unproven, finding);
    let is_zero_device = finding.verdict == Verdict::MangledZero;
    match remedy.action {
        Action::None => assert_eq!(mode, FixMode::Off),
        Action::Zeroed => {
            assert_eq!((mode, remedy.check, finding.is_ipv6), (FixMode::Zero, 0, false));
        }
        Action::Restored => {
            let meant = if is_zero_device { 0 } else { finding.expected };
            assert_eq!((mode, remedy.check), (FixMode::Restore, meant));
            assert!(is_zero_device || finding.expected != 0);
        }
        _ => assert!(!remedy.writes() && mode != FixMode::Off),
    }
    assert!(!remedy.writes() || unproven || finding.verdict != Verdict::Bad);
}
