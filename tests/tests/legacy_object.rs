//! What is in the BPF object for old kernels: nothing that Linux 4.19 does not know.
//!
//! The tables are those of v4.19: `include/uapi/linux/bpf.h`, `tc_cls_act_func_proto` and
//! `tc_cls_act_is_valid_access` in net/core/filter.c, `check_cfg` in kernel/bpf/verifier.c. How far
//! its verifier walks cannot be told here, only whether a later one walks further than it did of an
//! object that 4.19.118 took.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what these tests are made of fails as they do, by a panic"
)]

use std::collections::{BTreeMap, BTreeSet, HashSet};

use aya_obj::generated::bpf_insn;
use aya_obj::{EbpfSectionKind, Object};
use vxcsum::program::{LEGACY_OBJECT, LoadOptions, OBJECT, PROGRAM_NAME, Program};
use vxcsum::transport::Transport;

/// `BPF_MAXINSNS`.
const MAX_INSTRUCTIONS: usize = 4096;

/// What the verifiers of 6.12 to 7.2 walked, at the least, of an earlier object; that of 4.19.118 walked
/// 90,298 instructions of it, and allows 131,072.
const MAX_WALKED: u32 = 344_913;

/// Kinds of maps up to 4.19 (`enum bpf_map_type`): all before `BPF_MAP_TYPE_QUEUE`.
const MAP_TYPES: u32 = 22;
/// Map flags of 4.19 that a map of ours may have: `BPF_F_NO_PREALLOC`.
const MAP_FLAGS: u32 = 1;

/// What a TC program may call (`enum bpf_func_id`).
const HELPERS: [i32; 42] = [
    1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 17, 18, 19, 20, 21, 23, 24, 25, 26, 28, 29, 30, 31, 32,
    33, 34, 38, 39, 40, 41, 42, 46, 47, 48, 50, 66, 68, 69, 79, 83,
];

/// Where `data_end` ends in `struct __sk_buff`. Little of what follows was there in 4.19, and none of
/// that is of use.
const CONTEXT_END: i16 = 84;

/// Fields of an operation's code, and values of theirs (`include/uapi/linux/bpf_common.h`).
const CLASS: u8 = 0x07;
const OPERATION: u8 = 0xf0;
const MOVE: u8 = 0xb0;
const LD: u8 = 0x00;
const LDX: u8 = 0x01;
const ST: u8 = 0x02;
const STX: u8 = 0x03;
const ALU: u8 = 0x04;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const ALU64: u8 = 0x07;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const JA: u8 = 0x05;
const LD_IMM64: u8 = 0x18;
const MOVE_64: u8 = 0xbf;
const LOAD_64: u8 = 0x79;
const STORE_64: u8 = 0x7b;

/// Everything in an object that 4.19 does not take.
fn violations(object: &[u8]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut object = Object::parse(object).unwrap();
    if object.btf.is_some() || object.btf_ext.is_some() {
        found.insert("BTF".to_owned());
    }
    for (name, map) in &object.maps {
        if map.section_kind() != EbpfSectionKind::Maps {
            found.insert(format!("global data in {name}"));
        } else if map.map_type() >= MAP_TYPES || map.map_flags() & !MAP_FLAGS != 0 {
            let (kind, flags) = (map.map_type(), map.map_flags());
            found.insert(format!("map {name} of type {kind} with flags {flags:#x}"));
        }
    }
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    let maps: Vec<_> = object.maps.drain().collect();
    let references =
        maps.iter().enumerate().map(|(fd, (name, map))| (&**name, i32::try_from(fd).unwrap(), map));
    object.relocate_maps(references, &sections).unwrap();
    object.relocate_calls(&sections).unwrap();
    let program = &object.programs[PROGRAM_NAME];
    Code(&object.functions[&program.function_key()].instructions).look(&mut found);
    found
}

/// A program as it is loaded.
struct Code<'a>(&'a [bpf_insn]);

impl Code<'_> {
    /// Everything in it that 4.19 does not take.
    fn look(&self, found: &mut BTreeSet<String>) {
        if self.0.len() > MAX_INSTRUCTIONS {
            found.insert(format!("{} instructions", self.0.len()));
        }
        for at in self.starts() {
            found.extend(self.unknown(at));
        }
        for entry in self.entries() {
            self.walk(entry, found);
            self.look_at_context(entry, found);
        }
    }

    /// Where instructions start: some take two places.
    fn starts(&self) -> impl Iterator<Item = usize> {
        let mut next = 0;
        (0..self.0.len()).filter(move |&at| {
            let is_start = at == next;
            if is_start {
                next = self.after(at);
            }
            is_start
        })
    }

    fn after(&self, at: usize) -> usize {
        at + if self.0[at].code == LD_IMM64 { 2 } else { 1 }
    }

    /// Where functions start.
    fn entries(&self) -> BTreeSet<usize> {
        let calls = self.starts().filter(|&at| self.is_call_of_own(at));
        let callees = calls.map(|at| jump(at, self.0[at].imm));
        callees.chain([0]).collect()
    }

    fn is_call_of_own(&self, at: usize) -> bool {
        self.0[at].code == CALL && self.0[at].src_reg() == 1
    }

    /// What 4.19 does not know of an instruction.
    fn unknown(&self, at: usize) -> Option<String> {
        let instruction = &self.0[at];
        let (code, off, imm) = (instruction.code, instruction.off, instruction.imm);
        let source = instruction.src_reg();
        let mode = code & 0xe0;
        let operation = code & OPERATION;
        let is_known = match code & CLASS {
            // The number itself, or a map (BPF_PSEUDO_MAP_FD); not a place in a map's value.
            LD => code == LD_IMM64 && source <= 1,
            LDX | ST => mode == 0x60,
            // BPF_MEM, or BPF_XADD without its later relatives.
            STX => mode == 0x60 || (mode == 0xc0 && imm == 0),
            // Division by sign and extension by sign have an offset; BPF_END is 32-bit only.
            ALU => operation <= 0xd0 && off == 0,
            ALU64 => operation <= 0xc0 && off == 0,
            JMP if code == CALL => match source {
                0 => {
                    return (!HELPERS.contains(&imm)).then(|| format!("helper {imm}"));
                }
                source => source == 1,
            },
            JMP => operation <= 0xd0,
            JMP32 => return Some("JMP32".to_owned()),
            _ => false,
        };
        (!is_known).then(|| format!("instruction {code:#04x} source {source} off {off} imm {imm}"))
    }

    /// Where control may go on within a function.
    fn next(&self, at: usize) -> Vec<usize> {
        let instruction = &self.0[at];
        let target = || jump(at, instruction.off.into());
        match (instruction.code, instruction.code & CLASS) {
            (EXIT, _) => Vec::new(),
            (JA, _) => vec![target()],
            (CALL, _) => vec![at + 1],
            (_, JMP | JMP32) => vec![at + 1, target()],
            _ => vec![self.after(at)],
        }
    }

    /// As `check_cfg`: no way leads back to where it has been.
    fn walk(&self, entry: usize, found: &mut BTreeSet<String>) {
        let mut is_done = BTreeMap::new();
        let mut path = vec![(entry, self.next(entry))];
        is_done.insert(entry, false);
        while let Some((at, left)) = path.last_mut() {
            let Some(next) = left.pop() else {
                is_done.insert(*at, true);
                path.pop();
                continue;
            };
            match is_done.get(&next) {
                Some(false) => _ = found.insert("a loop".to_owned()),
                Some(true) => {}
                None => {
                    is_done.insert(next, false);
                    path.push((next, self.next(next)));
                }
            }
        }
    }

    /// Every function has the context as its first argument, and gets it by no other: follows it
    /// through registers and stack to where something is read from it.
    fn look_at_context(&self, entry: usize, found: &mut BTreeSet<String>) {
        let mut known: BTreeMap<usize, BTreeSet<Place>> = BTreeMap::new();
        let mut left = vec![(entry, BTreeSet::from([Place::Register(1)]))];
        while let Some((at, places)) = left.pop() {
            let before = known.entry(at).or_default();
            if !before.is_empty() && places.is_subset(before) {
                continue;
            }
            before.extend(places);
            let mut places = before.clone();
            found.extend(self.of_context(at, &places));
            self.step(at, &mut places);
            left.extend(self.next(at).into_iter().map(|next| (next, places.clone())));
        }
    }

    /// Moves the context to where an instruction moves it.
    fn step(&self, at: usize, places: &mut BTreeSet<Place>) {
        const STACK: u8 = 10;
        let instruction = &self.0[at];
        let (to, from) = (instruction.dst_reg(), instruction.src_reg());
        let copied = match instruction.code {
            MOVE_64 => Some((Place::Register(from), Place::Register(to))),
            LOAD_64 if from == STACK => Some((Place::Stack(instruction.off), Place::Register(to))),
            STORE_64 if to == STACK => Some((Place::Register(from), Place::Stack(instruction.off))),
            _ => None,
        };
        match (copied, instruction.code & CLASS) {
            (Some((from, to)), _) if places.contains(&from) => _ = places.insert(to),
            (Some((_, to)), _) => _ = places.remove(&to),
            (None, LD | LDX | ALU | ALU64) => _ = places.remove(&Place::Register(to)),
            (None, JMP) if instruction.code == CALL => {
                (0..=5).for_each(|register| _ = places.remove(&Place::Register(register)));
            }
            _ => {}
        }
    }

    /// What 4.19 does not have of what an instruction reads from the context, and whatever would
    /// take the context out of sight here.
    fn of_context(&self, at: usize, places: &BTreeSet<Place>) -> Option<String> {
        let instruction = &self.0[at];
        let off = instruction.off;
        let is_context = |register| places.contains(&Place::Register(register));
        match instruction.code & CLASS {
            JMP if self.is_call_of_own(at) => (!is_context(1) || (2..=5).any(is_context))
                .then(|| "a call with the context as another argument than the first".to_owned()),
            ALU | ALU64 if instruction.code & OPERATION != MOVE => {
                is_context(instruction.dst_reg()).then(|| "arithmetic on the context".to_owned())
            }
            LDX if is_context(instruction.src_reg()) => {
                (!(0..CONTEXT_END).contains(&off)).then(|| format!("__sk_buff at {off}"))
            }
            ST | STX if is_context(instruction.dst_reg()) => {
                Some(format!("writes __sk_buff at {off}"))
            }
            _ => None,
        }
    }
}

/// Distances count from the next instruction.
fn jump(at: usize, distance: i32) -> usize {
    (at + 1).checked_add_signed(isize::try_from(distance).unwrap()).unwrap()
}

/// Where a pointer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Register(u8),
    /// By the offset from the frame pointer.
    Stack(i16),
}

#[test]
fn the_object_for_old_kernels_has_nothing_that_4_19_does_not_know() {
    let found = violations(LEGACY_OBJECT);
    assert!(found.is_empty(), "{found:#?}");
}

/// The same look finds what there is in the other one.
#[test]
fn what_4_19_does_not_know_is_found() {
    /// Offsets in `struct __sk_buff`.
    const WIRE_LEN: usize = 160;
    const GSO_SEGS: usize = 164;
    let found = violations(OBJECT);
    for expected in [
        "BTF",
        "global data in .rodata",
        // bpf_probe_read_kernel, bpf_ktime_get_boot_ns, bpf_ringbuf_reserve, bpf_ringbuf_submit.
        "helper 113",
        "helper 125",
        "helper 131",
        "helper 132",
        "a loop",
    ] {
        assert!(found.contains(expected), "{expected} is not in {found:#?}");
    }
    for field in [GSO_SEGS, WIRE_LEN] {
        assert!(found.contains(&format!("__sk_buff at {field}")), "{field} is not in {found:#?}");
    }
    assert!(found.iter().any(|it| it.starts_with("map EVENTS of type 27")), "{found:#?}");
}

/// The same look finds what the compiler has not made of our source so far.
#[test]
fn what_4_19_does_not_know_is_found_wherever_it_is() {
    /// Code, destination, source, offset, number.
    type Instruction = (u8, u8, u8, i16, i32);
    const EXIT_: Instruction = (EXIT, 0, 0, 0, 0);
    const LOAD_GSO_SIZE_INTO_0: fn(u8) -> Instruction = |from| (0x61, 0, from, 176, 0);
    const FRAME: u8 = 10;
    let found = |code: &[Instruction]| {
        let instruction = |&(code, to, from, off, imm): &Instruction| {
            let registers = bpf_insn::new_bitfield_1(to, from);
            bpf_insn { code, _bitfield_align_1: [], _bitfield_1: registers, off, imm }
        };
        let code: Vec<_> = code.iter().map(instruction).collect();
        let mut found = BTreeSet::new();
        Code(&code).look(&mut found);
        found.into_iter().collect::<Vec<_>>()
    };
    let nothing = (0xb7, 0, 0, 0, 0);
    assert_eq!(found(&[nothing, EXIT_]), [""; 0]);
    assert_eq!(found(&[vec![nothing; MAX_INSTRUCTIONS - 1], vec![EXIT_]].concat()), [""; 0]);
    assert_eq!(
        found(&[vec![nothing; MAX_INSTRUCTIONS], vec![EXIT_]].concat()),
        ["4097 instructions"]
    );
    // if w0 == 0; if r0 == 0, backwards; goto backwards.
    assert_eq!(found(&[nothing, (0x16, 0, 0, 0, 0), EXIT_]), ["JMP32"]);
    assert_eq!(found(&[nothing, (0x15, 0, 0, -2, 0), EXIT_]), ["a loop"]);
    assert_eq!(found(&[nothing, (JA, 0, 0, -2, 0)]), ["a loop"]);
    // bpf_ringbuf_output; a place in a map's value; a fetch_add.
    assert_eq!(found(&[(CALL, 0, 0, 0, 130), EXIT_]), ["helper 130"]);
    for unknown in [(LD_IMM64, 1, 2, 0, 0), (0xdb, FRAME, 1, -8, 1)] {
        let rest = [(0, 0, 0, 0, 0), EXIT_];
        let rest = if unknown.0 == LD_IMM64 { &rest[..] } else { &rest[1..] };
        let found = found(&[&[unknown], rest].concat());
        assert!(found.len() == 1 && found[0].starts_with("instruction "), "{found:?}");
    }
    // The context by its own register, by a copy, from the stack, and where it is out of sight.
    let copy = (MOVE_64, 7, 1, 0, 0);
    let (store, load) = ((STORE_64, FRAME, 1, -8, 0), (LOAD_64, 8, FRAME, -8, 0));
    for way in [
        &[LOAD_GSO_SIZE_INTO_0(1)][..],
        &[copy, LOAD_GSO_SIZE_INTO_0(7)],
        &[store, load, LOAD_GSO_SIZE_INTO_0(8)],
    ] {
        assert_eq!(found(&[way, &[EXIT_]].concat()), ["__sk_buff at 176"]);
    }
    assert_eq!(found(&[(0x07, 1, 0, 0, 176), EXIT_]), ["arithmetic on the context"]);
    let call = (CALL, 0, 1, 0, 1);
    let second = found(&[(MOVE_64, 2, 1, 0, 0), call, EXIT_, nothing, EXIT_]);
    assert_eq!(second, ["a call with the context as another argument than the first"]);
    assert_eq!(found(&[call, EXIT_, LOAD_GSO_SIZE_INTO_0(1), EXIT_]), ["__sk_buff at 176"]);
}

/// That of 4.19 prunes at every jump and is done sooner; from 5.2 on a million may be walked.
#[test]
fn the_verifier_walks_no_further_than_it_did_when_4_19_took_the_object() {
    let options = LoadOptions { transport: Transport::Perf, ..LoadOptions::default() };
    let (mut program, _events) = Program::load(&options).unwrap();
    let walked = program.classifier().unwrap().info().unwrap().verified_instruction_count();
    // Kernels before 5.16 do not tell.
    assert!(walked.is_none_or(|walked| walked <= MAX_WALKED), "{walked:?}");
}
