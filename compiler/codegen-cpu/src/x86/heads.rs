//! What happens to heads around attention, 256 or 512 bits wide: rotation, the way into the cache, scaling of queries,
//! joining of spans, quantization of results.
//!
//! The arithmetic is that of the portable kernels, operation by operation, so that results are the same bits, but for what a
//! NaN carries and, where subnormals are not flushed, factors of that size.

use super::asm::AsmResult;
use super::rows::{quantize_group, value};
use super::{Asm, Level, Mem, V};
use attar_artifact::manifest::KvType;
use attar_kernel::ActInt8Layout;
use iced_x86::code_asm::{
    ax, dword_ptr, eax, r8, r9, rax, rcx, rdi, rdx, rsi, rsp, word_ptr, xmm0, xmm1, xmm2, xmm3, xmm4,
};

/// Elements of a key that are stored at a time: as many halves as fit below the stack pointer.
const PART: usize = 64;

/// Inner functions for heads of one width.
#[derive(Clone, Copy)]
pub(crate) struct HeadKernel {
    level: Level,
    head_dim: usize,
}

impl HeadKernel {
    /// `None` where halves of a head are no whole number of vectors.
    pub(crate) fn new(level: Option<Level>, head_dim: usize) -> Option<HeadKernel> {
        let level = level?;
        head_dim.is_multiple_of(2 * level.lanes()).then_some(HeadKernel { level, head_dim })
    }

    fn bytes(&self) -> usize {
        4 * self.head_dim
    }

    /// Offsets of a head's vectors.
    fn vectors(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.bytes()).step_by(self.level.bytes())
    }

    /// Rotates a head of each of some rows (RoPE). Arguments: from, cosines and sines `[rows, Dh]`, to, rows.
    pub(crate) fn rotate(&self, from_stride: usize, to_stride: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let half = self.bytes() / 2;
        let (a, b, cos, sin, product, other) = (V(0), V(1), V(2), V(3), V(4), V(5));
        s.repeat(rcx, 1, |s| {
            for at in (0..half).step_by(self.level.bytes()) {
                s.vmovups(a, Mem::at(rdi, at))?;
                s.vmovups(b, Mem::at(rdi, at + half))?;
                s.vmovups(cos, Mem::at(rsi, at))?;
                s.vmovups(sin, Mem::at(rsi, at + half))?;
                s.vmulps(product, b, sin)?;
                s.vmulps(other, a, cos)?;
                s.vsubps(product, other, product)?;
                s.vmulps(b, b, cos)?;
                s.vmulps(a, a, sin)?;
                s.vaddps(a, b, a)?;
                s.store(Mem::at(rdx, at), product)?;
                s.store(Mem::at(rdx, at + half), a)?;
            }
            s.a.add(rdi, from_stride as i32)?;
            s.a.add(rsi, self.bytes() as i32)?;
            s.a.add(rdx, to_stride as i32)
        })?;
        s.finish()
    }

    /// Stores a head as a column of a page's keys, whose elements lie `step` bytes apart. Arguments: head f32, first element.
    /// `None` for caches of codes.
    pub(crate) fn store_key(&self, kv: KvType, step: usize) -> AsmResult<Option<Vec<u8>>> {
        let mut s = Asm::new(self.level)?;
        match kv {
            KvType::F32 => {
                for d in 0..self.head_dim {
                    s.a.mov(eax, dword_ptr(rdi + 4 * d as i32))?;
                    s.a.mov(dword_ptr(rsi + (d * step) as i32), eax)?;
                }
            }
            KvType::F16 => {
                for first in (0..self.head_dim).step_by(PART) {
                    let part = PART.min(self.head_dim - first);
                    for at in (0..part).step_by(self.level.lanes()) {
                        let to = Mem::below(rsp, 2 * PART).plus(2 * at);
                        self.store_halves(&mut s, Mem::at(rdi, 4 * (first + at)), to)?;
                    }
                    for d in 0..part {
                        s.a.mov(ax, word_ptr(rsp - (2 * PART) as i32 + 2 * d as i32))?;
                        s.a.mov(word_ptr(rsi + ((first + d) * step) as i32), ax)?;
                    }
                }
            }
            KvType::Int8 | KvType::Int4 => return Ok(None),
        }
        s.finish().map(Some)
    }

    /// Stores a head as a value of a page. Arguments: head f32, first element. `None` for caches of codes.
    pub(crate) fn store_value(&self, kv: KvType) -> AsmResult<Option<Vec<u8>>> {
        let mut s = Asm::new(self.level)?;
        for at in self.vectors() {
            match kv {
                KvType::F32 => {
                    s.vmovups(V(0), Mem::at(rdi, at))?;
                    s.store(Mem::at(rsi, at), V(0))?;
                }
                KvType::F16 => self.store_halves(&mut s, Mem::at(rdi, at), Mem::at(rsi, at / 2))?,
                KvType::Int8 | KvType::Int4 => return Ok(None),
            }
        }
        s.finish().map(Some)
    }

    /// A vector as f16, zero where it would be subnormal, as the portable kernels store it.
    fn store_halves(&self, s: &mut Asm, from: Mem, to: Mem) -> AsmResult<()> {
        s.vmovups(V(0), from)?;
        s.zero_below(V(0), 0x3880_0000, [V(1), V(2)])?;
        s.vcvtps2ph(to, V(0))
    }

    /// Multiplies the query heads of some tokens. Arguments: first token's heads, to `[tokens, group, Dh]`, tokens.
    pub(crate) fn scale_queries(&self, group: usize, scale: f32, from_stride: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let constant = s.constant(scale.to_bits());
        s.broadcast(V(0), constant)?;
        s.repeat(rdx, 1, |s| {
            s.a.mov(rax, group as i64)?;
            s.repeat(rax, 1, |s| {
                for at in self.vectors() {
                    s.vmulps(V(1), V(0), Mem::at(rdi, at))?;
                    s.store(Mem::at(rsi, at), V(1))?;
                }
                s.a.add(rdi, self.bytes() as i32)?;
                s.a.add(rsi, self.bytes() as i32)
            })?;
            s.a.add(rdi, (from_stride - group * self.bytes()) as i32)
        })?;
        s.finish()
    }

    /// Zeroes heads. Arguments: heads, their number.
    pub(crate) fn zero(&self) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        s.zero(V(0))?;
        s.repeat(rsi, 1, |s| {
            for at in self.vectors() {
                s.store(Mem::at(rdi, at), V(0))?;
            }
            s.a.add(rdi, self.bytes() as i32)
        })?;
        s.finish()
    }

    /// Copies a head. Arguments: to, from.
    pub(crate) fn copy(&self) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        for at in self.vectors() {
            s.vmovups(V(0), Mem::at(rsi, at))?;
            s.store(Mem::at(rdi, at), V(0))?;
        }
        s.finish()
    }

    /// Joins sums of weighted values of two spans. Arguments: sums, those of the later span, maximum, total, those of the
    /// later span.
    pub(crate) fn join(&self) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        s.a.vmovss(xmm0, dword_ptr(rdx))?;
        s.a.vmovss(xmm1, dword_ptr(r8))?;
        s.a.vmaxss(xmm2, xmm0, xmm1)?;
        let mut finite = s.a.create_label();
        s.a.vmovss(dword_ptr(rdx), xmm2)?;
        // Differences are taken to 0 in place of minus infinity.
        s.a.vmovd(eax, xmm2)?;
        s.a.cmp(eax, f32::NEG_INFINITY.to_bits() as i32)?;
        s.a.jne(finite)?;
        s.a.vxorps(xmm2, xmm2, xmm2)?;
        s.a.set_label(&mut finite)?;
        s.a.vsubss(xmm0, xmm0, xmm2)?;
        s.a.vsubss(xmm1, xmm1, xmm2)?;
        s.a.vunpcklps(xmm0, xmm0, xmm1)?;
        s.exp2_up_to_0(V(0), [V(5), V(6)])?;
        s.a.vpermilps(xmm1, xmm0, 0b01)?;
        s.a.vmovss(xmm3, dword_ptr(rcx))?;
        s.a.vmovss(xmm4, dword_ptr(r9))?;
        s.a.vmulss(xmm3, xmm3, xmm0)?;
        s.a.vfmadd231ss(xmm3, xmm4, xmm1)?;
        s.a.vmovss(dword_ptr(rcx), xmm3)?;
        s.splat(V(2), V(0))?;
        s.splat(V(3), V(1))?;
        for at in self.vectors() {
            s.vmulps(V(4), V(2), Mem::at(rdi, at))?;
            s.vfmadd231ps(V(4), V(3), Mem::at(rsi, at))?;
            s.store(Mem::at(rdi, at), V(4))?;
        }
        s.finish()
    }

    /// Divides the sums of `group` heads by their totals and quantizes the quotients. Arguments: sums, totals, codes of
    /// the first head's first group, its scale. `None` where heads are no whole groups.
    pub(crate) fn finish(&self, group: usize, layout: &ActInt8Layout) -> AsmResult<Option<Vec<u8>>> {
        const GROUP: usize = ActInt8Layout::GROUP;
        if !self.head_dim.is_multiple_of(GROUP) {
            return Ok(None);
        }
        let mut s = Asm::new(self.level)?;
        let total = V(9);
        s.a.mov(r8, group as i64)?;
        s.repeat(r8, 1, |s| {
            s.broadcast(total, Mem::at(rsi, 0))?;
            for first in (0..self.bytes()).step_by(4 * GROUP) {
                for i in 0..GROUP / self.level.lanes() {
                    s.vmovups(value(i), Mem::at(rdi, first + i * self.level.bytes()))?;
                    s.vdivps(value(i), value(i), total)?;
                }
                quantize_group(s, rdx, rcx, layout)?;
                s.a.add(rdx, GROUP as i32)?;
                s.a.add(rcx, 4)?;
            }
            s.a.add(rdi, self.bytes() as i32)?;
            s.a.add(rsi, 4)
        })?;
        s.finish().map(Some)
    }
}
