//! A kernel, its arguments, and what must come out, as the scalar reference says.

use attar_artifact::manifest::KvType;
use attar_kernel::{KernelSpec, reference};

/// One argument slot.
#[derive(Clone, Debug)]
pub(crate) enum Arg {
    Number(u64),
    /// Read only.
    Input(Vec<u8>),
    /// Written; starts with these bytes.
    Output(Vec<u8>, Check),
}

/// How an output is compared with the reference's.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Check {
    /// `|got - want| <= abs + rel * |want|`.
    F32 {
        abs: f32,
        rel: f32,
    },
    F16 {
        abs: f32,
        rel: f32,
    },
    Bytes,
    /// Blocks of a cache of codes. Codes may differ by `slack`; without slack scales must be equal too (all NaN are equal).
    Cache {
        kv: KvType,
        head_dim: usize,
        page_len: usize,
        slack: i32,
    },
    /// Rows of `stride` bytes of int8 codes and their scales and sums, see `ActInt8Layout`. Codes may differ by
    /// `slack` (one, where a value lies between two); without slack scales must be equal too (all NaN are equal).
    Int8 {
        dim: usize,
        slack: i32,
    },
}

/// A launch.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) spec: KernelSpec,
    pub(crate) args: Vec<Arg>,
    pub(crate) grid: u64,
}

/// The address of `values` as bytes of an input.
pub(crate) fn bytes_of<T: Copy>(values: &[T]) -> Vec<u8> {
    let len = std::mem::size_of_val(values);
    // SAFETY: plain numbers without padding, read as bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), len) }.to_vec()
}

pub(crate) fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

const GUARD: usize = 64;
const CANARY: u8 = 0xa5;

/// Bytes between canaries, at an address that is a multiple of 64 plus `skew`.
struct Guarded {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Guarded {
    fn new(bytes: &[u8], skew: usize) -> Guarded {
        let mut memory = vec![CANARY; bytes.len() + 3 * GUARD + skew];
        let address = memory.as_ptr() as usize + GUARD;
        let start = address.next_multiple_of(64) + skew - memory.as_ptr() as usize;
        memory[start..start + bytes.len()].copy_from_slice(bytes);
        Guarded { memory, start, len: bytes.len() }
    }

    fn address(&mut self) -> u64 {
        self.memory.as_mut_ptr() as u64 + self.start as u64
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    fn intact(&self) -> bool {
        let end = self.start + self.len;
        self.memory[..self.start].iter().chain(&self.memory[end..]).all(|b| *b == CANARY)
    }
}

impl Case {
    /// Address of argument `slot` modulo 64: packed weights are aligned to 64; of everything else kernels may only
    /// expect what its elements need.
    pub(crate) fn skew(&self, slot: usize) -> usize {
        match self.spec {
            KernelSpec::Linear(_) | KernelSpec::Embed { .. } if slot == 1 => 0,
            _ => 4,
        }
    }

    /// Calls `run` with the argument table and gives back every output's bytes.
    pub(crate) fn with_table(&self, run: impl FnOnce(&[u64])) -> Vec<Vec<u8>> {
        let mut buffers: Vec<Option<Guarded>> = self
            .args
            .iter()
            .enumerate()
            .map(|(i, arg)| match arg {
                Arg::Number(_) => None,
                Arg::Input(bytes) | Arg::Output(bytes, _) => Some(Guarded::new(bytes, self.skew(i))),
            })
            .collect();
        let table: Vec<u64> = self
            .args
            .iter()
            .zip(&mut buffers)
            .map(|(arg, buffer)| match (arg, buffer) {
                (Arg::Number(n), _) => *n,
                (_, Some(buffer)) => buffer.address(),
                (_, None) => unreachable!("buffers stand beside their arguments"),
            })
            .collect();
        run(&table);
        let mut outputs = Vec::new();
        for (i, (arg, buffer)) in self.args.iter().zip(&buffers).enumerate() {
            let Some(buffer) = buffer else { continue };
            assert!(buffer.intact(), "{}: written beyond argument {i}", self.spec.name());
            match arg {
                Arg::Input(bytes) => {
                    assert!(buffer.bytes() == bytes, "{}: input {i} written", self.spec.name());
                }
                _ => outputs.push(buffer.bytes().to_vec()),
            }
        }
        outputs
    }

    /// What the scalar reference writes.
    pub(crate) fn reference(&self) -> Vec<Vec<u8>> {
        // SAFETY: the arguments are made for the spec.
        self.with_table(|table| unsafe { reference::run(&self.spec, table, 0..self.grid) })
    }

    /// Panics when outputs differ from the reference's by more than they may.
    pub(crate) fn check(&self, what: &str, want: &[Vec<u8>], got: &[Vec<u8>]) {
        let checks = self.args.iter().filter_map(|a| match a {
            Arg::Output(_, check) => Some(*check),
            _ => None,
        });
        assert_eq!(want.len(), got.len());
        for (o, ((want, got), check)) in want.iter().zip(got).zip(checks).enumerate() {
            let at = format!("{what}: {}: output {o}", self.spec.name());
            assert_eq!(want.len(), got.len(), "{at}");
            match check {
                Check::Bytes => assert!(want == got, "{at} differs"),
                Check::F32 { abs, rel } => close(&at, &f32s(want), &f32s(got), abs, rel),
                Check::F16 { abs, rel } => {
                    let widen = |b: &[u8]| -> Vec<f32> {
                        let pairs = b.chunks_exact(2);
                        pairs.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
                    };
                    close(&at, &widen(want), &widen(got), abs, rel);
                }
                Check::Int8 { dim, slack } => int8_rows(&at, dim, slack, want, got),
                Check::Cache { kv, head_dim, page_len, slack } => {
                    let (codes, block) =
                        (kv.scales_offset(head_dim, page_len), kv.block_bytes(head_dim, page_len));
                    for (b, (want, got)) in want.chunks(block).zip(got.chunks(block)).enumerate() {
                        let at = format!("{at} block {b}");
                        let each = |bytes: &[u8]| cache_codes(kv, &bytes[..codes]);
                        int8_codes(&at, slack, &each(want), &each(got));
                        close(&at, &f32s(&want[codes..]), &f32s(&got[codes..]), 0.0, tolerance_of(slack));
                    }
                }
            }
        }
    }
}

fn close(at: &str, want: &[f32], got: &[f32], abs: f32, rel: f32) {
    for (i, (w, g)) in want.iter().zip(got).enumerate() {
        let same = w == g || (w.is_nan() && g.is_nan()) || (w - g).abs() <= abs + rel * w.abs();
        assert!(same, "{at} element {i}: want {w}, got {g}");
    }
}

/// Relative tolerance of scales: what leaves codes in doubt comes from a sum in another order, or from weights that were
/// rounded to 16 bits.
fn tolerance_of(slack: i32) -> f32 {
    if slack == 0 { 0.0 } else { 3e-4 }
}

/// The codes of a block, each in a byte.
pub(crate) fn cache_codes(kv: KvType, bytes: &[u8]) -> Vec<u8> {
    match kv {
        KvType::Int4 => bytes.iter().flat_map(|b| [b & 15, b >> 4]).collect(),
        _ => bytes.to_vec(),
    }
}

fn int8_codes(at: &str, slack: i32, want: &[u8], got: &[u8]) {
    for (k, (w, g)) in want.iter().zip(got).enumerate() {
        let far = (i32::from(*w as i8) - i32::from(*g as i8)).abs();
        assert!(far <= slack, "{at} code {k}: want {}, got {}", *w as i8, *g as i8);
    }
}

fn int8_rows(at: &str, dim: usize, slack: i32, want: &[u8], got: &[u8]) {
    let layout = attar_kernel::ActInt8Layout::new(dim);
    for (r, (want, got)) in want.chunks(layout.stride).zip(got.chunks(layout.stride)).enumerate() {
        let at = format!("{at} row {r}");
        let sums: Vec<i32> =
            got[..dim].chunks(32).map(|group| group.iter().map(|c| i32::from(*c as i8)).sum()).collect();
        int8_codes(&at, slack, &want[..dim], &got[..dim]);
        let scales = layout.scales_offset..layout.sums_offset;
        close(&at, &f32s(&want[scales.clone()]), &f32s(&got[scales]), 0.0, tolerance_of(slack));
        let stored = &got[layout.sums_offset..layout.sums_offset + 4 * layout.groups];
        assert!(stored == bytes_of(&sums), "{at}: sums do not belong to the codes");
    }
}

/// A deterministic source of test data (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in −1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn f32s(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * scale).collect()
    }
}
