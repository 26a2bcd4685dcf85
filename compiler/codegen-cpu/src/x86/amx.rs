//! Contraction of many rows with tiles of bf16: AMX.
//!
//! A tile product multiplies 16 rows by 32 inputs with 32 inputs by 16 channels. Activations are laid out in tiles once
//! ([`TileKernel::pack_rows`]) and stay in the second-level cache; a panel of one or two blocks of weights and a few
//! hundred inputs is decoded into tiles ([`TileKernel::unpack`]) that stay in the first-level cache while all rows meet
//! them ([`TileKernel::multiply`]), 32 rows by 32 channels at a time in four accumulating tiles.
//!
//! Activations and weights are rounded to bf16 with their scales folded in. So sums differ from those of the integer
//! kernels by a relative 2^-9 per factor, and a launch of 17 rows gives other bits than one of 16. Weights in bf16 are
//! tiles as they are packed, and only activations are rounded.
//!
//! Byte tiles multiply twice as fast, but weights and activations have a scale for every 32 inputs: sums would have to
//! leave the tiles after each step, which costs more than the faster product gains. That was measured on a Sapphire
//! Rapids machine, and so were the sizes of blocks and the order of loops; the kernels here follow those figures and
//! have not been timed themselves.

use super::asm::AsmResult;
use super::int::{IntKernel, Room, Tables};
use super::{Asm, Level, Mem, Src, V};
use attar_format::{CHANNELS, DType, PackedLayout, Scale, Value};
use attar_kernel::ActInt8Layout;
use iced_x86::code_asm::{
    AsmRegister64, AsmRegisterTmm, byte_ptr, eax, ebx, ptr, r8, r9, r10, r11, rax, rbp, rbx, rcx, rdi, rdx,
    rsi, tmm0, tmm1, tmm2, tmm3, tmm4, tmm5, tmm6, tmm7, zmm1,
};

/// Inputs of a tile, which are those of a group.
const GROUP: usize = ActInt8Layout::GROUP;
/// Bytes of a tile.
pub(crate) const TILE: usize = 1024;
/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Rows that [`TileKernel::multiply`] takes at once: two tiles, which stand beside each other for every group.
pub(crate) const BLOCK_ROWS: usize = 2 * TILE_ROWS;

/// Inner functions for the weights of one shape and format.
#[derive(Clone, Copy)]
pub(crate) struct TileKernel<'a> {
    pub(crate) level: Level,
    pub(crate) layout: &'a PackedLayout,
}

/// What stays in registers while weights are decoded.
struct Decoder {
    from: From,
    /// Half a unit of bf16.
    half: V,
    /// The upper half of every lane.
    upper: V,
}

/// How weights become f32.
enum From {
    /// Through a table of 16.
    Table {
        /// The table's entries as f32.
        table: V,
        /// The shift of a choice in every lane, f32.
        shift: V,
    },
    /// From signed bytes, which the integer kernels' decoding makes.
    Bytes(Tables),
}

impl TileKernel<'_> {
    /// Whether there are tile kernels for a tensor's weights.
    pub(crate) fn exists(layout: &PackedLayout) -> bool {
        layout.k.is_multiple_of(GROUP)
            && match layout.format.value {
                Value::Int8 | Value::Table(_) => true,
                Value::Float(dtype) => dtype == DType::BF16,
            }
    }

    /// Whether a permutation of f32 is enough of a table: it takes nibbles as they are, and fields as they stand beside row scales.
    fn through_floats(&self) -> bool {
        self.row_scaled() && self.layout.format.table().is_some_and(|t| t.bits == 4)
    }

    fn int(&self) -> IntKernel<'_> {
        IntKernel { level: self.level, layout: self.layout }
    }

    /// Whether weights are tiles already.
    pub(crate) fn is_unpacked(&self) -> bool {
        self.layout.format.is_uncompressed()
    }

    /// Groups of inputs.
    pub(crate) fn groups(layout: &PackedLayout) -> usize {
        layout.k / GROUP
    }

    /// Bytes from one row of activations to the next.
    pub(crate) fn x_stride(&self) -> usize {
        if self.is_unpacked() { 4 * self.layout.k } else { ActInt8Layout::new(self.layout.k).stride }
    }

    /// Bytes of a group of a row of activations.
    pub(crate) fn x_group_bytes(&self) -> usize {
        if self.is_unpacked() { 4 * GROUP } else { GROUP }
    }

    /// Bytes of packed activations of `groups` groups for one block of rows.
    pub(crate) fn block_bytes(groups: usize) -> usize {
        groups * 2 * TILE
    }

    /// Lays `groups` groups of activations (f32 for weights in bf16, else int8) out in tiles,
    /// `[rows / 32][groups][2][16][32]` bf16. Arguments: x at the first of the groups, its scales where there are any,
    /// tiles, rows. Rows beyond the last are left as they are.
    pub(crate) fn pack_rows(&self, groups: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let (low, high, scale) = (V(0), V(1), V(2));
        let (codes, scales, to, left) = (rax, r8, r9, r10);
        s.a.push(rbx)?;
        // Bytes of the block that are behind.
        s.a.xor(ebx, ebx)?;
        s.repeat(rcx, 1, |s| {
            s.a.mov(codes, rdi)?;
            s.a.mov(scales, rsi)?;
            s.a.mov(to, rdx)?;
            s.a.mov(left, groups as i64)?;
            s.repeat(left, 1, |s| {
                if self.is_unpacked() {
                    s.vmovups(low, Mem::at(codes, 0))?;
                    s.vmovups(high, Mem::at(codes, 2 * GROUP))?;
                } else {
                    s.broadcast(scale, Mem::at(scales, 0))?;
                    for (half, at) in [(low, 0), (high, GROUP / 2)] {
                        s.vpmovsxbd(half, Mem::at(codes, at))?;
                        s.vcvtdq2ps(half, half)?;
                        s.vmulps(half, half, scale)?;
                    }
                    s.a.add(scales, 4)?;
                }
                s.vcvtne2ps2bf16(low, high, low)?;
                s.store(Mem::at(to, 0), low)?;
                s.a.add(codes, self.x_group_bytes() as i32)?;
                s.a.add(to, 2 * TILE as i32)
            })?;
            s.a.add(rdi, self.x_stride() as i32)?;
            s.a.add(rsi, self.x_stride() as i32)?;
            s.a.add(rdx, 64)?;
            s.a.add(rbx, 64)?;
            // The 32 rows of a block follow each other; the next block stands behind the other groups.
            let mut same_block = s.a.create_label();
            s.a.cmp(rbx, 2 * TILE as i32)?;
            s.a.jl(same_block)?;
            s.a.add(rdx, (Self::block_bytes(groups) - 2 * TILE) as i32)?;
            s.a.xor(ebx, ebx)?;
            s.a.set_label(&mut same_block)?;
            s.a.nop()
        })?;
        s.a.pop(rbx)?;
        s.finish()
    }

    /// Decodes groups of `blocks` neighbouring blocks into tiles, `[groups][blocks][16][16][2]` bf16. Arguments: the first
    /// block's codes and fields of the first of the groups, the block, the header, tiles, number of groups.
    pub(crate) fn unpack(&self, blocks: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let d = self.decoder(&mut s, rcx)?;
        let (codes, fields, block, to, left) = (rdi, rsi, rdx, r8, r9);
        let row_scale = |b: usize| V(22 + b as u8);
        if self.row_scaled() {
            for b in 0..blocks {
                s.vmovups(row_scale(b), Mem::at(block, b * self.layout.block_bytes))?;
            }
        }
        s.repeat(left, 1, |s| {
            for b in 0..blocks {
                let (scale, offset) = (V(5 + 2 * b as u8), V(6 + 2 * b as u8));
                let from = b * self.layout.block_bytes;
                self.scales(s, &d, Mem::at(fields, from), row_scale(b), scale, offset)?;
                self.decode(s, &d, Mem::at(codes, from), [scale, offset], Mem::at(to, b * TILE))?;
            }
            s.a.add(codes, self.group_bytes() as i32)?;
            s.a.add(fields, (CHANNELS * self.layout.format.field_bytes()) as i32)?;
            s.a.add(to, (blocks * TILE) as i32)
        })?;
        s.finish()
    }

    /// Multiplies rows with a panel of weights. Arguments: the activations' tiles at the first of the panel's groups, the
    /// weights' tiles (as unpacked, or the first block's codes), sums f32 `[rows][sums_stride]` (`blocks` blocks of them), rows, groups of the panel, and whether
    /// the sums begin: otherwise they go on. `x_groups` groups of activations lie between one block of rows and the
    /// next. Sums of rows up to the next multiple of [`TILE_ROWS`] are written.
    pub(crate) fn multiply(&self, blocks: usize, x_groups: usize, sums_stride: usize) -> AsmResult<Vec<u8>> {
        let mut s = Asm::new(self.level)?;
        let saved = [rbx, rbp];
        for register in saved {
            s.a.push(register)?;
        }
        let configuration = s.constants(&configuration());
        s.ldtilecfg(configuration)?;
        let (x, weights, sums, rows, groups, begins) = (rdi, rsi, rdx, rcx, r8, r9);
        // Bytes from one row of a tile to the next, of activations and weights, and of sums.
        let (tile_stride, sum_stride) = (rax, r10);
        s.a.mov(tile_stride, 64i64)?;
        s.a.mov(sum_stride, sums_stride as i64)?;
        let (mut pair, mut single, mut done) = (s.a.create_label(), s.a.create_label(), s.a.create_label());
        s.a.set_label(&mut pair)?;
        s.a.cmp(rows, TILE_ROWS as i32)?;
        s.a.jle(single)?;
        let (block_step, group_step) =
            if self.is_unpacked() { (self.layout.block_bytes, TILE) } else { (TILE, blocks * TILE) };
        let step = Step {
            blocks,
            block_step,
            group_step,
            sums_stride,
            x,
            weights,
            sums,
            groups,
            begins,
            tile_stride,
            sum_stride,
        };
        step.rows(&mut s, 2)?;
        s.a.add(x, Self::block_bytes(x_groups) as i32)?;
        s.a.add(sums, (BLOCK_ROWS * sums_stride) as i32)?;
        s.a.sub(rows, BLOCK_ROWS as i32)?;
        s.a.jg(pair)?;
        s.a.jmp(done)?;
        s.a.set_label(&mut single)?;
        step.rows(&mut s, 1)?;
        s.a.set_label(&mut done)?;
        s.a.tilerelease()?;
        for register in saved.into_iter().rev() {
            s.a.pop(register)?;
        }
        s.finish()
    }

    /// Bytes of codes of one group of a block.
    pub(crate) fn group_bytes(&self) -> usize {
        self.layout.format.code_bits() * GROUP / 32 * 64
    }

    fn row_scaled(&self) -> bool {
        matches!(self.layout.format.scale, Scale::RowF32Field8 { .. })
    }

    fn decoder(&self, s: &mut Asm, header: AsmRegister64) -> AsmResult<Decoder> {
        let from = if self.through_floats() {
            let (table, shift) = (V(0), V(1));
            s.vpmovsxbd(table, Mem::at(header, 0))?;
            s.vcvtdq2ps(table, table)?;
            s.a.movsx(eax, byte_ptr(header + self.layout.shift_position() as i32))?;
            s.a.vpbroadcastd(zmm1, eax)?;
            s.vcvtdq2ps(shift, shift)?;
            From::Table { table, shift }
        } else {
            From::Bytes(self.int().tables(s, header, false, false)?)
        };
        let d = Decoder { from, half: V(20), upper: V(21) };
        let (half, upper) = (s.constant(0x8000), s.constant(0xffff_0000));
        s.broadcast(d.half, half)?;
        s.broadcast(d.upper, upper)?;
        Ok(d)
    }

    /// Scales of a group's channels, and what the choice adds to every weight: as an f32 with the scale in it, or as bytes.
    fn scales(
        &self,
        s: &mut Asm,
        d: &Decoder,
        fields: Mem,
        row_scale: V,
        scale: V,
        offset: V,
    ) -> AsmResult<()> {
        let shift = match &d.from {
            From::Table { shift, .. } => *shift,
            From::Bytes(tables) => {
                self.int().fields(s, tables, fields, scale, Some(offset))?;
                return if self.row_scaled() { s.vmulps(scale, scale, row_scale) } else { Ok(()) };
            }
        };
        let Scale::RowF32Field8 { bias, choice_bits } = self.layout.format.scale else { return Ok(()) };
        s.vpmovzxbd(scale, fields)?;
        let mask = s.constant((1 << choice_bits) - 1);
        s.vpand(offset, scale, Src::Bcst(mask))?;
        s.vcvtdq2ps(offset, offset)?;
        s.vpsrld(scale, scale, choice_bits)?;
        s.vcvtdq2ps(scale, scale)?;
        let bias = s.float(bias as f32);
        s.vsubps(scale, scale, bias)?;
        s.vmulps(scale, scale, row_scale)?;
        s.vmulps(offset, offset, shift)?;
        s.vmulps(offset, offset, scale)
    }

    /// One group of a block. A row of the tile holds two neighbouring inputs of every channel.
    fn decode(
        &self,
        s: &mut Asm,
        d: &Decoder,
        codes: Mem,
        [scale, offset]: [V; 2],
        to: Mem,
    ) -> AsmResult<()> {
        // Pairs take turns at registers.
        let pair = |tile_row: usize| [16, 17].map(|v| V(v + 2 * (tile_row % 2) as u8));
        let table = match &d.from {
            From::Table { table, .. } => *table,
            From::Bytes(tables) => {
                let room = Room { w: [V(9), V(10)], high: V(4), spare: [V(11), V(12)] };
                return self.int().decode(s, tables, codes, room, |s, quad, w| {
                    if self.layout.format.table().is_some() {
                        s.vpaddb(w, w, offset)?;
                    }
                    for half in 0..2 {
                        let pair = pair(half);
                        for (i, f) in pair.into_iter().enumerate() {
                            let above = 24 - 8 * (2 * half + i) as u32;
                            if above > 0 {
                                s.vpslld(f, w, above)?;
                            }
                            s.vpsrad(f, if above > 0 { f } else { w }, 24)?;
                            s.vcvtdq2ps(f, f)?;
                            s.vmulps(f, f, scale)?;
                        }
                        self.store_row(s, d, pair, to.plus((2 * quad + half) * 64))?;
                    }
                    Ok(())
                });
            }
        };
        let row = V(9);
        for tile_row in 0..TILE_ROWS {
            let first = 2 * tile_row;
            if first % 8 == 0 {
                s.vmovups(row, codes.plus(first / 8 * 64))?;
            }
            let pair = pair(tile_row);
            for (i, w) in pair.into_iter().enumerate() {
                // Four low nibbles, then the four high ones. The permutation looks at the lowest four bits only.
                let within = (first + i) % 8;
                let bits = (8 * (within % 4) + 4 * (within / 4)) as u32;
                let index = if bits == 0 { row } else { w };
                if bits > 0 {
                    s.vpsrld(w, row, bits)?;
                }
                s.vpermps(w, index, table)?;
                s.vfmadd213ps(w, scale, offset)?;
            }
            self.store_row(s, d, pair, to.plus(tile_row * 64))?;
        }
        Ok(())
    }

    /// A row of a tile from the f32 of its even and its odd inputs, to the nearest bf16, ties away from zero.
    fn store_row(&self, s: &mut Asm, d: &Decoder, [even, odd]: [V; 2], to: Mem) -> AsmResult<()> {
        s.vpaddd(even, even, d.half)?;
        s.vpaddd(odd, odd, d.half)?;
        s.vpsrld(even, even, 16)?;
        s.and_or(odd, d.upper, even)?;
        s.store(to, odd)
    }
}

/// The same shape for all tiles: 16 rows of 64 bytes, palette 1.
fn configuration() -> [u32; 16] {
    let mut words = [0; 16];
    words[0] = 1;
    words[4..8].fill(64 << 16 | 64);
    words[12..14].fill(0x1010_1010);
    words
}

/// Registers of [`TileKernel::multiply`].
struct Step {
    blocks: usize,
    /// Bytes from a block's tile to the next block's.
    block_step: usize,
    /// Bytes from a group's tile to the next group's.
    group_step: usize,
    sums_stride: usize,
    x: AsmRegister64,
    weights: AsmRegister64,
    sums: AsmRegister64,
    groups: AsmRegister64,
    begins: AsmRegister64,
    tile_stride: AsmRegister64,
    sum_stride: AsmRegister64,
}

impl Step {
    /// One or two tiles of rows against the panel; changes rbx, rbp and r11, which no constant needs any more.
    fn rows(&self, s: &mut Asm, row_tiles: usize) -> AsmResult<()> {
        let (x, weights, left) = (rbx, rbp, r11);
        const SUMS: [[AsmRegisterTmm; 2]; 2] = [[tmm0, tmm1], [tmm2, tmm3]];
        const ACTIVATIONS: [AsmRegisterTmm; 2] = [tmm4, tmm5];
        const WEIGHTS: [AsmRegisterTmm; 2] = [tmm6, tmm7];
        let (mut begin, mut go) = (s.a.create_label(), s.a.create_label());
        let second_rows = (TILE_ROWS * self.sums_stride) as i32;
        s.a.test(self.begins, self.begins)?;
        s.a.jnz(begin)?;
        for (r, tiles) in SUMS.iter().enumerate().take(row_tiles) {
            for (b, tile) in tiles.iter().enumerate().take(self.blocks) {
                let at = r as i32 * second_rows + 64 * b as i32;
                s.a.tileloadd(*tile, ptr(self.sums + self.sum_stride + at))?;
            }
        }
        s.a.jmp(go)?;
        s.a.set_label(&mut begin)?;
        for tiles in SUMS.iter().take(row_tiles) {
            for tile in tiles.iter().take(self.blocks) {
                s.a.tilezero(*tile)?;
            }
        }
        s.a.set_label(&mut go)?;
        s.a.mov(x, self.x)?;
        s.a.mov(weights, self.weights)?;
        s.a.mov(left, self.groups)?;
        s.repeat(left, 1, |s| {
            for r in 0..row_tiles {
                s.a.tileloadd(ACTIVATIONS[r], ptr(x + self.tile_stride + (r * TILE) as i32))?;
                for b in 0..self.blocks {
                    if r == 0 {
                        s.a.tileloadd(
                            WEIGHTS[b],
                            ptr(weights + self.tile_stride + (b * self.block_step) as i32),
                        )?;
                    }
                    s.a.tdpbf16ps(SUMS[r][b], ACTIVATIONS[r], WEIGHTS[b])?;
                }
            }
            s.a.add(x, 2 * TILE as i32)?;
            s.a.add(weights, self.group_step as i32)
        })?;
        for (r, tiles) in SUMS.iter().enumerate().take(row_tiles) {
            for (b, tile) in tiles.iter().enumerate().take(self.blocks) {
                let at = r as i32 * second_rows + 64 * b as i32;
                s.a.tilestored(ptr(self.sums + self.sum_stride + at), *tile)?;
            }
        }
        Ok(())
    }
}
