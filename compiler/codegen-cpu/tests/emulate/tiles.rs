//! The tile registers of AMX and their instructions, with the checks of palette 1.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, and volume 1 chapter 18. What raises
//! an exception there is an error here.

/// Rows of the largest tile.
const ROWS: usize = 16;
/// Bytes of the longest row.
const ROW_BYTES: usize = 64;
const TILES: usize = 8;

/// What a product instruction multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Products {
    Bf16,
    /// Bytes; whether those of the first and of the second source are signed.
    Bytes(bool, bool),
}

#[derive(Clone, Copy, Debug)]
struct Tile {
    rows: usize,
    row_bytes: usize,
    data: [[u8; ROW_BYTES]; ROWS],
}

/// Eight tiles and their configuration.
#[derive(Clone, Debug)]
pub(crate) struct TileFile {
    configuration: Option<[u8; 64]>,
    tiles: [Tile; TILES],
}

const EMPTY: Tile = Tile { rows: 0, row_bytes: 0, data: [[0; ROW_BYTES]; ROWS] };

impl TileFile {
    /// As after a reset.
    pub(crate) const INITIAL: TileFile = TileFile { configuration: None, tiles: [EMPTY; TILES] };

    pub(crate) fn is_configured(&self) -> bool {
        self.configuration.is_some()
    }

    /// `ldtilecfg`: shapes for all tiles, which become zero.
    pub(crate) fn configure(&mut self, bytes: &[u8; 64]) -> Result<(), String> {
        match bytes[0] {
            0 => {
                *self = TileFile::INITIAL;
                return Ok(());
            }
            1 => {}
            palette => return Err(format!("ldtilecfg: no palette {palette}")),
        }
        if bytes[1] != 0 {
            return Err(format!("ldtilecfg: start row {} belongs to an interrupted load", bytes[1]));
        }
        let reserved = bytes[2..16].iter().chain(&bytes[32..48]).chain(&bytes[56..64]);
        if reserved.into_iter().any(|b| *b != 0) {
            return Err("ldtilecfg: reserved bytes are not zero".to_owned());
        }
        let mut tiles = [EMPTY; TILES];
        for (i, tile) in tiles.iter_mut().enumerate() {
            tile.row_bytes = usize::from(u16::from_le_bytes([bytes[16 + 2 * i], bytes[17 + 2 * i]]));
            tile.rows = usize::from(bytes[48 + i]);
            if tile.row_bytes > ROW_BYTES || tile.rows > ROWS || (tile.rows == 0) != (tile.row_bytes == 0) {
                return Err(format!("ldtilecfg: tile {i} of {} rows of {} bytes", tile.rows, tile.row_bytes));
            }
        }
        *self = TileFile { configuration: Some(*bytes), tiles };
        Ok(())
    }

    /// `sttilecfg`.
    pub(crate) fn configuration(&self) -> [u8; 64] {
        self.configuration.unwrap_or([0; 64])
    }

    /// `tilerelease`.
    pub(crate) fn release(&mut self) {
        *self = TileFile::INITIAL;
    }

    /// `tilezero`.
    pub(crate) fn zero(&mut self, tile: usize) -> Result<(), String> {
        self.tile("tilezero", tile)?.data = EMPTY.data;
        Ok(())
    }

    /// `tileloadd`, `tileloaddt1`: `read(row, bytes)` fills a row from memory; all beyond the shape becomes zero.
    pub(crate) fn load(&mut self, tile: usize, mut read: impl FnMut(usize, &mut [u8])) -> Result<(), String> {
        let tile = self.tile("tileloadd", tile)?;
        tile.data = EMPTY.data;
        for (r, row) in tile.data.iter_mut().enumerate().take(tile.rows) {
            read(r, &mut row[..tile.row_bytes]);
        }
        Ok(())
    }

    /// `tilestored`: `write(row, bytes)` puts a row into memory.
    pub(crate) fn store(&mut self, tile: usize, mut write: impl FnMut(usize, &[u8])) -> Result<(), String> {
        let tile = self.tile("tilestored", tile)?;
        for (r, row) in tile.data.iter().enumerate().take(tile.rows) {
            write(r, &row[..tile.row_bytes]);
        }
        Ok(())
    }

    /// `to += a . b` over pairs of bf16 or quads of bytes.
    pub(crate) fn multiply(
        &mut self,
        products: Products,
        to: usize,
        a: usize,
        b: usize,
    ) -> Result<(), String> {
        let name = "tile product";
        if to == a || to == b || a == b {
            return Err(format!("{name}: tiles {to}, {a}, {b} are not three"));
        }
        let (mut c, a, b) = (*self.tile(name, to)?, *self.tile(name, a)?, *self.tile(name, b)?);
        let shapes = [c, a, b].map(|t| (t.rows, t.row_bytes));
        let fits = shapes.iter().all(|(_, bytes)| bytes % 4 == 0)
            && c.rows == a.rows
            && c.row_bytes == b.row_bytes
            && a.row_bytes / 4 == b.rows;
        if !fits {
            return Err(format!("{name}: (rows, bytes) {shapes:?} do not fit"));
        }
        for m in 0..c.rows {
            match products {
                Products::Bf16 => bf16_row(&mut c, &a, &b, m),
                Products::Bytes(a_signed, b_signed) => byte_row(&mut c, &a, &b, m, a_signed, b_signed),
            }
        }
        // The sums fill the shape, and what lies beyond has been zero since the tile was configured.
        self.tiles[to] = c;
        Ok(())
    }

    fn tile(&mut self, name: &str, tile: usize) -> Result<&mut Tile, String> {
        if self.configuration.is_none() {
            return Err(format!("{name}: tiles are not configured"));
        }
        match &mut self.tiles[tile] {
            t if t.rows == 0 => Err(format!("{name}: tile {tile} has no shape")),
            t => Ok(t),
        }
    }
}

/// Even and odd elements have accumulators of their own over k, each product fused; their sum is added in the end.
fn bf16_row(c: &mut Tile, a: &Tile, b: &Tile, m: usize) {
    let columns = c.row_bytes / 4;
    let mut sums = [[0.0f32; ROW_BYTES / 4]; 2];
    for k in 0..a.row_bytes / 4 {
        for (i, sums) in sums.iter_mut().enumerate() {
            let x = bf16(&a.data[m], 2 * k + i);
            for (n, sum) in sums.iter_mut().enumerate().take(columns) {
                *sum = flushed(x.mul_add(bf16(&b.data[k], 2 * n + i), *sum));
            }
        }
    }
    let [even, odd] = sums;
    for (element, (even, odd)) in c.data[m][..c.row_bytes].chunks_exact_mut(4).zip(even.iter().zip(odd)) {
        let old = f32::from_le_bytes([element[0], element[1], element[2], element[3]]);
        let sum = flushed(flushed(old) + flushed(even + odd));
        element.copy_from_slice(&sum.to_le_bytes());
    }
}

fn byte_row(c: &mut Tile, a: &Tile, b: &Tile, m: usize, a_signed: bool, b_signed: bool) {
    let widen = |byte: u8, signed: bool| if signed { i32::from(byte as i8) } else { i32::from(byte) };
    for k in 0..a.row_bytes / 4 {
        for n in 0..c.row_bytes / 4 {
            let at = 4 * n..4 * n + 4;
            let mut sum = i32::from_le_bytes(c.data[m][at.clone()].try_into().unwrap());
            for i in 0..4 {
                let x = widen(a.data[m][4 * k + i], a_signed);
                sum = sum.wrapping_add(x * widen(b.data[k][4 * n + i], b_signed));
            }
            c.data[m][at].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

fn bf16(row: &[u8; ROW_BYTES], i: usize) -> f32 {
    flushed(f32::from_bits(u32::from(u16::from_le_bytes([row[2 * i], row[2 * i + 1]])) << 16))
}

/// Zero of the same sign for a subnormal number: operands and results of tile products.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}
