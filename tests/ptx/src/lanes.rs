//! Values of a warp: one 64-bit word per lane, whatever the type. Narrow values are zero-extended.

/// Lanes of a warp.
pub(crate) const WARP: usize = 32;

pub(crate) type Lanes = [u64; WARP];

/// Results of an operation for all lanes; those of inactive lanes are thrown away, so no operation may fail.
pub(crate) type Unary = fn(&Lanes, &mut Lanes);
pub(crate) type Binary = fn(&Lanes, &Lanes, &mut Lanes);
pub(crate) type Ternary = fn(&Lanes, &Lanes, &Lanes, &mut Lanes);

/// The lanes of a mask, lowest first.
pub(crate) fn each(mask: u32) -> impl Iterator<Item = usize> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let lane = left.trailing_zeros() as usize;
        left &= left - 1;
        Some(lane)
    })
}

/// A [`Unary`] from an expression over one lane.
macro_rules! unary {
    (|$a:ident| $value:expr) => {{
        fn lanes(a: &$crate::lanes::Lanes, out: &mut $crate::lanes::Lanes) {
            for (out, &$a) in out.iter_mut().zip(a) {
                *out = $value;
            }
        }
        lanes as $crate::lanes::Unary
    }};
}

/// A [`Binary`] from an expression over one lane.
macro_rules! binary {
    (|$a:ident, $b:ident| $value:expr) => {{
        fn lanes(a: &$crate::lanes::Lanes, b: &$crate::lanes::Lanes, out: &mut $crate::lanes::Lanes) {
            for ((out, &$a), &$b) in out.iter_mut().zip(a).zip(b) {
                *out = $value;
            }
        }
        lanes as $crate::lanes::Binary
    }};
}

/// A [`Ternary`] from an expression over one lane.
macro_rules! ternary {
    (|$a:ident, $b:ident, $c:ident| $value:expr) => {{
        fn lanes(
            a: &$crate::lanes::Lanes,
            b: &$crate::lanes::Lanes,
            c: &$crate::lanes::Lanes,
            out: &mut $crate::lanes::Lanes,
        ) {
            for (((out, &$a), &$b), &$c) in out.iter_mut().zip(a).zip(b).zip(c) {
                *out = $value;
            }
        }
        lanes as $crate::lanes::Ternary
    }};
}

pub(crate) use {binary, ternary, unary};
