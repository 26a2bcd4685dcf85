//! Matrices spread over a warp: `ldmatrix`, `stmatrix`, `movmatrix`, `mma.sync`.
//!
//! Products are exact and sums are made in double precision and rounded once. Devices add in an order, and with a
//! precision, that is not specified: results of floating-point types differ in their last bits.

use super::access::count_banks;
use super::warp::Warp;
use super::wgmma::Wgmma;
use super::{Block, Fault, Flow, Step};
use crate::arith::convert::small_of;
use crate::arith::small_float::{F16, Rounding};
use crate::code::{Address, Reg, Src};
use crate::error::{Access, ErrorKind};
use crate::lanes::{Lanes, WARP, each};
use crate::memory::Space;
use crate::shared::Who;
use crate::types::{Type, sign_extend, truncate};

#[derive(Debug, Clone)]
pub(crate) enum TensorOp {
    /// As many 8x8 matrices of 16-bit elements as there are registers.
    Load {
        into: Vec<Reg>,
        from: Address,
        transposed: bool,
    },
    Store {
        from: Vec<Src>,
        into: Address,
        transposed: bool,
    },
    /// Transposes an 8x8 matrix in place.
    Transpose {
        into: Reg,
        from: Src,
    },
    Mma(Mma),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        groups: u64,
    },
    Wgmma(Wgmma),
}

/// `mma.sync` of 16 rows and 8 columns.
#[derive(Debug, Clone)]
pub(crate) struct Mma {
    pub(crate) depth: usize,
    pub(crate) d: Vec<Reg>,
    pub(crate) a: Vec<Src>,
    pub(crate) b: Vec<Src>,
    pub(crate) c: Vec<Src>,
    pub(crate) a_type: Type,
    pub(crate) b_type: Type,
    /// Of `c` and `d`.
    pub(crate) sum_type: Type,
    pub(crate) saturate: bool,
}

/// The values of the elements in a register, exactly, from the lowest.
pub(crate) fn elements(ty: Type, word: u64) -> ([f64; 8], usize) {
    let mut out = [0.0; 8];
    let bits = ty.bits();
    let n = 32 / bits as usize;
    match ty {
        // The formats of most products, without the tests of the others.
        Type::Bf16 => {
            out[0] = f64::from(f32::from_bits((word as u32) << 16));
            out[1] = f64::from(f32::from_bits(word as u32 & 0xffff_0000));
        }
        Type::S8 => {
            for (out, byte) in out.iter_mut().zip((word as u32).to_le_bytes()) {
                *out = f64::from(byte as i8);
            }
        }
        _ => {
            for (i, out) in out.iter_mut().enumerate().take(n) {
                *out = element(ty, word >> (i as u32 * bits));
            }
        }
    }
    (out, n)
}

/// The value of one element.
fn element(ty: Type, bits: u64) -> f64 {
    let bits = truncate(bits, ty.bits());
    match ty {
        Type::F16 => f64::from(crate::arith::half_float::f16_value(bits as u16)),
        Type::Bf16 => f64::from(crate::arith::half_float::bf16_value(bits as u16)),
        // The lower bits are not looked at.
        Type::Tf32 => f64::from(f32::from_bits(bits as u32 & !0x1fff)),
        _ if ty.is_float() => small_of(ty).map_or(f64::NAN, |s| s.decode(bits as u32)),
        _ if ty.is_signed() => sign_extend(bits, ty.bits()) as i64 as f64,
        _ => bits as f64,
    }
}

/// A sum as its register holds it.
pub(crate) fn encode_sum(ty: Type, sum: f64, saturate: bool) -> u64 {
    match ty {
        Type::F32 => u64::from((sum as f32).to_bits()),
        Type::F16 => u64::from(F16.encode(sum, Rounding::Nearest, false)),
        // Sums of integers are exact in a double, and wrap around.
        _ if saturate => u64::from((sum as i64).clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u32),
        _ => truncate(sum as i64 as u64, 32),
    }
}

/// The value of a sum in its register.
pub(crate) fn decode_sum(ty: Type, bits: u64) -> f64 {
    match ty {
        Type::F32 => f64::from(f32::from_bits(bits as u32)),
        Type::F16 => F16.decode(bits as u32 & 0xffff),
        _ => f64::from(bits as u32 as i32),
    }
}

/// Row and first column of register `q` of a fragment of A, or of the rows of a warp of `wgmma`, for elements of which a
/// register holds `per`.
pub(crate) fn a_place(lane: usize, q: usize, per: usize) -> (usize, usize) {
    (lane / 4 + (q & 1) * 8, lane % 4 * per + (q >> 1) * 4 * per)
}

/// Columns of B, which all instructions here have.
const COLUMNS: usize = 8;
/// Deepest product, of 4-bit elements.
const DEEPEST: usize = 64;

impl Block<'_> {
    pub(crate) fn tensor(&mut self, warp: &mut Warp, op: &TensorOp, mask: u32, line: u32) -> Step {
        // All instructions here are `.aligned`: the whole warp executes them, without lanes that have ended.
        if warp.alive != !0 {
            return Err(Fault(
                ErrorKind::Divergent {
                    what: "a matrix instruction".to_owned(),
                    active: mask,
                    alive: warp.alive,
                },
                None,
            ));
        }
        if !self.gathered(warp, mask, !0, "a matrix instruction")? {
            return Ok(Flow::Stalled);
        }
        match op {
            TensorOp::Load { into, from, transposed } => {
                self.load_matrices(warp, into, *from, *transposed)?
            }
            TensorOp::Store { from, into, transposed } => {
                self.store_matrices(warp, from, *into, *transposed)?;
            }
            TensorOp::Transpose { into, from } => {
                let mut scratch = [0; WARP];
                let values = *warp.get(&self.fixed, *from, mask, &mut scratch)?;
                let mut out = [0; WARP];
                for (lane, out) in out.iter_mut().enumerate() {
                    // Element (r, c) is in lane 4r + c/2.
                    let at = |r: usize, c: usize| truncate(values[r * 4 + c / 2] >> (16 * (c % 2)), 16);
                    let (r, c) = (lane / 4, lane % 4 * 2);
                    *out = at(c, r) | at(c + 1, r) << 16;
                }
                warp.set(*into, mask, &out);
            }
            TensorOp::Mma(mma) => self.mma(warp, mma)?,
            TensorOp::WgmmaFence => warp.pipeline.fence(),
            TensorOp::WgmmaCommit => warp.pipeline.commit(),
            TensorOp::WgmmaWait { groups } => self.wgmma_wait(warp, *groups)?,
            TensorOp::Wgmma(wgmma) => self.wgmma(warp, wgmma, line)?,
        }
        Ok(Flow::Next)
    }

    /// Addresses of the rows of `n` matrices: lanes `8q` to `8q + 7` give those of matrix `q`.
    fn rows(&mut self, warp: &Warp, address: Address, n: usize, access: Access) -> Result<Lanes, Fault> {
        let used = if n == 4 { !0 } else { (1u32 << (8 * n)) - 1 };
        let addresses = self.addresses(warp, address, used)?.map(|a| a & 0xffff_ffff);
        for lane in each(used) {
            let address = addresses[lane];
            if !address.is_multiple_of(16) {
                let kind =
                    ErrorKind::Misaligned { access, space: Space::Shared, len: 16, align: 16, address };
                return Err(Fault(kind, Some(lane)));
            }
        }
        let traffic = match access {
            Access::Read => &mut self.stats.shared_read,
            _ => &mut self.stats.shared_written,
        };
        // Eight rows of sixteen bytes go at a time, which is what a quarter of the lanes would ask for.
        count_banks(traffic, &addresses, used, 16);
        Ok(addresses)
    }

    fn load_matrices(
        &mut self,
        warp: &mut Warp,
        into: &[Reg],
        from: Address,
        transposed: bool,
    ) -> Result<(), Fault> {
        let rows = self.rows(warp, from, into.len(), Access::Read)?;
        for (q, into) in into.iter().enumerate() {
            let mut matrix = [[0u16; 8]; 8];
            for (r, row) in matrix.iter_mut().enumerate() {
                let lane = q * 8 + r;
                let who = Who { warp: warp.index as u8, lane: lane as u8 };
                let bytes = self.shared.load(who, rows[lane], 16).map_err(|kind| Fault(kind, Some(lane)))?;
                for (element, bytes) in row.iter_mut().zip(bytes.chunks_exact(2)) {
                    *element = u16::from_le_bytes([bytes[0], bytes[1]]);
                }
            }
            let mut out = [0; WARP];
            for (lane, out) in out.iter_mut().enumerate() {
                let (r, c) = (lane / 4, lane % 4 * 2);
                let (low, high) = if transposed {
                    (matrix[c][r], matrix[c + 1][r])
                } else {
                    (matrix[r][c], matrix[r][c + 1])
                };
                *out = u64::from(high) << 16 | u64::from(low);
            }
            warp.set(*into, !0, &out);
        }
        Ok(())
    }

    fn store_matrices(
        &mut self,
        warp: &Warp,
        from: &[Src],
        into: Address,
        transposed: bool,
    ) -> Result<(), Fault> {
        let rows = self.rows(warp, into, from.len(), Access::Write)?;
        for (q, from) in from.iter().enumerate() {
            let mut scratch = [0; WARP];
            let values = *warp.get(&self.fixed, *from, !0, &mut scratch)?;
            let mut matrix = [[0u16; 8]; 8];
            for (lane, value) in values.iter().enumerate() {
                let (r, c) = (lane / 4, lane % 4 * 2);
                for (i, half) in [*value as u16, (*value >> 16) as u16].into_iter().enumerate() {
                    let (r, c) = if transposed { (c + i, r) } else { (r, c + i) };
                    matrix[r][c] = half;
                }
            }
            for (r, row) in matrix.iter().enumerate() {
                let lane = q * 8 + r;
                let who = Who { warp: warp.index as u8, lane: lane as u8 };
                let bytes: Vec<u8> = row.iter().flat_map(|e| e.to_le_bytes()).collect();
                self.shared
                    .store(who, Access::Write, rows[lane], &bytes)
                    .map_err(|kind| Fault(kind, Some(lane)))?;
            }
        }
        Ok(())
    }

    fn mma(&mut self, warp: &mut Warp, mma: &Mma) -> Result<(), Fault> {
        let mut a = [[0f64; DEEPEST]; 16];
        let mut b = [[0f64; COLUMNS]; DEEPEST];
        for (q, src) in mma.a.iter().enumerate() {
            let mut scratch = [0; WARP];
            for (lane, value) in warp.get(&self.fixed, *src, !0, &mut scratch)?.iter().enumerate() {
                let (values, per) = elements(mma.a_type, *value);
                let (row, column) = a_place(lane, q, per);
                a[row][column..column + per].copy_from_slice(&values[..per]);
            }
        }
        for (q, src) in mma.b.iter().enumerate() {
            let mut scratch = [0; WARP];
            for (lane, value) in warp.get(&self.fixed, *src, !0, &mut scratch)?.iter().enumerate() {
                let (values, per) = elements(mma.b_type, *value);
                let k = lane % 4 * per + q * 4 * per;
                for (row, value) in b[k..k + per].iter_mut().zip(values) {
                    row[lane / 4] = value;
                }
            }
        }
        let mut sums = [[0f64; COLUMNS]; 16];
        let packed = mma.sum_type == Type::F16;
        // Register and half of a sum, for each of a lane's four.
        let slot = |i: usize| if packed { (i / 2, i % 2 * 16) } else { (i, 0) };
        let place = |lane: usize, i: usize| (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
        for i in 0..4 {
            let (q, shift) = slot(i);
            let mut scratch = [0; WARP];
            for (lane, value) in warp.get(&self.fixed, mma.c[q], !0, &mut scratch)?.iter().enumerate() {
                let (row, column) = place(lane, i);
                sums[row][column] = decode_sum(mma.sum_type, value >> shift);
            }
        }
        for (a, sums) in a.iter().zip(&mut sums) {
            for (a, b) in a.iter().zip(&b).take(mma.depth) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += a * b;
                }
            }
        }
        let mut out = [[0u64; WARP]; 4];
        for i in 0..4 {
            let (q, shift) = slot(i);
            for (lane, out) in out[q].iter_mut().enumerate() {
                let (row, column) = place(lane, i);
                *out |= encode_sum(mma.sum_type, sums[row][column], mma.saturate) << shift;
            }
        }
        for (into, values) in mma.d.iter().zip(&out) {
            warp.set(*into, !0, values);
        }
        self.stats.matrix_macs += 16 * COLUMNS as u64 * mma.depth as u64;
        Ok(())
    }
}
