//! `wgmma`: matrix products of four warps, with operands in shared memory.
//!
//! Each warp computes its sixteen rows when it issues the instruction. Until it waits for the group, the sums may not be
//! used and the operands, in shared memory or registers, not be overwritten.

use super::tensor::{a_place, decode_sum, elements, encode_sum};
use super::warp::Warp;
use super::{Block, Fault, Fixed};
use crate::code::{PredSrc, Reg, Src};
use crate::error::ErrorKind;
use crate::lanes::{Lanes, WARP};
use crate::shared::{ASYNC_LANE, Who};
use crate::types::Type;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// Operand A: four registers of a warp's rows, or a descriptor.
#[derive(Debug, Clone)]
pub(crate) enum Left {
    Registers(Vec<Src>),
    Shared(Src),
}

#[derive(Debug, Clone)]
pub(crate) struct Wgmma {
    pub(crate) columns: usize,
    pub(crate) d: Vec<Reg>,
    pub(crate) a: Left,
    pub(crate) b: Src,
    /// Whether `d` is added to.
    pub(crate) accumulate: PredSrc,
    pub(crate) accumulate_value: Option<Src>,
    pub(crate) a_type: Type,
    pub(crate) b_type: Type,
    pub(crate) sum_type: Type,
    pub(crate) negate_a: bool,
    pub(crate) negate_b: bool,
    pub(crate) transpose_a: bool,
    pub(crate) transpose_b: bool,
    pub(crate) saturate: bool,
}

/// A product under way.
#[derive(Debug, Clone)]
struct InFlight {
    registers: Vec<Reg>,
    /// Registers it reads, with what they held.
    left: Vec<(Reg, Lanes)>,
    /// Pieces of shared memory it reads, of sixteen bytes.
    reads: Vec<u64>,
    line: u32,
}

/// The products of a warp that are not waited for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pipeline {
    open: Vec<InFlight>,
    groups: VecDeque<Vec<InFlight>>,
    /// Registers that products will write, with the line of the last.
    busy: FxHashMap<Reg, u32>,
    fenced: bool,
    /// How many were issued, and a digest of their lines: equal in the warps of a warpgroup.
    issued: (u64, u64),
}

impl Pipeline {
    pub(crate) fn fence(&mut self) {
        self.fenced = true;
    }

    pub(crate) fn commit(&mut self) {
        let group = std::mem::take(&mut self.open);
        self.groups.push_back(group);
    }

    /// Why a register that nobody has written is not to be read.
    #[cold]
    pub(crate) fn unwritten(&self, fixed: &Fixed<'_>, reg: Reg) -> ErrorKind {
        match self.busy.get(&reg) {
            Some(&line) => ErrorKind::RegisterPending { register: fixed.register(reg), line },
            None => fixed.unwritten_register(reg),
        }
    }

    /// Products a warp that ends has not waited for.
    pub(crate) fn forgotten(&self) -> Option<String> {
        let products = self.open.iter().chain(self.groups.iter().flatten());
        let lines: Vec<u32> = products.map(|p| p.line).collect();
        lines.first().map(|line| format!("{} wgmma products, the first of line {line},", lines.len()))
    }

    pub(crate) fn issued(&self) -> (u64, u64) {
        self.issued
    }
}

/// A matrix in shared memory, as a descriptor says.
struct Matrix {
    start: u64,
    leading: u64,
    stride: u64,
    /// Bytes of a swizzled row: 128, 64 or 32; 16 where nothing is swizzled.
    row: u64,
    /// Elements of 16 bytes.
    per_piece: usize,
    /// Rows run along the memory instead of the depth.
    transposed: bool,
}

impl Matrix {
    fn of(descriptor: u64, element_bytes: usize, transposed: bool) -> Result<Matrix, ErrorKind> {
        let field = |at: u32| ((descriptor >> at) & 0x3fff) << 4;
        if descriptor >> 49 & 7 != 0 {
            return Err(ErrorKind::Unsupported("a matrix descriptor with a base offset".to_owned()));
        }
        let row = match descriptor >> 62 {
            0 => 16,
            1 => 128,
            2 => 64,
            _ => 32,
        };
        let (start, leading, stride) = (field(0), field(16), field(32));
        Ok(Matrix { start, leading, stride, row, per_piece: 16 / element_bytes, transposed })
    }

    /// The address of the piece of 16 bytes that holds element (`outer`, `inner`), `inner` along the depth, and the
    /// place of the element in it. Layouts are the canonical ones of the PTX ISA, "Shared Memory Matrix Layout".
    fn piece(&self, outer: usize, inner: usize) -> (u64, usize) {
        let per = self.per_piece;
        let (address, at) = if !self.transposed {
            let (group, row, piece) = ((outer / 8) as u64, (outer % 8) as u64, (inner / per) as u64);
            let along = if self.row == 16 { self.leading } else { 16 };
            (group * self.stride + row * self.row + piece * along, inner % per)
        } else {
            let (piece, group, row) = ((outer / per) as u64, (inner / 8) as u64, (inner % 8) as u64);
            let pieces = self.row / 16;
            let place = if self.row == 16 {
                piece * self.stride + group * self.leading
            } else {
                piece / pieces * self.leading + piece % pieces * 16 + group * self.stride
            };
            (place + row * self.row, outer % per)
        };
        let address = self.start + address;
        // The swizzle is that of addresses, not of places in the matrix.
        let mask = self.row / 16 - 1;
        (address ^ (address >> 7 & mask) << 4, at)
    }
}

impl Block<'_> {
    pub(crate) fn wgmma(&mut self, warp: &mut Warp, op: &Wgmma, line: u32) -> Result<(), Fault> {
        let fail = |why: &str| Err(Fault(ErrorKind::Matrix(why.to_owned()), None));
        let n_warps = self.fixed.ntid.iter().product::<u32>().div_ceil(32) as usize;
        if warp.index / 4 * 4 + 4 > n_warps {
            return fail("wgmma takes four warps, the first a multiple of four");
        }
        if !warp.pipeline.fenced {
            return fail("wgmma without wgmma.fence.sync.aligned since the registers were used otherwise");
        }
        let (count, digest) = warp.pipeline.issued;
        warp.pipeline.issued = (count + 1, digest.wrapping_mul(0x100_0000_01b3) ^ u64::from(line));

        let depth = 256 / op.a_type.bits() as usize;
        let (mut reads, mut left) = (Vec::new(), Vec::new());
        let rows = match &op.a {
            Left::Registers(registers) => {
                left.extend(registers.iter().filter_map(|src| match src {
                    Src::Reg(reg) => Some((*reg, warp.regs[*reg as usize])),
                    _ => None,
                }));
                self.left_registers(warp, op, registers, depth)?
            }
            Left::Shared(descriptor) => {
                let descriptor = self.uniform(warp, *descriptor, !0, "a matrix descriptor")?;
                let matrix = Matrix::of(descriptor, op.a_type.bytes(), op.transpose_a)?;
                // The rows of this warp among the 64.
                let first = warp.index % 4 * 16;
                self.fetch(warp, &matrix, op.a_type, first..first + 16, depth, &mut reads, line)?
            }
        };
        let descriptor = self.uniform(warp, op.b, !0, "a matrix descriptor")?;
        let matrix = Matrix::of(descriptor, op.b_type.bytes(), op.transpose_b)?;
        let columns = self.fetch(warp, &matrix, op.b_type, 0..op.columns, depth, &mut reads, line)?;

        let accumulate = match op.accumulate_value {
            Some(src) => self.uniform(warp, src, !0, "scale-d")? != 0,
            None => match warp.pred(&self.fixed, op.accumulate, !0)? {
                0 => false,
                u32::MAX => true,
                _ => return fail("scale-d differs between lanes of a warp"),
            },
        };
        let sign = if op.negate_a == op.negate_b { 1.0 } else { -1.0 };
        let packed = op.sum_type == Type::F16;
        for (q, reg) in op.d.iter().enumerate() {
            let before = self.sums_before(warp, *reg, accumulate)?;
            let mut out = [0u64; WARP];
            for (lane, out) in out.iter_mut().enumerate() {
                let halves = if packed { 2 } else { 1 };
                for half in 0..halves {
                    // Sums of a lane: pairs of columns, for two rows eight apart, for every eight columns.
                    let i = if packed { q * 2 + half } else { q };
                    let (row, column) = (lane / 4 + (i >> 1 & 1) * 8, (i >> 2) * 8 + lane % 4 * 2 + (i & 1));
                    let shift = 16 * half as u32;
                    let mut sum =
                        if accumulate { decode_sum(op.sum_type, before[lane] >> shift) } else { 0.0 };
                    for (a, b) in rows[row].iter().zip(&columns[column]) {
                        sum += sign * a * b;
                    }
                    *out |= encode_sum(op.sum_type, sum, op.saturate) << shift;
                }
            }
            warp.set(*reg, !0, &out);
        }
        // The sums are there, but not to be read until they are waited for.
        for reg in &op.d {
            warp.written[*reg as usize] = 0;
            warp.pipeline.busy.insert(*reg, line);
        }
        warp.pipeline.open.push(InFlight { registers: op.d.clone(), left, reads, line });
        self.stats.matrix_macs += 16 * op.columns as u64 * depth as u64;
        Ok(())
    }

    /// The sums so far. Those of a product under way may go on into the next.
    fn sums_before(&self, warp: &Warp, reg: Reg, accumulate: bool) -> Result<[u64; WARP], Fault> {
        let written = warp.written[reg as usize];
        if let Some(&line) = warp.pipeline.busy.get(&reg) {
            if written != 0 {
                let register = self.fixed.register(reg);
                return Err(Fault(ErrorKind::RegisterPending { register, line }, None));
            }
        } else if accumulate && written != !0 && warp.check_registers {
            return Err(Fault(self.fixed.unwritten_register(reg), None));
        }
        Ok(warp.regs[reg as usize])
    }

    fn left_registers(
        &self,
        warp: &Warp,
        op: &Wgmma,
        registers: &[Src],
        depth: usize,
    ) -> Result<Vec<Vec<f64>>, Fault> {
        let mut rows = vec![vec![0.0; depth]; 16];
        for (q, src) in registers.iter().enumerate() {
            let mut scratch = [0; WARP];
            for (lane, value) in warp.get(&self.fixed, *src, !0, &mut scratch)?.iter().enumerate() {
                let (values, per) = elements(op.a_type, *value);
                let (row, column) = a_place(lane, q, per);
                rows[row][column..column + per].copy_from_slice(&values[..per]);
            }
        }
        Ok(rows)
    }

    /// Rows `outer` of a matrix in shared memory, each along the depth.
    #[expect(clippy::too_many_arguments, reason = "an operand and where to note what it reads")]
    fn fetch(
        &mut self,
        warp: &Warp,
        matrix: &Matrix,
        ty: Type,
        outer: std::ops::Range<usize>,
        depth: usize,
        reads: &mut Vec<u64>,
        line: u32,
    ) -> Result<Vec<Vec<f64>>, Fault> {
        let who = Who { warp: warp.index as u8, lane: ASYNC_LANE };
        let mut rows = vec![vec![0.0; depth]; outer.len()];
        // Pieces are visited once each, along whichever direction they lie.
        let (outer_step, inner_step) =
            if matrix.transposed { (matrix.per_piece, 1) } else { (1, matrix.per_piece) };
        for o in outer.clone().step_by(outer_step) {
            for i in (0..depth).step_by(inner_step) {
                let (address, _) = matrix.piece(o, i);
                self.shared.begin_read(who, address, 16, "wgmma", line)?;
                reads.push(address);
                let piece = self.shared.peek(address, 16)?;
                let words = piece.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
                let mut n = 0;
                for word in words {
                    let (values, per) = elements(ty, u64::from(word));
                    for value in &values[..per] {
                        let (o, i) = if matrix.transposed { (o + n, i) } else { (o, i + n) };
                        rows[o - outer.start][i] = *value;
                        n += 1;
                    }
                }
            }
        }
        Ok(rows)
    }

    pub(crate) fn wgmma_wait(&mut self, warp: &mut Warp, groups: u64) -> Result<(), Fault> {
        let who = Who { warp: warp.index as u8, lane: ASYNC_LANE };
        let n = warp.pipeline.groups.len().saturating_sub(groups as usize);
        let done: Vec<InFlight> = warp.pipeline.groups.drain(..n).flatten().collect();
        for product in &done {
            for address in &product.reads {
                self.shared.end_read(who, *address, 16)?;
            }
            if let Some((reg, _)) = product.left.iter().find(|(reg, held)| warp.regs[*reg as usize] != *held)
            {
                let (register, line) = (self.fixed.register(*reg), product.line);
                return Err(Fault(ErrorKind::RegisterInUse { register, line }, None));
            }
        }
        // Registers of products that go on stay busy.
        let rest = warp.pipeline.open.iter().chain(warp.pipeline.groups.iter().flatten());
        let still: Vec<Reg> = rest.flat_map(|p| p.registers.iter().copied()).collect();
        for product in done {
            for reg in product.registers {
                if still.contains(&reg) || warp.pipeline.busy.remove(&reg).is_none() {
                    continue;
                }
                if warp.written[reg as usize] != 0 {
                    let (register, line) = (self.fixed.register(reg), product.line);
                    return Err(Fault(ErrorKind::RegisterPending { register, line }, None));
                }
                warp.written[reg as usize] = !0;
            }
        }
        warp.pipeline.fenced = false;
        Ok(())
    }
}
