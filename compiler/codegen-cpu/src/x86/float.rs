//! Contraction of f32 or bf16 weights with f32 activations, 256 or 512 bits wide.
//!
//! Lanes are output channels. Each channel has one accumulator over ascending inputs, whatever the number of rows, as in
//! the portable kernels.

use super::asm::AsmResult;
use super::{Asm, Level, Mem, Src, V};
use attar_format::{DType, PackedLayout, Value};
use iced_x86::code_asm::{ptr, r9, r10, rax, rcx, rdi, rdx, rsi};

/// Rows of codes between two looks at the loop counter.
const UNROLL: usize = 4;

/// Inner functions for the weights of one shape and format.
#[derive(Clone, Copy)]
pub(crate) struct FloatKernel<'a> {
    pub(crate) level: Level,
    pub(crate) layout: &'a PackedLayout,
}

impl FloatKernel<'_> {
    /// Rows of a full tile.
    fn tile_rows(&self) -> usize {
        if self.level.is_512() { 8 } else { 4 }
    }

    /// Most blocks that are multiplied together.
    pub(crate) fn panel_blocks(&self) -> usize {
        if self.level.is_512() { 2 } else { 1 }
    }

    /// Multiplies rows with `blocks` neighbouring blocks. Arguments: x f32 `[rows][k]`, first block, sums f32
    /// `[rows][sums_stride]`, rows, prefetch distance.
    pub(crate) fn multiply(&self, blocks: usize, sums_stride: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        // The distance is the fifth argument.
        s.a.mov(r9, iced_x86::code_asm::r8)?;
        let mut done = s.a.create_label();
        for rows in [self.tile_rows(), 2, 1] {
            let (mut top, mut next) = (s.a.create_label(), s.a.create_label());
            s.a.set_label(&mut top)?;
            s.a.cmp(rcx, rows as i32)?;
            s.a.jl(next)?;
            self.tile(&mut s, blocks, rows, sums_stride)?;
            s.a.add(rdi, (rows * self.layout.k * 4) as i32)?;
            s.a.add(rdx, (rows * sums_stride) as i32)?;
            s.a.sub(rcx, rows as i32)?;
            s.a.jz(done)?;
            s.a.jmp(top)?;
            s.a.set_label(&mut next)?;
            s.a.nop()?;
        }
        s.a.set_label(&mut done)?;
        s.finish()
    }

    fn bf16(&self) -> bool {
        self.layout.format.value == Value::Float(DType::BF16)
    }

    fn tile(&self, s: &mut Asm, blocks: usize, rows: usize, sums_stride: usize) -> AsmResult<()> {
        let vectors = blocks * self.level.parts();
        let acc = |r: usize, v: usize| V((r * vectors + v) as u8);
        for r in 0..rows {
            for v in 0..vectors {
                s.zero(acc(r, v))?;
            }
        }
        s.a.mov(rax, rdi)?;
        s.a.lea(r10, ptr(rsi + self.layout.codes_offset as i32))?;
        // A half row of codes stands at the end when K is odd.
        let whole = self.layout.k / self.layout.k_per_row;
        let counter = iced_x86::code_asm::r8;
        if whole >= UNROLL {
            s.a.mov(counter, (whole / UNROLL) as i64)?;
            s.repeat(counter, 1, |s| {
                for i in 0..UNROLL {
                    for b in 0..blocks {
                        let at = b * self.layout.block_bytes + i * 64;
                        s.a.prefetcht0(ptr(r10 + r9 + at as i32))?;
                    }
                    self.row(s, blocks, rows, i, self.layout.k_per_row)?;
                }
                s.a.add(rax, (UNROLL * self.layout.k_per_row * 4) as i32)?;
                s.a.add(r10, (UNROLL * 64) as i32)
            })?;
        }
        for i in 0..whole % UNROLL {
            self.row(s, blocks, rows, i, self.layout.k_per_row)?;
        }
        let left = self.layout.k % self.layout.k_per_row;
        if left > 0 {
            self.row(s, blocks, rows, whole % UNROLL, left)?;
        }
        for r in 0..rows {
            for v in 0..vectors {
                s.store(Mem::at(rdx, r * sums_stride + v * self.level.bytes()), acc(r, v))?;
            }
        }
        Ok(())
    }

    /// One row of codes: `inputs` inputs of every channel.
    fn row(&self, s: &mut Asm, blocks: usize, rows: usize, i: usize, inputs: usize) -> AsmResult<()> {
        let parts = self.level.parts();
        let vectors = blocks * parts;
        let acc = |r: usize, v: usize| V((r * vectors + v) as u8);
        let first = (rows * vectors) as u8;
        for k in 0..inputs {
            for v in 0..vectors {
                let at = v / parts * self.layout.block_bytes + v % parts * self.level.bytes() + i * 64;
                let w = V(first + v as u8);
                s.vmovups(w, Mem::at(r10, at))?;
                if self.bf16() && k == 0 {
                    s.vpslld(w, w, 16)?;
                } else if self.bf16() {
                    let upper = s.constant(0xffff_0000);
                    s.vpand(w, w, Src::Bcst(upper))?;
                }
            }
            for r in 0..rows {
                let x = Mem::at(rax, r * self.layout.k * 4 + (i * self.layout.k_per_row + k) * 4);
                let x = if self.level.is_512() {
                    Src::Bcst(x)
                } else {
                    s.broadcast(V(15), x)?;
                    Src::Reg(V(15))
                };
                for v in 0..vectors {
                    s.vfmadd231ps(acc(r, v), V(first + v as u8), x)?;
                }
            }
        }
        Ok(())
    }
}
