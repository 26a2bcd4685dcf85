//! How far two evaluations of one function may be apart: one row per numeric class, with the reason.

/// One row of [`TOLERANCES`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Name in filetests: `tol=rounding`.
    pub class: &'static str,
    /// Allowed difference, as a part of the largest magnitude of the reference.
    pub relative: f64,
    pub reason: &'static str,
}

/// Every numeric class, strictest first.
pub const TOLERANCES: &[Tolerance] = &[
    Tolerance { class: "exact", relative: 0.0, reason: "the same operations in the same order" },
    Tolerance {
        class: "rounding",
        relative: 1e-5,
        reason: "another order of operations, and folded weights rounded to f32 once more (2^-24 each): a few \
                 hundred roundings that do not conspire, through two layers",
    },
    Tolerance {
        class: "kernel-f32",
        relative: 2e-4,
        reason: "sums over K in f32 instead of f64, exp of about 2^-20, caches in f32",
    },
    Tolerance {
        class: "kernel-f16-cache",
        relative: 4e-3,
        reason: "as kernel-f32, with keys and values rounded to 11 bits",
    },
    Tolerance {
        class: "kernel-int8",
        relative: 8e-2,
        reason: "activations rounded to 8 bits per group of 32 before each product: about 2^-8 of the group's \
                 largest each, averaged over K, compounded over two layers",
    },
    Tolerance {
        class: "kernel-int8-random",
        relative: 1.5e-1,
        reason: "as kernel-int8, of models of random shape: among some four hundred of them one has few enough \
                 channels, and weights that amplify enough, to come to 9e-2",
    },
    Tolerance {
        class: "lossy-w8",
        relative: 4e-2,
        reason: "weights rounded to 8 bits per group of 32: 2^-8 of the group's largest each, averaged over K",
    },
    Tolerance { class: "lossy-n6", relative: 1.5e-1, reason: "a quarter of that of lossy-n4" },
    Tolerance { class: "lossy-n5", relative: 3e-1, reason: "half of that of lossy-n4" },
    Tolerance {
        class: "lossy-n4",
        relative: 6e-1,
        reason: "weights rounded to 16 levels: about 7 % of the group's largest each, and random weights have no \
                 structure that would average it out; catches a wrong scale or channel, not a poor one",
    },
    Tolerance { class: "lossy-n3", relative: 1.2, reason: "twice that of lossy-n4" },
    Tolerance { class: "lossy-n2", relative: 2.4, reason: "four times that of lossy-n4" },
];

/// The row of that class.
pub fn tolerance(class: &str) -> Option<Tolerance> {
    TOLERANCES.iter().copied().find(|t| t.class == class)
}

impl Tolerance {
    /// Compares `got` with the reference.
    ///
    /// # Errors
    /// Where the largest difference is, and how large.
    pub fn check(&self, reference: &[f64], got: &[f64]) -> Result<(), String> {
        if reference.len() != got.len() {
            return Err(format!("{} values, expected {}", got.len(), reference.len()));
        }
        let scale = reference.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let differences = reference.iter().zip(got).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
        let Some((at, worst)) = differences.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)) else {
            return Ok(());
        };
        let allowed = self.relative * scale;
        // Also false for a NaN, which equals nothing.
        if worst <= allowed {
            return Ok(());
        }
        Err(format!(
            "value {at} is {}, expected {}: {worst:.3e} apart, {} allows {allowed:.3e} ({})",
            got[at], reference[at], self.class, self.reason
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_measured_against_the_largest_value() {
        let rounding = tolerance("rounding").unwrap();
        assert_eq!(rounding.check(&[100.0, 0.0], &[100.0, 9e-4]), Ok(()));
        assert!(rounding.check(&[100.0, 0.0], &[100.0, 2e-3]).unwrap_err().contains("value 1"));
        assert!(rounding.check(&[1.0], &[f64::NAN]).is_err());
        assert!(rounding.check(&[1.0], &[1.0, 1.0]).is_err());
        assert!(tolerance("exact").unwrap().check(&[1.0], &[1.0 + f64::EPSILON]).is_err());
    }
}
