//! The Hadamard transform of heads that a cache of 4-bit codes holds rotated.
//!
//! ```text
//! H[1] = 1,  H[2n] = [H[n] H[n]; H[n] -H[n]],  y = H[n] x / sqrt(n)
//! ```
//!
//! of each `n` neighbouring numbers, where `n` is the largest power of two that divides the head's width. The matrix is
//! orthogonal and symmetric, so that it is its own inverse and products of two rotated vectors are those of the vectors. What
//! a head has in few elements, as keys do, is spread over all of them, and one scale then fits them all (Ashkboos et al. 2024,
//! QuaRot, arXiv:2404.00456).

/// Numbers that are rotated together in heads of width `head_dim`.
pub fn order(head_dim: usize) -> usize {
    1 << head_dim.trailing_zeros()
}

/// What numbers are multiplied by before they are added and subtracted.
pub fn factor(head_dim: usize) -> f32 {
    (1.0 / (order(head_dim) as f64).sqrt()) as f32
}

/// Rotates one head in place: factor first, then neighbours, then numbers 2 apart, 4 apart and so on, each step in f32. That
/// is the order of compiled code, so that codes are the same.
pub fn rotate(head: &mut [f32]) {
    let (order, factor) = (order(head.len()), factor(head.len()));
    head.iter_mut().for_each(|v| *v *= factor);
    for block in head.chunks_exact_mut(order) {
        let mut apart = 1;
        while apart < order {
            for pair in block.chunks_exact_mut(2 * apart) {
                let (low, high) = pair.split_at_mut(apart);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            apart *= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + 11) % 64) as f32 / 16.0 - 2.0).collect()
    }

    #[test]
    fn rotation_keeps_products_and_undoes_itself() {
        for len in [16, 48, 64, 80, 96, 128, 256] {
            let (a, mut b) = (numbers(len), numbers(len));
            b.reverse();
            let (mut ra, mut rb) = (a.clone(), b.clone());
            rotate(&mut ra);
            rotate(&mut rb);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            assert!((dot(&a, &b) - dot(&ra, &rb)).abs() < 1e-3, "{len}");
            assert!((dot(&a, &a) - dot(&ra, &ra)).abs() < 1e-3, "{len}");
            rotate(&mut ra);
            assert!(a.iter().zip(&ra).all(|(a, b)| (a - b).abs() < 1e-5), "{len}");
        }
    }

    #[test]
    fn a_single_number_is_spread_over_its_block() {
        let mut x = vec![0.0; 96];
        x[40] = 32f32.sqrt();
        rotate(&mut x);
        assert!(x[32..64].iter().all(|v| (v.abs() - 1.0).abs() < 1e-6));
        assert!(x[..32].iter().chain(&x[64..]).all(|v| *v == 0.0));
        assert_eq!((order(80), order(96), order(128)), (16, 32, 128));
    }
}
