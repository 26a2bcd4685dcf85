//! Planes: how the codes of a table format are cut into bits that bytes hold without a rest.
//!
//! A group of 32 inputs is eight *quads* of four. In a 64-byte row, channel `c` has the 32-bit lane `c`, and its byte `j`
//! belongs to input `j` of every quad. A plane holds 4, 2 or 1 bits of each code, for as many quads as go into a byte:
//! odd quads in the high nibble, even ones in the low. So whatever the plane, a shift and a mask bring the bits of two
//! neighbouring quads to the same place of two nibbles, and every kernel decodes all formats by pairs of quads.
//!
//! Packing, the reference and every unpacker follow [`Plane::place`]; it is the one description of the layout.

/// Inputs of a quad.
pub const QUAD: usize = 4;

/// Some bits of every code of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// The first of the code's bits that are here.
    pub low: u32,
    /// How many there are: 4, 2 or 1. A group takes as many 64-byte rows.
    pub width: u32,
    /// Rows of the group before the first of this plane.
    pub first_row: usize,
}

impl Plane {
    /// The row within the group, and the first bit within each of its bytes, that belong to a quad.
    pub const fn place(&self, quad: usize) -> (usize, u32) {
        let (pair, odd) = (quad / 2, quad % 2);
        let per_nibble = 4 / self.width as usize;
        let bit = 4 * odd as u32 + self.width * (pair % per_nibble) as u32;
        (self.first_row + pair / per_nibble, bit)
    }

    /// The plane's bits within a byte, from its first bit on.
    pub const fn mask(&self) -> u8 {
        (1 << self.width) - 1
    }
}

/// The planes of codes of `bits` (2 to 6) bits; the first one holds the lowest.
///
/// In memory the smaller plane comes first: all quads need its rows, and kernels that load them first read a group in
/// ascending order, as processors expect of a stream.
pub const fn planes(bits: usize) -> &'static [Plane] {
    const fn plane(low: u32, width: u32, first_row: usize) -> Plane {
        Plane { low, width, first_row }
    }
    match bits {
        2 => const { &[plane(0, 2, 0)] },
        3 => const { &[plane(0, 2, 1), plane(2, 1, 0)] },
        4 => const { &[plane(0, 4, 0)] },
        5 => const { &[plane(0, 4, 1), plane(4, 1, 0)] },
        6 => const { &[plane(0, 4, 2), plane(4, 2, 0)] },
        _ => panic!("codes of tables have 2 to 6 bits"),
    }
}
