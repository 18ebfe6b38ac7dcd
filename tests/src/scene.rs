//! A packet with all that is known of it and of its sender, in a row of bytes: what fuzz targets start
//! from. Any bytes are a scene.

use bytemuck::{Pod, Zeroable};
use vxcsum_common::layout::{ANY_VNI, DeviceKey, FixMode, MASQUERADE_MARK, Port};
use vxcsum_common::{Device, Offload};

use crate::cases::{Case, Expected, Known};
use crate::packets::Frame;

/// What stands before the packet.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Head {
    flags: u8,
    fix: u8,
    offload: u8,
    segments: u8,
    /// `csum_start`, in bytes from the start of the packet, and `csum_offset`.
    open: [u16; 2],
    /// Bytes of the packet that were not captured.
    missing: u16,
    reserved: u16,
    hash: u32,
    port: Port,
    device: Device,
}

const IS_RAW_IP: u8 = 1;
const IS_MARKED: u8 = 2;
const FIX_UNPROVEN: u8 = 4;
const HAS_DEVICE: u8 = 8;

/// A case, the state of its sums, and how many of its bytes were not captured.
#[derive(Debug, Clone)]
pub struct Scene {
    /// The packet and its surroundings, without what is to come out.
    pub case: Case,
    /// The state of its sums.
    pub offload: Offload,
    /// How many of its last bytes were not captured.
    pub missing: usize,
}

impl Scene {
    /// Reads a scene; none where there are too few bytes for what stands before the packet.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let (head, packet) = bytes.split_at_checked(size_of::<Head>())?;
        let head: Head = bytemuck::pod_read_unaligned(head);
        let is = |flag| head.flags & flag != 0;
        let frame = Frame {
            bytes: packet.to_vec(),
            finished: packet.to_vec(),
            boundaries: Vec::new(),
            ip: 0,
            udp: 0,
            open: None,
            is_raw_ip: is(IS_RAW_IP),
        };
        // Of one port, so that most bytes say something.
        let port = Port { port: head.port.port.max(1), ..head.port };
        let key = DeviceKey { vni: ANY_VNI, port: port.port.into() };
        let devices = if is(HAS_DEVICE) { vec![(key, head.device)] } else { Vec::new() };
        let mut case = Case::new(String::new(), frame, Expected::NotVxlan);
        case.known = Known { ports: vec![port], devices };
        case.fix = FixMode::from_u8(head.fix % 3);
        case.fix_unproven = is(FIX_UNPROVEN);
        case.mark = if is(IS_MARKED) { MASQUERADE_MARK } else { 0 };
        case.segments = head.segments.max(1).into();
        case.hash = head.hash;
        let [start, offset] = head.open.map(usize::from);
        let offload = match head.offload % 3 {
            0 => Offload::Unknown,
            1 => Offload::Complete,
            _ => Offload::Partial { start, field: start + offset },
        };
        Some(Self { case, offload, missing: head.missing.into() })
    }

    /// The bytes of a scene. Of several ports and devices, the first and the last are kept.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self { case, offload, missing } = self;
        let flag = |is: bool, flag: u8| if is { flag } else { 0 };
        let device = case.known.devices.last().map(|(_, device)| *device);
        let (offload, open) = match *offload {
            Offload::Unknown => (0, [0; 2]),
            Offload::Complete => (1, [0; 2]),
            Offload::Partial { start, field } => (2, [start as u16, (field - start) as u16]),
        };
        let head = Head {
            flags: flag(case.frame.is_raw_ip, IS_RAW_IP)
                | flag(case.mark & MASQUERADE_MARK != 0, IS_MARKED)
                | flag(case.fix_unproven, FIX_UNPROVEN)
                | flag(device.is_some(), HAS_DEVICE),
            fix: case.fix as u8,
            offload,
            segments: case.segments.min(255) as u8,
            open,
            missing: *missing as u16,
            reserved: 0,
            hash: case.hash,
            port: case.known.ports.first().copied().unwrap_or_default(),
            device: device.unwrap_or(Device::UNKNOWN),
        };
        [bytemuck::bytes_of(&head), &case.frame.bytes].concat()
    }
}
