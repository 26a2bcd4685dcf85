//! Kernels that move rows: embed, gather_rows, slice.

use super::Args;
use attar_format::{Encoded, FormatRef, PackedLayout};

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn embed(format: FormatRef, vocab: usize, dim: usize, args: Args<'_>, t: usize) {
    let layout = PackedLayout::new(format, vocab, dim).expect("the spec's shape fits its format");
    // SAFETY: the caller's contract.
    unsafe {
        let token = args.values::<i32>(0, t, 1)[0] as usize;
        let table = args.values::<u8>(1, 0, layout.total_bytes());
        let out = args.values_mut::<f32>(2, t * dim, dim);
        Encoded::unpack(format, vocab, dim, table).expect("lengths agree").decode_row(token, out);
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn gather_rows(dim: usize, args: Args<'_>, r: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let row = args.values::<i32>(1, r, 1)[0] as usize;
        args.values_mut::<f32>(2, r * dim, dim).copy_from_slice(args.values(0, row * dim, dim));
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn slice(dim: usize, start: usize, len: usize, args: Args<'_>, t: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        args.values_mut::<f32>(1, t * len, len).copy_from_slice(args.values(0, t * dim + start, len));
    }
}
