//! Contraction of integer weights with int8 activations, 256 or 512 bits wide.
//!
//! Lanes are output channels, so nothing is summed across a register. Within a group of 32 inputs all is exact; then
//! `sum[c] += f32(dot) * (scale[c, g] * x_scale[g])`, g ascending, and in the end the row scale: the arithmetic of
//! the portable kernels, step by step, whatever the number of rows. So a row's sums are the same bits everywhere.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes: weights are biased by 128, and `128 * sum x` is taken off again.
//! `vpmaddubsw` would saturate on biased weights: it gets magnitudes of activations and weights with their signs.

use super::asm::AsmResult;
use super::{Asm, Dot, Level, Mem, Src, V};
use attar_format::planes::planes;
use attar_format::{CHANNELS, PackedLayout, Scale};
use attar_kernel::ActInt8Layout;
use iced_x86::Register;
use iced_x86::code_asm::{
    AsmRegister64, byte_ptr, dword_ptr, eax, ptr, r8, r9, r10, r12, r13, rax, rbp, rbx, rcx, rdi, rdx, rsi,
    rsp,
};

const GROUP: usize = ActInt8Layout::GROUP;
/// Quads of inputs of a group.
const QUADS: usize = GROUP / 4;
/// Numbers of rows whose sums stay in registers while a few rows are multiplied.
const HELD_ROWS: [usize; 3] = [4, 3, 2];
/// What is added to weights to make them unsigned.
const BIAS: i32 = 128;

/// Inner functions for the weights of one shape and format.
#[derive(Clone, Copy)]
pub(crate) struct IntKernel<'a> {
    pub(crate) level: Level,
    pub(crate) layout: &'a PackedLayout,
}

/// A range of groups that a panel of decoded weights holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: usize,
    pub(crate) groups: usize,
}

/// What stays in registers while weights are decoded.
pub(super) struct Tables {
    /// The table's entries by sixteens, in every 128 bits, as far as there are registers for them; or what turns signed
    /// weights into biased ones.
    table: [V; 4],
    /// The bits of every byte that belong to the first plane's pair of quads.
    low: V,
    /// Where codes have 3 bits: the same of the second plane, or with 512 bits those of its even pairs.
    high: V,
    /// With 512 bits and codes of more than 4: bit 0 of every byte, and in the registers behind it bits 1 to 7.
    bits: V,
    /// The tensor's header.
    header: AsmRegister64,
    /// Whether weights are to come out biased.
    biased: bool,
    /// Per choice: what its shift and the bias contribute to a dot product per unit of the activations' sum (f32), or
    /// the shift itself as bytes.
    choices: V,
}

/// Registers that decoding may use.
#[derive(Clone, Copy)]
pub(super) struct Room {
    /// Weights come out here, or in `spare` with 512 bits.
    pub(super) w: [V; 2],
    /// A row of the second plane.
    pub(super) high: V,
    pub(super) spare: [V; 2],
}

impl IntKernel<'_> {
    fn table_format(&self) -> bool {
        self.layout.format.table().is_some()
    }

    fn biased(&self) -> bool {
        self.level.dot != Dot::Maddubs
    }

    fn x(&self) -> ActInt8Layout {
        ActInt8Layout::new(self.layout.k)
    }

    /// Bytes of codes of one group of a block.
    fn group_bytes(&self) -> usize {
        self.layout.format.group_rows() * 64
    }

    fn field_bytes(&self) -> usize {
        CHANNELS * self.layout.format.field_bytes()
    }

    /// Rows of a full tile of [`IntKernel::multiply`].
    pub(crate) fn tile_rows(&self) -> usize {
        if self.level.is_512() { 7 } else { 3 }
    }

    /// Most blocks of a panel.
    pub(crate) fn panel_blocks(&self) -> usize {
        if self.level.is_512() { 2 } else { 1 }
    }

    /// Bytes of an unpacked group of `blocks` blocks: `[QUADS][blocks]` weights, then `[blocks]` scales.
    pub(crate) fn panel_group_bytes(&self, blocks: usize) -> usize {
        (QUADS + 1) * blocks * 64
    }

    /// One row. Arguments: x, first block, header, sums f32 `[blocks][16]`, number of blocks, prefetch distance.
    pub(crate) fn one(&self) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let saved = [rbx, r12, r13];
        push(&mut s, &saved)?;
        let t = self.tables(&mut s, rdx, self.biased(), true)?;
        let x = self.x();
        let mut next_block = s.a.create_label();
        s.a.set_label(&mut next_block)?;
        self.prefetch_fields(&mut s, rsi)?;
        s.a.mov(rax, rdi)?;
        s.a.lea(r10, ptr(rdi + x.scales_offset as i32))?;
        s.a.lea(rbx, ptr(rsi + self.layout.codes_offset as i32))?;
        s.a.lea(r12, ptr(rsi + self.layout.fields_offset as i32))?;
        let parts = self.level.parts();
        // After the tables: sums of each part, two accumulators, three temporaries, the decoded weights.
        let sum = |p: usize| V(3 + p as u8);
        for p in 0..parts {
            s.zero(sum(p))?;
        }
        s.a.mov(r13, self.layout.groups as i64)?;
        s.repeat(r13, 1, |s| {
            self.prefetch(s, rbx, r9)?;
            for p in 0..parts {
                let (acc, scale, correction) = ([V(5), V(6)], V(7), V(8));
                let room = self.room();
                for a in acc {
                    s.zero(a)?;
                }
                self.decode(s, &t, self.part(rbx, p), room, |s, quad, w| {
                    self.dot(s, acc[quad % 2], w, Mem::at(rax, 4 * quad), V(11), V(12))
                })?;
                s.vpaddd(acc[0], acc[0], acc[1])?;
                self.fields(s, &t, self.field(r12, p), scale, Some(correction))?;
                self.add_group(s, sum(p), acc[0], scale, Some(correction), r10, V(11))?;
            }
            self.next_group(s, rax, r10)
        })?;
        for p in 0..parts {
            self.row_scale(&mut s, sum(p), rsi, p)?;
            s.store(Mem::at(rcx, p * self.level.bytes()), sum(p))?;
        }
        s.a.add(rcx, 64)?;
        s.a.add(rsi, self.layout.block_bytes as i32)?;
        s.a.dec(r8)?;
        s.a.jnz(next_block)?;
        pop(&mut s, &saved)?;
        s.finish()
    }

    /// A few rows of `blocks` blocks with each weight decoded once into a register; 512 bits only. Arguments: x, first block,
    /// header, sums f32 `[rows][sums_stride]`, rows, prefetch distance.
    pub(crate) fn small(&self, blocks: usize, sums_stride: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let saved = [rbx, rbp, r12, r13];
        push(&mut s, &saved)?;
        let t = self.tables(&mut s, rdx, self.biased(), false)?;
        let x = self.x();
        let weight = |quad: usize| V(16 + quad as u8);
        let (acc, odd, sum, scale, shift, none) = (V(5), V(6), V(7), V(8), V(9), V(12));
        s.a.lea(rdx, ptr(rdi + x.scales_offset as i32))?;
        s.a.mov(r10, blocks as i64)?;
        let mut done = s.a.create_label();
        for rows in HELD_ROWS {
            let mut other = s.a.create_label();
            s.a.cmp(r8, rows as i32)?;
            s.a.jne(other)?;
            self.held(&mut s, &t, rows, sums_stride)?;
            s.a.jmp(done)?;
            s.a.set_label(&mut other)?;
            s.a.nop()?;
        }
        s.zero(none)?;
        s.repeat(r10, 1, |s| {
            self.prefetch_fields(s, rsi)?;
            // The first group stores its sums, the others add to them.
            each_row(s, rcx, sums_stride, |s| s.store(Mem::at(rbp, 0), none))?;
            s.a.lea(rbx, ptr(rsi + self.layout.codes_offset as i32))?;
            s.a.lea(r12, ptr(rsi + self.layout.fields_offset as i32))?;
            s.a.mov(r13, self.layout.groups as i64)?;
            s.repeat(r13, 1, |s| {
                self.prefetch(s, rbx, r9)?;
                self.fields(s, &t, self.field(r12, 0), scale, Some(shift))?;
                let room = Room { w: [V(10), V(11)], high: V(3), spare: [V(4), V(6)] };
                self.decode(s, &t, Mem::at(rbx, 0), room, |s, quad, w| {
                    if self.table_format() {
                        s.vpaddb(weight(quad), w, shift)
                    } else {
                        s.vmovups(weight(quad), w)
                    }
                })?;
                s.a.push(rdi)?;
                s.a.push(rdx)?;
                each_row(s, rcx, sums_stride, |s| {
                    // The bias's share comes off first.
                    s.broadcast(acc, Mem::at(rdx, x.sums_offset - x.scales_offset))?;
                    s.vpslld(acc, acc, BIAS.trailing_zeros())?;
                    s.vpsubd(acc, none, acc)?;
                    // Two sums, for each product waits for the one before.
                    s.zero(odd)?;
                    for quad in 0..QUADS {
                        let to = if quad % 2 == 0 { acc } else { odd };
                        s.vpdpbusd(to, weight(quad), Src::Bcst(Mem::at(rdi, 4 * quad)))?;
                    }
                    s.vpaddd(acc, acc, odd)?;
                    s.vmovups(sum, Mem::at(rbp, 0))?;
                    self.add_group(s, sum, acc, scale, None, rdx, V(10))?;
                    s.store(Mem::at(rbp, 0), sum)?;
                    s.a.add(rdi, x.stride as i32)?;
                    s.a.add(rdx, x.stride as i32)
                })?;
                s.a.pop(rdx)?;
                s.a.pop(rdi)?;
                self.next_group(s, rdi, rdx)
            })?;
            if self.row_scaled() {
                each_row(s, rcx, sums_stride, |s| {
                    s.vmovups(sum, Mem::at(rbp, 0))?;
                    self.row_scale(s, sum, rsi, 0)?;
                    s.store(Mem::at(rbp, 0), sum)
                })?;
            }
            self.next_block(s)
        })?;
        s.a.set_label(&mut done)?;
        s.a.nop()?;
        pop(&mut s, &saved)?;
        s.finish()
    }

    /// [`IntKernel::small`] for so few rows that their sums stay in registers: rdi codes, rdx scales, rsi first block, rcx sums, r9
    /// prefetch distance, r10 blocks.
    fn held(&self, s: &mut Asm, t: &Tables, rows: usize, sums_stride: usize) -> AsmResult<()> {
        let x = self.x();
        let (sum, acc) = (|r: usize| V(16 + r as u8), |r: usize| V(20 + r as u8));
        let (scale, shift, zero, factor) = (V(8), V(9), V(12), V(5));
        let room = Room { w: [V(10), V(11)], high: V(3), spare: [V(4), V(6)] };
        s.zero(zero)?;
        s.repeat(r10, 1, |s| {
            self.prefetch_fields(s, rsi)?;
            for r in 0..rows {
                s.zero(sum(r))?;
            }
            s.a.lea(rbx, ptr(rsi + self.layout.codes_offset as i32))?;
            s.a.lea(r12, ptr(rsi + self.layout.fields_offset as i32))?;
            s.a.mov(r13, self.layout.groups as i64)?;
            s.repeat(r13, 1, |s| {
                self.prefetch(s, rbx, r9)?;
                self.fields(s, t, self.field(r12, 0), scale, Some(shift))?;
                for r in 0..rows {
                    // The bias's share comes off first.
                    let x_sum = Mem::at(rdx, r * x.stride + x.sums_offset - x.scales_offset);
                    s.broadcast(acc(r), x_sum)?;
                    s.vpslld(acc(r), acc(r), BIAS.trailing_zeros())?;
                    s.vpsubd(acc(r), zero, acc(r))?;
                }
                self.decode(s, t, Mem::at(rbx, 0), room, |s, quad, w| {
                    if self.table_format() {
                        s.vpaddb(w, w, shift)?;
                    }
                    (0..rows).try_for_each(|r| {
                        s.vpdpbusd(acc(r), w, Src::Bcst(Mem::at(rdi, r * x.stride + 4 * quad)))
                    })
                })?;
                for r in 0..rows {
                    s.vmulps(factor, scale, Src::Bcst(Mem::at(rdx, r * x.stride)))?;
                    s.vcvtdq2ps(acc(r), acc(r))?;
                    s.vfmadd231ps(sum(r), acc(r), factor)?;
                }
                self.next_group(s, rdi, rdx)
            })?;
            for r in 0..rows {
                self.row_scale(s, sum(r), rsi, 0)?;
                s.store(Mem::at(rcx, r * sums_stride), sum(r))?;
            }
            self.next_block(s)
        })
    }

    /// On to the next group: codes and scales of activations, and rbx and r12 at those of the block.
    fn next_group(&self, s: &mut Asm, x: AsmRegister64, scales: AsmRegister64) -> AsmResult<()> {
        s.a.add(x, GROUP as i32)?;
        s.a.add(scales, 4)?;
        s.a.add(rbx, self.group_bytes() as i32)?;
        s.a.add(r12, self.field_bytes() as i32)
    }

    /// From the end of a block to the next of a few rows: rdi and rdx back to their first group, rsi and rcx on.
    fn next_block(&self, s: &mut Asm) -> AsmResult<()> {
        s.a.sub(rdi, (GROUP * self.layout.groups) as i32)?;
        s.a.sub(rdx, (4 * self.layout.groups) as i32)?;
        s.a.add(rsi, self.layout.block_bytes as i32)?;
        s.a.add(rcx, (4 * CHANNELS) as i32)
    }

    /// Decodes groups of `blocks` neighbouring blocks into a panel. Arguments: first block, header, panel.
    pub(crate) fn unpack(&self, blocks: usize, span: Span) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let t = self.tables(&mut s, rsi, self.biased(), false)?;
        s.a.add(rdi, (span.first * self.group_bytes() + self.layout.codes_offset) as i32)?;
        // Fields are as far from the codes as from one group to the next: two pointers move together.
        s.a.lea(
            r8,
            ptr(rdi + (span.first * self.field_bytes() + self.layout.fields_offset) as i32
                - (span.first * self.group_bytes() + self.layout.codes_offset) as i32),
        )?;
        s.a.mov(rcx, span.groups as i64)?;
        let bytes = self.level.bytes();
        s.repeat(rcx, 1, |s| {
            for b in 0..blocks {
                let block = b * self.layout.block_bytes;
                if b > 0 {
                    s.a.add(rdi, block as i32)?;
                    s.a.add(r8, block as i32)?;
                }
                for p in 0..self.level.parts() {
                    let at = |slot: usize| Mem::at(rdx, (slot * blocks + b) * 64 + p * bytes);
                    let (scale, shift) = (V(7), V(8));
                    self.fields(s, &t, self.field(r8, p), scale, Some(shift))?;
                    s.store(at(QUADS), scale)?;
                    self.decode(s, &t, self.part(rdi, p), self.room(), |s, quad, w| {
                        if self.table_format() {
                            s.vpaddb(w, w, shift)?;
                        }
                        s.store(at(quad), w)
                    })?;
                }
                if b > 0 {
                    s.a.sub(rdi, block as i32)?;
                    s.a.sub(r8, block as i32)?;
                }
            }
            s.a.add(rdi, self.group_bytes() as i32)?;
            s.a.add(r8, self.field_bytes() as i32)?;
            s.a.add(rdx, self.panel_group_bytes(blocks) as i32)
        })?;
        s.finish()
    }

    /// Multiplies rows with a panel. Arguments: x, panel, sums f32 `[rows][sums_stride]` (`blocks` blocks of them),
    /// rows, first block. A span that starts at 0 begins the sums; the one that ends at K applies the row scales.
    pub(crate) fn multiply(&self, blocks: usize, span: Span, sums_stride: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let saved = [rbx, rbp, r12, r13];
        push(&mut s, &saved)?;
        let x = self.x();
        let room = if self.biased() { self.tile_rows() * self.sums_room(span) } else { 0 };
        if room > 0 {
            s.a.sub(rsp, room as i32)?;
        }
        s.a.lea(rbp, ptr(rdi + (x.scales_offset + 4 * span.first) as i32))?;
        s.a.add(rdi, (GROUP * span.first) as i32)?;
        let mut done = s.a.create_label();
        for rows in [self.tile_rows(), 1] {
            let (mut top, mut next) = (s.a.create_label(), s.a.create_label());
            s.a.set_label(&mut top)?;
            s.a.cmp(rcx, rows as i32)?;
            s.a.jl(next)?;
            self.tile(&mut s, blocks, rows, span, sums_stride)?;
            s.a.add(rdi, (rows * x.stride) as i32)?;
            s.a.add(rbp, (rows * x.stride) as i32)?;
            s.a.add(rdx, (rows * sums_stride) as i32)?;
            s.a.sub(rcx, rows as i32)?;
            s.a.jz(done)?;
            s.a.jmp(top)?;
            s.a.set_label(&mut next)?;
            s.a.nop()?;
        }
        s.a.set_label(&mut done)?;
        if room > 0 {
            s.a.add(rsp, room as i32)?;
        }
        pop(&mut s, &saved)?;
        s.finish()
    }

    /// Bytes kept per row for what the bias contributes to each group.
    fn sums_room(&self, span: Span) -> usize {
        (4 * span.groups).next_multiple_of(64)
    }

    /// `rows` rows against the panel: rdi codes, rbp scales, rsi panel, rdx sums, r8 first block.
    fn tile(&self, s: &mut Asm, blocks: usize, rows: usize, span: Span, sums_stride: usize) -> AsmResult<()> {
        let x = self.x();
        let parts = self.level.parts();
        let vectors = blocks * parts;
        let int = |r: usize, v: usize| V((r * vectors + v) as u8);
        let float = |r: usize, v: usize| V((rows * vectors + r * vectors + v) as u8);
        let free = (2 * rows * vectors) as u8;
        let vector_bytes = self.level.bytes();
        let sum_at = |r: usize, v: usize| Mem::at(rdx, r * sums_stride + v * vector_bytes);
        let room = self.sums_room(span);
        if self.biased() {
            // -128 times the sum of each group's codes.
            let (zero, v) = (int(0, 0), V(free));
            s.zero(zero)?;
            for r in 0..rows {
                for at in (0..room).step_by(vector_bytes) {
                    s.vmovups(v, Mem::at(rbp, r * x.stride + x.sums_offset - x.scales_offset + at))?;
                    s.vpslld(v, v, BIAS.trailing_zeros())?;
                    s.vpsubd(v, zero, v)?;
                    s.store(Mem::at(rsp, r * room + at), v)?;
                }
            }
        }
        for r in 0..rows {
            for v in 0..vectors {
                if span.first == 0 { s.zero(float(r, v))? } else { s.vmovups(float(r, v), sum_at(r, v))? }
            }
        }
        // Codes, scales, panel and the bias's share move along.
        s.a.mov(rax, rdi)?;
        s.a.mov(r10, rbp)?;
        s.a.mov(r9, rsi)?;
        s.a.mov(rbx, rsp)?;
        s.a.mov(r12, span.groups as i64)?;
        let ones = V(14);
        if !self.biased() {
            let one = s.constant(0x0001_0001);
            s.broadcast(ones, one)?;
        }
        s.repeat(r12, 1, |s| {
            for r in 0..rows {
                for v in 0..vectors {
                    if !self.biased() {
                        s.zero(int(r, v))?;
                    } else if v == 0 {
                        s.broadcast(int(r, v), Mem::at(rbx, r * room))?;
                    } else {
                        s.vmovups(int(r, v), int(r, 0))?;
                    }
                }
            }
            let codes = if self.level.is_512() { V(free + vectors as u8) } else { V(15) };
            let panel = |slot: usize, v: usize| Mem::at(r9, slot * blocks * 64 + v * vector_bytes);
            for quad in 0..QUADS {
                let code = |r: usize| Mem::at(rax, r * x.stride + 4 * quad);
                if self.biased() {
                    for v in 0..vectors {
                        s.vmovups(V(free + v as u8), panel(quad, v))?;
                    }
                    for r in 0..rows {
                        let operand = if self.level.is_512() {
                            Src::Bcst(code(r))
                        } else {
                            s.broadcast(codes, code(r))?;
                            Src::Reg(codes)
                        };
                        for v in 0..vectors {
                            s.vpdpbusd(int(r, v), V(free + v as u8), operand)?;
                        }
                    }
                } else {
                    let (size, product) = (V(12), V(13));
                    for r in 0..rows {
                        s.broadcast(codes, code(r))?;
                        s.vpabsb(size, codes)?;
                        for v in 0..vectors {
                            s.vmovups(product, panel(quad, v))?;
                            s.vpsignb(product, product, codes)?;
                            s.vpmaddubsw(product, size, product)?;
                            s.vpmaddwd(product, product, ones)?;
                            s.vpaddd(int(r, v), int(r, v), product)?;
                        }
                    }
                }
            }
            if self.level.is_512() {
                let factor = V(free + vectors as u8 + 1);
                for v in 0..vectors {
                    s.vmovups(V(free + v as u8), panel(QUADS, v))?;
                }
                for r in 0..rows {
                    s.broadcast(codes, Mem::at(r10, r * x.stride))?;
                    for v in 0..vectors {
                        s.vmulps(factor, V(free + v as u8), codes)?;
                        s.vcvtdq2ps(int(r, v), int(r, v))?;
                        s.vfmadd231ps(float(r, v), int(r, v), factor)?;
                    }
                }
            } else {
                let (scale, factor) = (V(12), V(13));
                for v in 0..vectors {
                    s.vmovups(scale, panel(QUADS, v))?;
                    for r in 0..rows {
                        s.vmulps(factor, scale, Src::Bcst(Mem::at(r10, r * x.stride)))?;
                        s.vcvtdq2ps(int(r, v), int(r, v))?;
                        s.vfmadd231ps(float(r, v), int(r, v), factor)?;
                    }
                }
            }
            s.a.add(rax, GROUP as i32)?;
            s.a.add(r10, 4)?;
            s.a.add(rbx, 4)?;
            s.a.add(r9, self.panel_group_bytes(blocks) as i32)
        })?;
        let last = span.first + span.groups == self.layout.groups;
        for v in 0..vectors {
            for r in 0..rows {
                if last {
                    let (b, p) = (v / parts, v % parts);
                    if self.row_scaled() {
                        let at = b * self.layout.block_bytes + p * vector_bytes;
                        s.vmulps(float(r, v), float(r, v), Mem::at(r8, at))?;
                    }
                }
                s.store(sum_at(r, v), float(r, v))?;
            }
        }
        Ok(())
    }

    fn row_scaled(&self) -> bool {
        matches!(self.layout.format.scale, Scale::RowF32Field8 { .. })
    }

    /// One part of a group's codes.
    fn part(&self, codes: AsmRegister64, part: usize) -> Mem {
        Mem::at(codes, part * self.level.bytes())
    }

    /// One part of a group's fields.
    fn field(&self, fields: AsmRegister64, part: usize) -> Mem {
        Mem::at(fields, part * self.level.lanes() * self.layout.format.field_bytes())
    }

    /// Registers for decoding beside [`IntKernel::one`]'s others; [`IntKernel::dot`] uses the spare ones too.
    pub(super) fn room(&self) -> Room {
        let high = if self.level.is_512() { V(4) } else { V(14) };
        Room { w: [V(9), V(10)], high, spare: [V(11), V(12)] }
    }

    /// Loads the table and makes the choices' from the tensor's header. Uses V0 to V2 and V13 on, and with 512 bits
    /// V24 to V31.
    pub(super) fn tables(
        &self,
        s: &mut Asm,
        header: AsmRegister64,
        biased: bool,
        as_floats: bool,
    ) -> AsmResult<Tables> {
        let t = Tables {
            table: [V(0), V(13), V(14), V(15)],
            low: V(1),
            high: V(13),
            choices: V(2),
            bits: V(24),
            header,
            biased,
        };
        let bias = if biased { BIAS } else { 0 };
        let Some(bits) = self.layout.format.table().map(|t| t.bits) else {
            if biased {
                let flip = s.constant(0x8080_8080);
                s.broadcast(t.table[0], flip)?;
                let all = s.constant((-(bias as f32)).to_bits());
                s.broadcast(t.choices, all)?;
            } else {
                s.zero(t.choices)?;
            }
            return Ok(t);
        };
        for (i, table) in t.table.into_iter().enumerate().take(self.table_registers(bits)) {
            s.broadcast16(table, Mem::at(header, 16 * i))?;
            if biased && self.biased_tables(bits) {
                let flip = s.constant(0x8080_8080);
                s.vpxor(table, table, Src::Bcst(flip))?;
            }
        }
        let low = s.constant(if bits < 4 { 0x3333_3333 } else { 0x0f0f_0f0f });
        s.broadcast(t.low, low)?;
        if bits == 3 {
            let high = s.constant(if self.level.is_512() { 0x5555_5555 } else { 0x4444_4444 });
            s.broadcast(t.high, high)?;
        }
        if bits > 4 && self.level.is_512() {
            for bit in 0..8u8 {
                let constant = s.constant(0x0101_0101 << bit);
                s.broadcast(V(t.bits.0 + bit), constant)?;
            }
        }
        // Four entries below the stack pointer, where the convention leaves room.
        for choice in 0..4i32 {
            s.a.movsx(eax, byte_ptr(header + self.layout.shift_position() as i32))?;
            s.a.imul_3(eax, eax, choice)?;
            if as_floats {
                s.a.sub(eax, bias)?;
            } else {
                s.a.and(eax, 0xff)?;
                s.a.imul_3(eax, eax, 0x0101_0101)?;
            }
            s.a.mov(dword_ptr(rsp - 16 + 4 * choice), eax)?;
        }
        s.broadcast16(t.choices, below_stack())?;
        if as_floats {
            s.vcvtdq2ps(t.choices, t.choices)?;
        }
        Ok(t)
    }

    /// Sixteens of entries that are kept in registers.
    fn table_registers(&self, bits: usize) -> usize {
        let all = (1usize << bits).div_ceil(16);
        if self.level.is_512() { all } else { all.min(2) }
    }

    /// Whether tables in registers are biased, not the weights that come out of them.
    fn biased_tables(&self, bits: usize) -> bool {
        self.table_registers(bits) == (1usize << bits).div_ceil(16)
    }

    /// Decodes one part of a group, quad after quad: signed weights, or biased ones.
    pub(super) fn decode(
        &self,
        s: &mut Asm,
        t: &Tables,
        codes: Mem,
        room: Room,
        mut each: impl FnMut(&mut Asm, usize, V) -> AsmResult<()>,
    ) -> AsmResult<()> {
        let w = room.w;
        let Some(bits) = self.layout.format.table().map(|t| t.bits) else {
            for quad in 0..QUADS {
                let from = codes.plus(quad * 64);
                let w = w[quad % 2];
                if t.biased {
                    s.vpxor(w, t.table[0], from)?
                } else {
                    s.vmovups(w, from)?
                }
                each(s, quad, w)?;
            }
            return Ok(());
        };
        let planes = planes(bits);
        let mut high_row = None;
        for pair in 0..QUADS / 2 {
            let quad = 2 * pair;
            if let Some(plane) = planes.get(1) {
                let (row, _) = plane.place(quad);
                if high_row != Some(row) {
                    let from = codes.plus(row * 64);
                    if bits == 3 && self.level.is_512() {
                        // Those of even pairs, and those of odd ones: moved to where a pair's bits belong, either leaves
                        // nothing but zeros beside them.
                        s.vpand(room.high, t.high, from)?;
                        s.vpxor(room.spare[0], room.high, from)?;
                    } else {
                        s.vmovups(room.high, from)?;
                    }
                    high_row = Some(row);
                }
            }
            let (row, bit) = planes[0].place(quad);
            s.vmovups(w[1], codes.plus(row * 64))?;
            if bits < 4 {
                self.low_pair(s, t, bit, w[1])?;
                if let Some(plane) = planes.get(1) {
                    let (_, bit) = plane.place(quad);
                    self.add_high_pair(s, t, bit, room, w[1])?;
                }
                // What is left of the other quad lies in bits that a shuffle does not look at.
                s.vpshufb(w[0], t.table[0], w[1])?;
                s.vpsrlw(w[1], w[1], 4)?;
                s.vpshufb(w[1], t.table[0], w[1])?;
                each(s, quad, w[0])?;
                each(s, quad + 1, w[1])?;
                continue;
            }
            s.vpand(w[0], w[1], t.low)?;
            if bits == 4 {
                s.vpshufb(w[0], t.table[0], w[0])?;
            }
            s.vpsrlw(w[1], w[1], 4)?;
            s.vpand(w[1], w[1], t.low)?;
            if bits == 4 {
                s.vpshufb(w[1], t.table[0], w[1])?;
                each(s, quad, w[0])?;
                each(s, quad + 1, w[1])?;
                continue;
            }
            for (i, nibbles) in w.into_iter().enumerate() {
                let (_, bit) = planes[1].place(quad + i);
                let found = if self.level.is_512() {
                    self.pick_masked(s, t, bits, bit, room, nibbles)?
                } else {
                    self.pick_blended(s, t, bits, bit, room, nibbles)?
                };
                each(s, quad + i, found)?;
            }
        }
        Ok(())
    }

    /// Leaves of a plane of two bits those that belong to a pair of quads, at the bottom of each nibble.
    fn low_pair(&self, s: &mut Asm, t: &Tables, bit: u32, w: V) -> AsmResult<()> {
        if bit > 0 {
            s.vpsrlw(w, w, bit)?;
        }
        if self.layout.format.code_bits() == 3 && self.level.is_512() {
            // Done together with the other plane's bits.
            return Ok(());
        }
        s.vpand(w, w, t.low)
    }

    /// Puts a pair's bits of a plane of one above two bits of each nibble.
    fn add_high_pair(&self, s: &mut Asm, t: &Tables, bit: u32, room: Room, w: V) -> AsmResult<()> {
        const TO: u32 = 2;
        let wide = self.level.is_512();
        let (from, to) = (if wide && bit % 2 == 1 { room.spare[0] } else { room.high }, room.w[0]);
        let from = match bit {
            0 | 1 => {
                s.vpslld(to, from, TO - bit)?;
                to
            }
            TO => from,
            _ => {
                s.vpsrlw(to, from, bit - TO)?;
                to
            }
        };
        if wide {
            return s.select_bits(w, t.low, from);
        }
        s.vpand(to, from, t.high)?;
        s.vpor(w, w, to)
    }

    /// Entries of a table of two or four sixteens: by the nibbles within each, and by the bits from `bit` on of the second
    /// plane among them.
    fn pick_masked(
        &self,
        s: &mut Asm,
        t: &Tables,
        bits: usize,
        bit: u32,
        room: Room,
        nibbles: V,
    ) -> AsmResult<V> {
        let (odd, upper) = (Register::K1, Register::K2);
        let [to, other] = room.spare;
        let mask = |i: u32| V(t.bits.0 + (bit + i) as u8);
        s.vptestmb(odd, room.high, mask(0))?;
        s.vpshufb(to, t.table[0], nibbles)?;
        s.vpshufb_masked(to, odd, t.table[1], nibbles)?;
        if bits == 6 {
            s.vptestmb(upper, room.high, mask(1))?;
            s.vpshufb(other, t.table[2], nibbles)?;
            s.vpshufb_masked(other, odd, t.table[3], nibbles)?;
            s.move_masked(to, upper, other)?;
        }
        Ok(to)
    }

    /// The same with 256 bits, in place. Bits are moved to the top of their bytes, where blends look; and there is no
    /// register left for a third and a fourth sixteen of entries.
    fn pick_blended(
        &self,
        s: &mut Asm,
        t: &Tables,
        bits: usize,
        bit: u32,
        room: Room,
        nibbles: V,
    ) -> AsmResult<V> {
        const TOP: u32 = 7;
        let [a, b] = room.spare;
        let mask = V(15);
        s.vpshufb(a, t.table[0], nibbles)?;
        s.vpshufb(b, t.table[1], nibbles)?;
        s.vpslld(mask, room.high, TOP - bit)?;
        if bits == 5 {
            s.vpblendvb(nibbles, a, b, mask)?;
            return Ok(nibbles);
        }
        s.vpblendvb(a, a, b, mask)?;
        s.broadcast16(b, Mem::at(t.header, 32))?;
        s.vpshufb(b, b, nibbles)?;
        s.broadcast16(mask, Mem::at(t.header, 48))?;
        s.vpshufb(nibbles, mask, nibbles)?;
        s.vpslld(mask, room.high, TOP - bit)?;
        s.vpblendvb(b, b, nibbles, mask)?;
        s.vpslld(mask, room.high, TOP - 1 - bit)?;
        s.vpblendvb(nibbles, a, b, mask)?;
        if t.biased {
            let flip = s.constant(0x8080_8080);
            s.vpxor(nibbles, nibbles, Src::Bcst(flip))?;
        }
        Ok(nibbles)
    }

    /// A part's scales of one group, and the choices' entries.
    pub(super) fn fields(
        &self,
        s: &mut Asm,
        t: &Tables,
        at: Mem,
        scale: V,
        choices: Option<V>,
    ) -> AsmResult<()> {
        match self.layout.format.scale {
            Scale::RowF32Field8 { bias, choice_bits } => {
                s.vpmovzxbd(scale, at)?;
                if let Some(choices) = choices {
                    // Picks by the low two bits, which are the choice.
                    s.vpermilps(choices, t.choices, scale)?;
                }
                s.vpsrld(scale, scale, choice_bits)?;
                s.vcvtdq2ps(scale, scale)?;
                let bias = s.float(bias as f32);
                s.vsubps(scale, scale, bias)
            }
            Scale::Bf16 | Scale::None => {
                s.vpmovzxwd(scale, at)?;
                s.vpslld(scale, scale, 16)?;
                match choices {
                    Some(choices) => s.vmovups(choices, t.choices),
                    None => Ok(()),
                }
            }
        }
    }

    /// `acc += w . x` for four inputs of every channel.
    fn dot(&self, s: &mut Asm, acc: V, w: V, x: Mem, size: V, product: V) -> AsmResult<()> {
        match self.level.dot {
            Dot::Vnni512 | Dot::Vnni256 => s.vpdpbusd(acc, w, Src::Bcst(x)),
            Dot::Maddubs => {
                let codes = V(15);
                s.broadcast(codes, x)?;
                s.vpabsb(size, codes)?;
                s.vpsignb(product, w, codes)?;
                s.vpmaddubsw(product, size, product)?;
                let ones = s.constant(0x0001_0001);
                s.vpmaddwd(product, product, Src::Bcst(ones))?;
                s.vpaddd(acc, acc, product)
            }
        }
    }

    /// `sum += f32(dot + correction * x_sum) * (scale * x_scale)`; `group` points at the group's activation scale. The
    /// dot product and its correction are integers below 2^24, so f32 holds them exactly.
    #[expect(clippy::too_many_arguments, reason = "one register each")]
    fn add_group(
        &self,
        s: &mut Asm,
        sum: V,
        dot: V,
        scale: V,
        correction: Option<V>,
        group: AsmRegister64,
        temporary: V,
    ) -> AsmResult<()> {
        let x = self.x();
        s.vcvtdq2ps(dot, dot)?;
        if let Some(correction) = correction.filter(|_| self.biased() || self.table_format()) {
            s.vcvtdq2ps(temporary, Src::Bcst(Mem::at(group, x.sums_offset - x.scales_offset)))?;
            s.vfmadd231ps(dot, correction, temporary)?;
        }
        s.vmulps(temporary, scale, Src::Bcst(Mem::at(group, 0)))?;
        s.vfmadd231ps(sum, dot, temporary)
    }

    fn row_scale(&self, s: &mut Asm, sum: V, block: AsmRegister64, part: usize) -> AsmResult<()> {
        if self.row_scaled() { s.vmulps(sum, sum, Mem::at(block, part * self.level.bytes())) } else { Ok(()) }
    }

    /// Asks for the codes that lie `distance` bytes ahead, into the second-level cache: the first has too few requests
    /// under way at once to keep up with the memory.
    fn prefetch(&self, s: &mut Asm, codes: AsmRegister64, distance: AsmRegister64) -> AsmResult<()> {
        for line in (0..self.group_bytes()).step_by(64) {
            s.a.prefetcht1(ptr(codes + distance + line as i32))?;
        }
        Ok(())
    }

    /// Asks for a block's scales and fields, line by line. Processors follow a stream of addresses and read ahead of it,
    /// but lose it when it skips more than a few lines, as it would from one block's codes to the next's.
    fn prefetch_fields(&self, s: &mut Asm, block: AsmRegister64) -> AsmResult<()> {
        for line in (0..self.layout.codes_offset).step_by(64) {
            s.a.prefetcht0(ptr(block + line as i32))?;
        }
        Ok(())
    }
}

fn below_stack() -> Mem {
    Mem::below(rsp, 16)
}

/// `body` for each of r8 rows, with rbp at the row's sums; uses rax.
fn each_row(
    s: &mut Asm,
    sums: AsmRegister64,
    stride: usize,
    body: impl FnOnce(&mut Asm) -> AsmResult<()>,
) -> AsmResult<()> {
    s.a.mov(rbp, sums)?;
    s.a.mov(rax, r8)?;
    s.repeat(rax, 1, |s| {
        body(s)?;
        s.a.add(rbp, stride as i32)
    })
}

fn push(s: &mut Asm, registers: &[AsmRegister64]) -> AsmResult<()> {
    registers.iter().try_for_each(|r| s.a.push(*r))
}

fn pop(s: &mut Asm, registers: &[AsmRegister64]) -> AsmResult<()> {
    registers.iter().rev().try_for_each(|r| s.a.pop(*r))
}
