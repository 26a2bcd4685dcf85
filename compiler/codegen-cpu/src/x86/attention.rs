//! Attention over one span, 256 or 512 bits wide: scores, softmax, and sums of values.
//!
//! Scores and sums are one product of matrices, `C[rows, columns] += A[rows, depth] * B[depth, columns]`: B is a block of the
//! cache (keys are `[Dh, page_len]`, values `[page_len, Dh]`), converted on its way into registers, and A is broadcast. Every
//! element of C has one accumulator over ascending depth, so the number of rows does not change a result. Blocks are
//! given as a list of addresses, one per page; while one is read, the one [`AHEAD`] places later is asked for.

use super::asm::AsmResult;
use super::{Asm, Level, Mem, Src, V};
use attar_artifact::manifest::KvType;
use attar_kernel::AttentionSpec;
use iced_x86::code_asm::{
    AsmRegister64, dword_ptr, ptr, qword_ptr, r8, r9, r10, r12, rax, rbp, rbx, rcx, rdi, rdx, rsi, xmm0,
};

/// How far ahead blocks are asked for: memory answers later than one block is worked off.
pub(crate) const AHEAD: usize = 2;
/// Positions whose weights are summed side by side.
const STRIDE: usize = 16;

/// Inner functions for one shape.
#[derive(Clone, Copy)]
pub(crate) struct AttentionKernel<'a> {
    pub(crate) level: Level,
    pub(crate) spec: &'a AttentionSpec,
}

impl<'a> AttentionKernel<'a> {
    /// `None` where a head is no whole number of vectors.
    pub(crate) fn new(level: Level, spec: &'a AttentionSpec) -> Option<AttentionKernel<'a>> {
        (spec.head_dim.is_multiple_of(16) && spec.page_len.is_multiple_of(16))
            .then_some(AttentionKernel { level, spec })
    }

    /// Most rows whose sums are held in registers at once.
    pub(crate) fn most_rows(level: Level) -> usize {
        if level.is_512() { 12 } else { 6 }
    }

    /// Rows of a block for a stack of that many.
    pub(crate) fn block_rows(level: Level, rows: usize) -> usize {
        let most = Self::most_rows(level);
        if rows <= most || rows.is_multiple_of(most) { rows.min(most) } else { most * 2 / 3 }
    }

    /// Columns of C that are computed together, in vectors: pieces of `total` that leave room for the rows.
    fn pieces(&self, rows: usize, total: usize) -> Vec<(usize, usize)> {
        let most = if self.holds_a(rows) {
            4
        } else {
            // With 256 bits a register is kept for A.
            let registers = if self.level.is_512() { 32 } else { 15 };
            (registers / (rows + 1)).clamp(1, 4)
        };
        let count = total.div_ceil(most);
        let each = total.div_ceil(count);
        (0..total).step_by(each).map(|start| (start, each.min(total - start))).collect()
    }

    /// Whether A lies in registers while B passes through one, instead of the other way round: with few rows that leaves
    /// room for as many sums as 256-bit products take turns to finish.
    fn holds_a(&self, rows: usize) -> bool {
        !self.level.is_512() && rows * 4 + rows < 16
    }

    fn element(&self) -> usize {
        self.spec.kv.size()
    }

    /// One vector of a block as f32.
    fn load(&self, s: &mut Asm, to: V, from: Mem) -> AsmResult<()> {
        match self.spec.kv {
            KvType::F32 => s.vmovups(to, from),
            KvType::F16 => s.vcvtph2ps(to, from),
            KvType::Int8 => {
                s.vpmovsxbd(to, from)?;
                s.vcvtdq2ps(to, to)
            }
        }
    }

    /// One step of the product: a row of B at `b` (its vectors from `start` on), A at `a` plus `step`.
    #[expect(clippy::too_many_arguments, reason = "one step of a product of matrices")]
    fn step(
        &self,
        s: &mut Asm,
        rows: usize,
        (start, count): (usize, usize),
        b: AsmRegister64,
        b_offset: usize,
        a: AsmRegister64,
        a_offset: usize,
        a_stride: usize,
    ) -> AsmResult<()> {
        let lanes = self.level.lanes();
        let first = (rows * count) as u8;
        if self.holds_a(rows) {
            for r in 0..rows {
                s.broadcast(V(first + r as u8), Mem::at(a, r * a_stride + a_offset))?;
            }
            for v in 0..count {
                self.load(s, V(15), Mem::at(b, b_offset + (start + v) * lanes * self.element()))?;
                for r in 0..rows {
                    s.vfmadd231ps(V((r * count + v) as u8), V(first + r as u8), V(15))?;
                }
            }
            return Ok(());
        }
        for v in 0..count {
            let at = b_offset + (start + v) * lanes * self.element();
            self.load(s, V(first + v as u8), Mem::at(b, at))?;
        }
        for r in 0..rows {
            let a = Mem::at(a, r * a_stride + a_offset);
            // A broadcast of its own costs as much as a product; one within the product costs nothing.
            let a = if self.level.is_512() {
                Src::Bcst(a)
            } else {
                s.broadcast(V(15), a)?;
                Src::Reg(V(15))
            };
            for v in 0..count {
                s.vfmadd231ps(V((r * count + v) as u8), V(first + v as u8), a)?;
            }
        }
        Ok(())
    }

    /// Asks for `bytes` bytes of a later block, as far into it as `at` is into this one: `next` is the distance between
    /// them. Into the second-level cache, since the first cannot wait for as many lines as memory can deliver.
    fn prefetch(
        &self,
        s: &mut Asm,
        at: AsmRegister64,
        next: AsmRegister64,
        offset: usize,
        bytes: usize,
    ) -> AsmResult<()> {
        for line in (offset..offset + bytes).step_by(64) {
            s.a.prefetcht1(ptr(at + next + line as i32))?;
        }
        Ok(())
    }

    /// Scores of `rows` rows. Arguments: scaled queries f32 `[rows, Dh]`, addresses of the pages' keys and of [`AHEAD`] blocks more, pages,
    /// scores f32 `[rows, span]` at the first page.
    pub(crate) fn scores(&self, rows: usize) -> AsmResult<Vec<u8>> {
        const UNROLL: usize = 4;
        let mut s = Asm::new(self.level)?;
        let (dh, page_len, span) = (self.spec.head_dim, self.spec.page_len, self.spec.span);
        let (lanes, row_bytes) = (self.level.lanes(), page_len * self.element());
        s.a.push(rbx)?;
        s.repeat(rdx, 1, |s| {
            let mut first = true;
            for (start, count) in self.pieces(rows, page_len / lanes) {
                for i in 0..rows * count {
                    s.zero(V(i as u8))?;
                }
                s.a.mov(r8, qword_ptr(rsi))?;
                s.a.mov(rbx, qword_ptr(rsi + 8 * AHEAD as i32))?;
                s.a.sub(rbx, r8)?;
                s.a.mov(rax, rdi)?;
                s.a.mov(r9, (dh / UNROLL) as i64)?;
                s.repeat(r9, 1, |s| {
                    if first {
                        self.prefetch(s, r8, rbx, 0, UNROLL * row_bytes)?;
                    }
                    for i in 0..UNROLL {
                        self.step(s, rows, (start, count), r8, i * row_bytes, rax, 4 * i, 4 * dh)?;
                    }
                    s.a.add(rax, 4 * UNROLL as i32)?;
                    s.a.add(r8, (UNROLL * row_bytes) as i32)
                })?;
                first = false;
                for v in 0..count {
                    let at = (start + v) * self.level.bytes();
                    let scales = V((rows * count) as u8);
                    if self.spec.kv == KvType::Int8 {
                        // r8 has come to the end of the block's codes, where its scales begin.
                        s.vmovups(scales, Mem::at(r8, self.scales() - dh * row_bytes + at))?;
                    }
                    for r in 0..rows {
                        let sum = V((r * count + v) as u8);
                        if self.spec.kv == KvType::Int8 {
                            s.vmulps(sum, sum, scales)?;
                        }
                        s.store(Mem::at(rcx, r * span * 4 + at), sum)?;
                    }
                }
            }
            s.a.add(rcx, 4 * page_len as i32)?;
            s.a.add(rsi, 8)
        })?;
        s.a.pop(rbx)?;
        s.finish()
    }

    fn scales(&self) -> usize {
        self.spec.kv.scales_offset(self.spec.head_dim, self.spec.page_len)
    }

    /// Adds the weighted values of some positions to the sums of `rows` rows. Arguments: weights f32 `[rows, span]` at the first
    /// position, addresses of the pages' values from the first position's on and of [`AHEAD`] blocks more, place of the
    /// first position in its page, positions (at least 1), sums f32 `[rows, Dh]`.
    pub(crate) fn mix(&self, rows: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let (dh, page_len, span) = (self.spec.head_dim, self.spec.page_len, self.spec.span);
        let row_bytes = dh * self.element();
        let saved = [rbx, rbp, r12];
        saved.iter().try_for_each(|r| s.a.push(*r))?;
        for (start, count) in self.pieces(rows, dh / self.level.lanes()) {
            let at = |r: usize, v: usize| Mem::at(r8, r * dh * 4 + (start + v) * self.level.bytes());
            for r in 0..rows {
                for v in 0..count {
                    s.vmovups(V((r * count + v) as u8), at(r, v))?;
                }
            }
            // Weights, list, place in the page and positions left move along.
            s.a.mov(rax, rdi)?;
            s.a.mov(r9, rsi)?;
            s.a.mov(r12, rdx)?;
            s.a.mov(rbx, rcx)?;
            let mut page = s.a.create_label();
            s.a.set_label(&mut page)?;
            // Positions of this page: the rest of it, or what is left.
            s.a.mov(rbp, page_len as i64)?;
            s.a.sub(rbp, r12)?;
            s.a.cmp(rbp, rbx)?;
            s.a.cmovg(rbp, rbx)?;
            s.a.sub(rbx, rbp)?;
            s.a.imul_3(r10, r12, row_bytes as i32)?;
            s.a.mov(r12, qword_ptr(r9 + 8 * AHEAD as i32))?;
            s.a.sub(r12, qword_ptr(r9))?;
            s.a.add(r10, qword_ptr(r9))?;
            s.a.add(r9, 8)?;
            s.repeat(rbp, 1, |s| {
                if start == 0 {
                    self.prefetch(s, r10, r12, 0, row_bytes)?;
                }
                self.step(s, rows, (start, count), r10, 0, rax, 0, 4 * span)?;
                s.a.add(rax, 4)?;
                s.a.add(r10, row_bytes as i32)
            })?;
            s.a.mov(r12, 0i64)?;
            s.a.test(rbx, rbx)?;
            s.a.jnz(page)?;
            for r in 0..rows {
                for v in 0..count {
                    s.store(at(r, v), V((r * count + v) as u8))?;
                }
            }
        }
        saved.iter().rev().try_for_each(|r| s.a.pop(*r))?;
        s.finish()
    }

    /// Turns a row's scores into weights. Arguments: scores, strides of 16 (at least 1), where the maximum goes, where the total goes, scales of
    /// the values (for an int8 cache).
    pub(crate) fn soften(&self) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let parts = self.level.parts();
        let part = |p: usize| p * self.level.bytes();
        let least = s.constant(f32::NEG_INFINITY.to_bits());
        let (base, most) = (V(2), |p: usize| V(if p == 0 { 0 } else { 3 }));
        for p in 0..parts {
            s.broadcast(most(p), least)?;
        }
        s.a.mov(rax, rdi)?;
        s.a.mov(r9, rsi)?;
        s.repeat(r9, 1, |s| {
            for p in 0..parts {
                // The old maximum where the score is NaN, which shows in the weights.
                s.vmovups(V(4), Mem::at(rax, part(p)))?;
                s.vmaxps(most(p), V(4), most(p))?;
            }
            s.a.add(rax, 4 * STRIDE as i32)
        })?;
        if parts == 2 {
            s.vmaxps(V(0), V(0), V(3))?;
        }
        s.reduce_max()?;
        s.a.vmovss(dword_ptr(rdx), xmm0)?;
        s.splat(base, V(0))?;
        // 0 in place of minus infinity: as integers, only minus infinity and NaN (which there is none) lie there.
        self.zero_where_infinite(&mut s, base)?;
        let total = |p: usize| V(if p == 0 { 0 } else { 3 });
        for p in 0..parts {
            s.zero(total(p))?;
        }
        s.repeat(rsi, 1, |s| {
            for p in 0..parts {
                let x = V(4);
                s.vmovups(x, Mem::at(rdi, part(p)))?;
                s.vsubps(x, x, base)?;
                s.exp2_up_to_0(x, [V(5), V(6)])?;
                s.vaddps(total(p), total(p), x)?;
                if self.spec.kv == KvType::Int8 {
                    s.vmulps(x, x, Mem::at(r8, part(p)))?;
                }
                s.store(Mem::at(rdi, part(p)), x)?;
            }
            if self.spec.kv == KvType::Int8 {
                s.a.add(r8, 4 * STRIDE as i32)?;
            }
            s.a.add(rdi, 4 * STRIDE as i32)
        })?;
        if parts == 2 {
            s.vaddps(V(0), V(0), V(3))?;
        }
        s.reduce_add()?;
        s.a.vmovss(dword_ptr(rcx), xmm0)?;
        s.finish()
    }

    /// `v` becomes 0 where it is minus infinity.
    fn zero_where_infinite(&self, s: &mut Asm, v: V) -> AsmResult<()> {
        let (bits, done) = (iced_x86::code_asm::eax, &mut s.a.create_label());
        s.a.vmovd(bits, xmm0)?;
        s.a.cmp(bits, f32::NEG_INFINITY.to_bits() as i32)?;
        s.a.jne(*done)?;
        s.zero(v)?;
        s.a.set_label(done)?;
        s.a.nop()
    }
}
