//! The inner function of AArch64 kernels with `smmla`, which Cranelift does not emit.
//!
//! It follows the procedure call standard, calls nothing, and keeps to vector registers that need not be preserved. The
//! encoder knows the few instructions it consists of.
//!
//! Source: Arm Architecture Reference Manual for A-profile, chapter C7; `smmla` is FEAT_I8MM.

/// Rows of activations that are multiplied together.
pub(crate) const ROWS: usize = 4;
/// Bytes of a row's products: one i32 for each channel of a block.
pub(crate) const PRODUCT_BYTES: usize = 64;
/// Slabs of four channels of a block.
const SLABS: usize = 4;
/// Bytes of a slab's weights for 32 inputs.
const SLAB_BYTES: usize = 128;

/// A general register by number.
#[derive(Clone, Copy)]
struct X(u32);

/// A vector register by number. 8 to 15 belong to the caller.
#[derive(Clone, Copy)]
struct V(u32);

/// `(mask, bits, name)` of every instruction.
const INSTRUCTIONS: [(u32, u32, &str); 9] = [
    (0xffc0_0000, LDP, "ldp"),
    (0xffc0_0000, STR, "str"),
    (0xffe0_fc00, ZIP1_4S, "zip1.4s"),
    (0xffe0_fc00, ZIP2_4S, "zip2.4s"),
    (0xffe0_fc00, ZIP1_2D, "zip1.2d"),
    (0xffe0_fc00, ZIP2_2D, "zip2.2d"),
    (0xffff_ffe0, ZERO, "movi.2d"),
    (0xffe0_fc00, SMMLA, "smmla"),
    (0xffff_ffff, RET, "ret"),
];
/// Two vectors from an address with an offset.
const LDP: u32 = 0xad40_0000;
/// A vector to an address with an offset.
const STR: u32 = 0x3d80_0000;
const ZIP1_4S: u32 = 0x4e80_3800;
const ZIP2_4S: u32 = 0x4e80_7800;
const ZIP1_2D: u32 = 0x4ec0_3800;
const ZIP2_2D: u32 = 0x4ec0_7800;
const ZERO: u32 = 0x6f00_e400;
/// `to[i][j] += sum_k a[i][k] * b[j][k]`: two by two sums over eight signed bytes.
const SMMLA: u32 = 0x4e80_a400;
const RET: u32 = 0xd65f_03c0;

/// Instructions under way.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn word(&mut self, word: u32) {
        self.0.extend(word.to_le_bytes());
    }

    fn three(&mut self, base: u32, to: V, a: V, b: V) {
        self.word(base | b.0 << 16 | a.0 << 5 | to.0);
    }

    /// `offset` is a multiple of 16 below 1024.
    fn load_pair(&mut self, first: V, second: V, from: X, offset: usize) {
        self.word(LDP | (offset as u32 / 16) << 15 | second.0 << 10 | from.0 << 5 | first.0);
    }

    /// `offset` is a multiple of 16 below 65536.
    fn store(&mut self, v: V, to: X, offset: usize) {
        self.word(STR | (offset as u32 / 16) << 10 | to.0 << 5 | v.0);
    }
}

/// Products of four rows with a block of 16 channels over 32 inputs. Arguments: four addresses of 32 signed bytes;
/// weights `[4 slabs][8 quads of inputs][4 channels][4]`, signed bytes; products, i32 `[4 rows][16 channels]`.
pub(crate) fn products() -> Vec<u8> {
    let mut c = Code::default();
    let (weights, out) = (X(4), X(5));
    // Eight inputs of two neighbouring rows: `[pair of rows][eight]`.
    let x = |pair: u32, eight: u32| V(16 + 4 * pair + eight);
    for row in 0..4 {
        c.load_pair(V(2 * row), V(2 * row + 1), X(row), 0);
    }
    for pair in 0..2 {
        for half in 0..2 {
            let (upper, lower) = (V(4 * pair + half), V(4 * pair + 2 + half));
            c.three(ZIP1_2D, x(pair, 2 * half), upper, lower);
            c.three(ZIP2_2D, x(pair, 2 * half + 1), upper, lower);
        }
    }
    for slab in 0..SLABS {
        // Eight inputs of two neighbouring channels, from quads of four channels.
        let w = |pair: u32, eight: u32| V(24 + 2 * eight + pair);
        for eight in 0..4 {
            let (first, second) = (V(2 * eight), V(2 * eight + 1));
            c.load_pair(first, second, weights, slab * SLAB_BYTES + 32 * eight as usize);
            c.three(ZIP1_4S, w(0, eight), first, second);
            c.three(ZIP2_4S, w(1, eight), first, second);
        }
        let sum = |rows: u32, channels: u32| V(2 * rows + channels);
        for i in 0..4 {
            c.word(ZERO | i);
        }
        for eight in 0..4 {
            for rows in 0..2 {
                for channels in 0..2 {
                    c.three(SMMLA, sum(rows, channels), x(rows, eight), w(channels, eight));
                }
            }
        }
        for rows in 0..2 {
            for (i, zip) in [ZIP1_2D, ZIP2_2D].into_iter().enumerate() {
                let row = V(4 + i as u32);
                c.three(zip, row, sum(rows, 0), sum(rows, 1));
                c.store(row, out, (2 * rows as usize + i) * PRODUCT_BYTES + slab * 16);
            }
        }
    }
    c.word(RET);
    c.0
}

/// Names of an inner function's instructions, one a line.
pub(crate) fn disassemble(code: &[u8]) -> String {
    let words = code.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
    words
        .map(|word| match INSTRUCTIONS.iter().find(|(mask, bits, _)| word & mask == *bits) {
            Some((_, _, name)) => format!("{name} {word:08x}\n"),
            None => format!("(bad) {word:08x}\n"),
        })
        .collect()
}
