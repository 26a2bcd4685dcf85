//! Attention over a cache of bytes: products of integers, so that nothing of it is converted.
//!
//! Keys are four elements to 32 bits: they meet four bytes of a query in one dot product. Values are four positions to 32
//! bits: shifts make two pairs of 16-bit integers of them, which meet pairs of 16-bit weights. A span of weights is rounded to
//! 16 bits relative to its largest; sums of a span fit into 32 bits and are exact, so no order of additions matters.
//!
//! Halves of bytes, which are never negative, become bytes by a mask: the four elements in the lower halves of 32 bits are
//! multiplied after each other with the four in the upper ones. Of values, which are two elements to a byte, four masks and
//! shifts make the pairs of either. That 8 was added to every code is taken off sums, where it counts once for all.

use super::asm::AsmResult;
use super::{Asm, AttentionKernel, Dot, Mem, Src, V};
use attar_artifact::manifest::KvType;
use iced_x86::code_asm::{
    AsmRegister64, dword_ptr, ptr, qword_ptr, r8, r9, r10, rax, rbp, rbx, rcx, rdi, rdx, rsi, xmm0, xmm1,
};

/// The largest rounded weight.
const MOST: f32 = 32767.0;
/// Positions whose weights are rounded together.
const STRIDE: usize = 16;
/// Swaps the middle two of four: pairs of weights stand as shifts leave pairs of values, 0 with 2 and 1 with 3.
const MIDDLE: u32 = 0b11_01_10_00;

/// The lower halves of bytes, and those of 16-bit integers.
const HALVES: u32 = 0x0f0f_0f0f;
const LOWEST: u32 = 0x000f_000f;

impl AttentionKernel<'_> {
    /// What is added to keys to be unsigned, as `vpdpbusd` wants them; this many times the sum of a query's codes is where its
    /// products begin, with a minus.
    pub(crate) fn bias(kv: KvType) -> i32 {
        if kv == KvType::Int4 { 8 } else { 128 }
    }

    fn halves(&self) -> bool {
        self.spec.kv == KvType::Int4
    }

    /// A constant that stays in a register.
    fn constant_register(&self) -> V {
        if self.level.is_512() { V(31) } else { V(14) }
    }

    /// Longest span whose sums fit into 32 bits.
    pub(super) const LONGEST: usize = (i32::MAX / (32767 * 128)) as usize;

    /// As [`AttentionKernel::pieces`]: registers beside the sums are keys or values, two of each, and three more.
    pub(super) fn pieces_of_bytes(&self, rows: usize, total: usize) -> Vec<(usize, usize)> {
        let registers = if self.level.is_512() { 32 } else { 16 };
        let most = ((registers - 3) / (rows + 2)).clamp(1, 4);
        let each = total.div_ceil(total.div_ceil(most));
        (0..total).step_by(each).map(|start| (start, each.min(total - start))).collect()
    }

    /// Scores of `rows` rows. Arguments: queries as bytes `[rows, Dh]`, addresses of the pages' keys and of those of their
    /// values, pages, scores f32 `[rows, span]` at the first page, scales of the queries f32 `[rows]`, where their products
    /// begin i32 `[rows]`.
    pub(super) fn scores_of_bytes(&self, rows: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let (dh, page_len, span) = (self.spec.head_dim, self.spec.page_len, self.spec.span);
        let lanes = self.level.lanes();
        let biased = self.level.dot != Dot::Maddubs;
        // Elements of 32 bits, and how many times so many are multiplied in a step.
        let (elements, unroll) = if self.halves() { (8, 2) } else { (4, 4) };
        let flip = self.constant_register();
        // The mask of halves, four times the bias as unsigned bytes, or ones as 16-bit integers.
        let ones = [0x0001_0001; 8];
        let constant = match (self.halves(), biased) {
            (true, _) => HALVES,
            (false, true) => 0x8080_8080,
            (false, false) => ones[0],
        };
        let constant = s.constant(constant);
        s.broadcast(flip, constant)?;
        s.a.push(rbx)?;
        s.a.push(rbp)?;
        // From a page's keys in the list to its values.
        s.a.lea(rbp, ptr(rdx * 8))?;
        s.repeat(rdx, 1, |s| {
            let mut first = true;
            s.a.mov(rax, qword_ptr(rsi + rbp))?;
            for line in (0..4 * page_len).step_by(64) {
                s.a.prefetcht0(ptr(rax + (self.bytes(dh * page_len) + line) as i32))?;
            }
            for (start, count) in self.pieces_of_bytes(rows, page_len / lanes) {
                let sum = |r: usize, v: usize| V((r * count + v) as u8);
                let key = |v: usize| V((rows * count + v) as u8);
                let size = |v: usize| V((rows * count + count + v) as u8);
                for r in 0..rows {
                    for v in 0..count {
                        if biased || self.halves() {
                            s.broadcast(sum(r, v), Mem::at(r9, 4 * r))?;
                        } else {
                            s.zero(sum(r, v))?;
                        }
                    }
                }
                s.a.mov(r10, qword_ptr(rsi))?;
                s.a.mov(rbx, qword_ptr(rsi + 8 * self.ahead() as i32))?;
                s.a.sub(rbx, r10)?;
                s.a.mov(rax, (dh / elements / unroll) as i64)?;
                s.repeat(rax, 1, |s| {
                    if first {
                        self.prefetch(s, r10, rbx, 0, unroll * 4 * page_len)?;
                    }
                    for i in 0..unroll {
                        if self.halves() {
                            for v in 0..count {
                                let at = 4 * (i * page_len + (start + v) * lanes);
                                let (lower, upper) = (key(v), size(v));
                                s.vmovups(lower, Mem::at(r10, at))?;
                                s.vpsrlw(upper, lower, 4)?;
                                s.vpand(lower, lower, flip)?;
                                s.vpand(upper, upper, flip)?;
                            }
                            let (keys, sums) = (|v, half| if half == 0 { key(v) } else { size(v) }, sum);
                            for (r, half) in (0..rows).flat_map(|r| [(r, 0), (r, 1)]) {
                                let query =
                                    self.repeated(s, rows, Mem::at(rdi, r * dh + 8 * i + 4 * half))?;
                                for v in 0..count {
                                    if biased {
                                        s.vpdpbusd(sums(r, v), keys(v, half), query)?;
                                        continue;
                                    }
                                    // At most 2 * 15 * 127, so nothing saturates.
                                    let product = V(13);
                                    s.vpmaddubsw(product, keys(v, half), self.broadcast_register())?;
                                    let ones = s.constants(&ones);
                                    s.vpmaddwd(product, product, ones)?;
                                    s.vpaddd(sums(r, v), sums(r, v), product)?;
                                }
                            }
                            continue;
                        }
                        for v in 0..count {
                            s.vmovups(key(v), Mem::at(r10, 4 * (i * page_len + (start + v) * lanes)))?;
                            if biased {
                                s.vpxor(key(v), key(v), flip)?;
                            } else {
                                s.vpabsb(size(v), key(v))?;
                            }
                        }
                        for r in 0..rows {
                            let query = self.repeated(s, rows, Mem::at(rdi, r * dh + 4 * i))?;
                            for v in 0..count {
                                if biased {
                                    s.vpdpbusd(sum(r, v), key(v), query)?;
                                    continue;
                                }
                                let product = V(13);
                                s.vpsignb(product, self.broadcast_register(), key(v))?;
                                s.vpmaddubsw(product, size(v), product)?;
                                s.vpmaddwd(product, product, flip)?;
                                s.vpaddd(sum(r, v), sum(r, v), product)?;
                            }
                        }
                    }
                    s.a.add(rdi, (elements * unroll) as i32)?;
                    s.a.add(r10, (4 * unroll * page_len) as i32)
                })?;
                s.a.sub(rdi, dh as i32)?;
                if first {
                    self.prefetch(s, r10, rbx, 0, 4 * page_len)?;
                }
                first = false;
                for v in 0..count {
                    let at = (start + v) * self.level.bytes();
                    // r10 has come to the end of the block's codes, where its scales begin.
                    s.vmovups(key(v), Mem::at(r10, at))?;
                    for r in 0..rows {
                        s.vcvtdq2ps(sum(r, v), sum(r, v))?;
                        s.vmulps(sum(r, v), sum(r, v), key(v))?;
                        s.vmulps(sum(r, v), sum(r, v), Src::Bcst(Mem::at(r8, 4 * r)))?;
                        s.store(Mem::at(rcx, r * span * 4 + at), sum(r, v))?;
                    }
                }
            }
            s.a.add(rcx, 4 * page_len as i32)?;
            s.a.add(rsi, 8)
        })?;
        s.a.pop(rbp)?;
        s.a.pop(rbx)?;
        s.finish()
    }

    /// What [`AttentionKernel::step_of_bytes`] wants in a register.
    pub(super) fn begin_steps(&self, s: &mut Asm) -> AsmResult<()> {
        if !self.halves() {
            return Ok(());
        }
        let mask = s.constant(LOWEST);
        s.broadcast(self.mask(), mask)
    }

    /// The lower halves of the lower bytes of 16-bit integers.
    fn mask(&self) -> V {
        if self.level.is_512() { V(31) } else { V(13) }
    }

    /// Four positions' values at `b` as pairs: vector `at` of the elements.
    fn pairs(&self, s: &mut Asm, b: AsmRegister64, at: usize, [even, odd]: [V; 2]) -> AsmResult<()> {
        if !self.halves() {
            s.vmovups(odd, Mem::at(b, at * self.level.bytes()))?;
            s.vpsllw(even, odd, 8)?;
            s.vpsraw(even, even, 8)?;
            return s.vpsraw(odd, odd, 8);
        }
        let half = self.spec.head_dim / 2 / self.level.lanes();
        s.vmovups(odd, Mem::at(b, at % half * self.level.bytes()))?;
        if at < half {
            s.vpand(even, odd, self.mask())?;
            s.vpsrlw(odd, odd, 8)?;
            return s.vpand(odd, odd, self.mask());
        }
        s.vpsrlw(even, odd, 4)?;
        s.vpand(even, even, self.mask())?;
        s.vpsrlw(odd, odd, 12)
    }

    /// Adds four positions' values at `b` (vectors from `start` on) times the weights at `a`.
    pub(super) fn step_of_bytes(
        &self,
        s: &mut Asm,
        rows: usize,
        (start, count): (usize, usize),
        b: AsmRegister64,
        a: AsmRegister64,
    ) -> AsmResult<()> {
        let stride = 4 * self.spec.span;
        let first = rows * count;
        let pair = |v: usize, odd: usize| V((first + 2 * v + odd) as u8);
        for v in 0..count {
            self.pairs(s, b, start + v, [pair(v, 0), pair(v, 1)])?;
        }
        for r in 0..rows {
            for odd in 0..2 {
                let weights = self.repeated(s, rows, Mem::at(a, r * stride + 4 * odd))?;
                for v in 0..count {
                    let (sum, product) = (V((r * count + v) as u8), V(14));
                    if self.level.is_512() {
                        s.vpdpwssd(sum, pair(v, odd), weights)?;
                        continue;
                    }
                    s.vpmaddwd(product, pair(v, odd), self.broadcast_register())?;
                    s.vpaddd(sum, sum, product)?;
                }
            }
        }
        Ok(())
    }

    /// Registers of [`AttentionKernel::scale_weights`]: the largest, something not finite, zeros.
    const LARGEST: V = V(7);
    const POISON: V = V(8);
    const ZERO: V = V(9);

    pub(super) fn begin_scaling(&self, s: &mut Asm) -> AsmResult<()> {
        [Self::LARGEST, Self::POISON, Self::ZERO].into_iter().try_for_each(|v| s.zero(v))
    }

    /// Multiplies weights by the scales of their values, and keeps the largest product; scales of halves of bytes may be negative.
    /// Where there is no weight the scale may be anything. Uses `t`.
    pub(super) fn scale_weights(&self, s: &mut Asm, x: V, scales: Mem, t: V) -> AsmResult<()> {
        s.vmulps(t, x, scales)?;
        s.zero_where_zero(t, x)?;
        let mut size = t;
        if self.halves() {
            size = x;
            let magnitude = s.constant(0x7fff_ffff);
            s.vpand(size, t, Src::Bcst(magnitude))?;
        }
        s.vmaxps(Self::LARGEST, size, Self::LARGEST)?;
        s.vfmadd231ps(Self::POISON, t, Self::ZERO)?;
        s.vmovups(x, t)
    }

    /// Rounds the products at `rax`, `r10` strides of them, to 16 bits relative to the largest, and stores them where the
    /// address at `r9 + 8` says. What an integer stands for goes to `r9`: a number, or NaN where a product was not finite. Halves of
    /// bytes have 8 added, so this many times the sum of the weights goes to `r9 + 4`, with a minus.
    pub(super) fn round_weights(&self, s: &mut Asm) -> AsmResult<()> {
        let parts = self.level.parts();
        s.vmovups(V(0), Self::POISON)?;
        s.reduce_add()?;
        s.a.vmovss(dword_ptr(r9), xmm0)?;
        s.vmovups(V(0), Self::LARGEST)?;
        s.reduce_max()?;
        // Small enough not to matter, and large enough to divide by.
        let least = s.constant(1e-30f32.to_bits());
        s.a.vmaxss(xmm0, xmm0, least.dword())?;
        let most = s.constant(MOST.to_bits());
        s.a.vmovss(xmm1, most.dword())?;
        s.a.vdivss(xmm1, xmm1, xmm0)?;
        s.splat(V(2), V(1))?;
        s.a.vdivss(xmm0, xmm0, most.dword())?;
        s.a.vaddss(xmm0, xmm0, dword_ptr(r9))?;
        s.a.vmovss(dword_ptr(r9), xmm0)?;
        s.a.mov(rdx, r9)?;
        s.a.mov(r9, qword_ptr(r9 + 8))?;
        s.zero(V(0))?;
        s.repeat(r10, 1, |s| {
            for p in 0..parts {
                let x = V(4 + p as u8);
                s.vmovups(x, Mem::at(rax, p * self.level.bytes()))?;
                s.vmulps(x, x, V(2))?;
                s.vcvtps2dq(x, x)?;
                if self.halves() {
                    s.vpsubd(V(0), V(0), x)?;
                }
                s.pick_within_fours(x, x, MIDDLE)?;
            }
            s.store_words(Mem::at(r9, 0), V(4))?;
            s.a.add(r9, 2 * STRIDE as i32)?;
            s.a.add(rax, 4 * STRIDE as i32)
        })?;
        if self.halves() {
            s.vpslld(V(0), V(0), 3)?;
            s.reduce_add_integers()?;
            s.a.vmovd(dword_ptr(rdx + 4), xmm0)?;
        }
        Ok(())
    }
}
