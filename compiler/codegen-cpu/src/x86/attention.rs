//! Attention over one span, 256 or 512 bits wide: scores, softmax, and sums of values.
//!
//! Scores and sums are one product of matrices, `C[rows, columns] += A[rows, depth] * B[depth, columns]`: B is a block of the
//! cache (keys are `[Dh, page_len]`, values `[page_len, Dh]`), converted on its way into registers, and A is broadcast. Every
//! element of C has one accumulator over ascending depth, so the number of rows does not change a result. Blocks are
//! given as a list of addresses, one per page; while one is read, one some places later is asked for
//! ([`AttentionKernel::ahead`], [`AttentionKernel::ahead_of_values`]). A cache of bytes is multiplied as bytes, see
//! `attention_bytes.rs`.

use super::asm::AsmResult;
use super::{Asm, Level, Mem, Src, V};
use attar_artifact::manifest::KvType;
use attar_kernel::AttentionSpec;
use iced_x86::code_asm::{
    AsmRegister64, dword_ptr, ptr, qword_ptr, r8, r9, r10, r12, r13, r14, r15, rax, rbp, rbx, rcx, rdi, rdx,
    rsi, xmm0,
};

/// Positions whose weights are summed side by side.
const STRIDE: usize = 16;

/// Rows up to which memory takes longer than the products.
const FEW: usize = 4;

/// Inner functions for one shape.
#[derive(Clone, Copy)]
pub(crate) struct AttentionKernel<'a> {
    pub(crate) level: Level,
    pub(crate) spec: &'a AttentionSpec,
}

impl<'a> AttentionKernel<'a> {
    /// `None` where a head is no whole number of vectors.
    pub(crate) fn new(level: Level, spec: &'a AttentionSpec) -> Option<AttentionKernel<'a>> {
        let fits = match spec.kv {
            KvType::F32 | KvType::F16 => true,
            KvType::Int8 => spec.span <= Self::LONGEST,
            // The elements of either half of bytes are whole vectors.
            KvType::Int4 => spec.span <= Self::LONGEST && spec.head_dim.is_multiple_of(2 * level.lanes()),
        };
        (spec.head_dim.is_multiple_of(16) && spec.page_len.is_multiple_of(16) && fits)
            .then_some(AttentionKernel { level, spec })
    }

    /// How many blocks ahead one is asked for while scores are computed: memory answers later than one is worked off.
    pub(crate) fn ahead(&self) -> usize {
        if self.spec.kv.has_scales() { 4 } else { 2 }
    }

    /// How many entries of the list behind a block of values the address stands that is asked for while it is read: behind the
    /// values of a whole span, where the caller puts what has not been asked for before.
    pub(crate) fn ahead_of_values(&self) -> usize {
        self.spec.span / self.spec.page_len
    }

    /// Bytes of values that [`AttentionKernel::soften`] asks for with each stride.
    pub(crate) const SOFTEN_BYTES: usize = 128;

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
            // One is kept for A.
            (usize::from(self.broadcast_register().0) / (rows + 1)).clamp(1, 4)
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

    /// What is broadcast stands here, and nothing but constants behind it.
    pub(super) fn broadcast_register(&self) -> V {
        if self.level.is_512() { V(30) } else { V(15) }
    }

    /// Bytes of so many elements.
    pub(super) fn bytes(&self, elements: usize) -> usize {
        elements * self.spec.kv.bits() / 8
    }

    /// One vector of a block as f32.
    fn load(&self, s: &mut Asm, to: V, from: Mem) -> AsmResult<()> {
        match self.spec.kv {
            KvType::F32 => s.vmovups(to, from),
            KvType::F16 => s.vcvtph2ps(to, from),
            KvType::Int8 | KvType::Int4 => unreachable!("bytes are multiplied as such"),
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
                self.load(s, V(15), Mem::at(b, b_offset + self.bytes((start + v) * lanes)))?;
                for r in 0..rows {
                    s.vfmadd231ps(V((r * count + v) as u8), V(first + r as u8), V(15))?;
                }
            }
            return Ok(());
        }
        for v in 0..count {
            let at = b_offset + self.bytes((start + v) * lanes);
            self.load(s, V(first + v as u8), Mem::at(b, at))?;
        }
        for r in 0..rows {
            let a = self.repeated(s, rows, Mem::at(a, r * a_stride + a_offset))?;
            for v in 0..count {
                s.vfmadd231ps(V((r * count + v) as u8), V(first + v as u8), a)?;
            }
        }
        Ok(())
    }

    /// A number of A in all lanes, for products with all columns. With 256 bits, or many rows, it is loaded once, into
    /// [`AttentionKernel::broadcast_register`]; as an operand in memory it is loaded with each product, which bounds many rows and
    /// is no matter with few.
    pub(super) fn repeated(&self, s: &mut Asm, rows: usize, a: Mem) -> AsmResult<Src> {
        if self.level.is_512() && rows <= FEW {
            return Ok(Src::Bcst(a));
        }
        s.broadcast(self.broadcast_register(), a)?;
        Ok(Src::Reg(self.broadcast_register()))
    }

    /// Asks for `bytes` bytes of a later block, as far into it as `at` is into this one: `next` is the distance between
    /// them. Into the second-level cache, since the first cannot wait for as many lines as memory can deliver.
    pub(super) fn prefetch(
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

    /// Scores of `rows` rows. Arguments: scaled queries f32 `[rows, Dh]`, addresses of the pages' keys and of [`AttentionKernel::ahead`] blocks more, pages,
    /// scores f32 `[rows, span]` at the first page; for a cache of codes see [`AttentionKernel::scores_of_bytes`].
    pub(crate) fn scores(&self, rows: usize) -> AsmResult<Vec<u8>> {
        if self.spec.kv.has_scales() {
            return self.scores_of_bytes(rows);
        }
        const UNROLL: usize = 4;
        let mut s = Asm::new(self.level)?;
        let (dh, page_len, span) = (self.spec.head_dim, self.spec.page_len, self.spec.span);
        let (lanes, row_bytes) = (self.level.lanes(), self.bytes(page_len));
        s.a.push(rbx)?;
        s.repeat(rdx, 1, |s| {
            let mut first = true;
            for (start, count) in self.pieces(rows, page_len / lanes) {
                for i in 0..rows * count {
                    s.zero(V(i as u8))?;
                }
                s.a.mov(r8, qword_ptr(rsi))?;
                s.a.mov(rbx, qword_ptr(rsi + 8 * self.ahead() as i32))?;
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
                    for r in 0..rows {
                        s.store(Mem::at(rcx, r * span * 4 + at), V((r * count + v) as u8))?;
                    }
                }
            }
            s.a.add(rcx, 4 * page_len as i32)?;
            s.a.add(rsi, 8)
        })?;
        s.a.pop(rbx)?;
        s.finish()
    }

    /// Adds the weighted values of some positions to the sums of `rows` rows. Arguments: weights f32 `[rows, span]` at the first
    /// position, addresses of the pages' values from the first position's on and of [`AttentionKernel::ahead_of_values`] blocks more, place of the
    /// first position in its page, positions (at least 1), sums f32 `[rows, Dh]`.
    ///
    /// For a cache of codes weights are 16-bit as [`AttentionKernel::soften`] leaves them, positions are multiples of 4, and sums
    /// are i32.
    pub(crate) fn mix(&self, rows: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let (dh, page_len, span) = (self.spec.head_dim, self.spec.page_len, self.spec.span);
        // Positions of a step, and bytes of their values and weights.
        let (step, weights) = if self.spec.kv.has_scales() { (4, 8) } else { (1, 4) };
        let row_bytes = self.bytes(dh);
        let saved = [rbx, rbp, r12, r13, r14, r15];
        saved.iter().try_for_each(|r| s.a.push(*r))?;
        let pieces = match self.spec.kv {
            KvType::Int8 | KvType::Int4 => self.pieces_of_bytes(rows, dh / self.level.lanes()),
            KvType::F32 | KvType::F16 => self.pieces(rows, dh / self.level.lanes()),
        };
        let sums = |s: &mut Asm, (start, count): (usize, usize), store: bool| {
            (0..rows * count).try_for_each(|i| {
                let at = (i / count) * dh * 4 + (start + i % count) * self.level.bytes();
                let (at, sum) = (Mem::at(r8, at), V(i as u8));
                if store { s.store(at, sum) } else { s.vmovups(sum, at) }
            })
        };
        self.begin_steps(&mut s)?;
        // With few rows, memory is what takes time, and all columns of a page are worked off before the next. With many,
        // sums stay in registers from page to page.
        let walks: Vec<&[(usize, usize)]> =
            if rows <= FEW { vec![&pieces] } else { pieces.chunks(1).collect() };
        for walk in walks {
            let held = walk.len() == 1;
            if held {
                sums(&mut s, walk[0], false)?;
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
            s.a.mov(r12, qword_ptr(r9 + 8 * self.ahead_of_values() as i32))?;
            s.a.sub(r12, qword_ptr(r9))?;
            s.a.add(r10, qword_ptr(r9))?;
            s.a.add(r9, 8)?;
            for piece in walk {
                if !held {
                    sums(&mut s, *piece, false)?;
                }
                s.a.mov(r13, rbp)?;
                s.a.mov(r14, rax)?;
                s.a.mov(r15, r10)?;
                s.repeat(r13, step as i32, |s| {
                    if piece.0 == 0 {
                        self.prefetch(s, r15, r12, 0, step * row_bytes)?;
                    }
                    if self.spec.kv.has_scales() {
                        self.step_of_bytes(s, rows, *piece, r15, r14)?;
                    } else {
                        self.step(s, rows, *piece, r15, 0, r14, 0, 4 * span)?;
                    }
                    s.a.add(r14, weights)?;
                    s.a.add(r15, (step * row_bytes) as i32)
                })?;
                if !held {
                    sums(&mut s, *piece, true)?;
                }
            }
            s.a.mov(rax, r14)?;
            s.a.mov(r12, 0i64)?;
            s.a.test(rbx, rbx)?;
            s.a.jnz(page)?;
            if held {
                sums(&mut s, walk[0], true)?;
            }
        }
        saved.iter().rev().try_for_each(|r| s.a.pop(*r))?;
        s.finish()
    }

    /// Turns a row's scores into weights. Arguments: scores, strides of 16 (at least 1), where the maximum goes, where the
    /// total goes; for a cache of codes also the scales of the values, and where a factor goes and the address of the
    /// weights stands 8 bytes on, see [`AttentionKernel::round_weights`]. Where it is to `fetch`, it asks for memory besides, which
    /// would have nothing to do for so long: the address is the last argument, or stands 16 bytes behind the factor.
    pub(crate) fn soften(&self, fetch: bool) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let parts = self.level.parts();
        let part = |p: usize| p * self.level.bytes();
        let least = s.constant(f32::NEG_INFINITY.to_bits());
        let (base, most) = (V(2), |p: usize| V(if p == 0 { 0 } else { 3 }));
        for p in 0..parts {
            s.broadcast(most(p), least)?;
        }
        s.a.mov(rax, rdi)?;
        s.a.mov(r10, rsi)?;
        s.repeat(r10, 1, |s| {
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
        let bytes = self.spec.kv.has_scales();
        if fetch && bytes {
            s.a.mov(rdx, qword_ptr(r9 + 16))?;
        } else if fetch {
            s.a.mov(rdx, r8)?;
        }
        if bytes {
            s.a.mov(rax, rdi)?;
            s.a.mov(r10, rsi)?;
            self.begin_scaling(&mut s)?;
        }
        s.repeat(rsi, 1, |s| {
            if fetch {
                for line in (0..Self::SOFTEN_BYTES).step_by(64) {
                    s.a.prefetcht1(ptr(rdx + line as i32))?;
                }
                s.a.add(rdx, Self::SOFTEN_BYTES as i32)?;
            }
            for p in 0..parts {
                let x = V(4);
                s.vmovups(x, Mem::at(rdi, part(p)))?;
                s.vsubps(x, x, base)?;
                s.exp2_up_to_0(x, [V(5), V(6)])?;
                s.vaddps(total(p), total(p), x)?;
                if bytes {
                    self.scale_weights(s, x, Mem::at(r8, part(p)), V(5))?;
                }
                s.store(Mem::at(rdi, part(p)), x)?;
            }
            if bytes {
                s.a.add(r8, 4 * STRIDE as i32)?;
            }
            s.a.add(rdi, 4 * STRIDE as i32)
        })?;
        if parts == 2 {
            s.vaddps(V(0), V(0), V(3))?;
        }
        s.reduce_add()?;
        s.a.vmovss(dword_ptr(rcx), xmm0)?;
        if bytes {
            self.round_weights(&mut s)?;
        }
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
