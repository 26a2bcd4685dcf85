//! Rotary frequencies: base and context scaling folded into one list of inverse frequencies.

/// Base and scaling of a rotation.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How frequencies are changed for contexts longer than the model was trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All divided by `factor`. Chen et al. 2023, arXiv:2306.15595.
    Linear {
        factor: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, those between interpolated. Wavelengths are measured in
    /// `original_context` tokens. Llama 3.1, arXiv:2407.21783; the formula is transformers' `rope_type` `llama3`.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: f64,
    },
    /// Frequency `i` divided by factor `i`, as GGUF stores the above in `rope_freqs.weight`.
    Factors(Vec<f64>),
}

/// Frequencies as the graph's `rope` op takes them.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Dh/2 angles per position, in radians.
    pub inv_freq: Vec<f64>,
    /// Factor on the rotated values.
    pub mscale: f64,
}

impl RopeSpec {
    /// The table for heads of width `head_dim`.
    pub fn table(&self, head_dim: usize) -> RopeTable {
        let plain = |i: usize| self.theta.powf(-2.0 * i as f64 / head_dim as f64);
        let inv_freq = (0..head_dim / 2).map(|i| self.scale(i, plain(i))).collect();
        RopeTable { inv_freq, mscale: 1.0 }
    }

    fn scale(&self, i: usize, freq: f64) -> f64 {
        match &self.scaling {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor,
            RopeScaling::Factors(factors) => freq / factors.get(i).copied().unwrap_or(1.0),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / freq;
                if wavelength < original_context / high {
                    freq
                } else if wavelength > original_context / low {
                    freq / factor
                } else {
                    let smooth = (original_context / wavelength - low) / (high - low);
                    (1.0 - smooth) * freq / factor + smooth * freq
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(scaling: RopeScaling) -> Vec<f64> {
        RopeSpec { theta: 10000.0, scaling }.table(8).inv_freq
    }

    #[test]
    fn plain_frequencies_are_powers_of_the_base() {
        for (got, want) in table(RopeScaling::None).iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((got - want).abs() < 1e-15, "{got} {want}");
        }
    }

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_blends_between() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 128.0,
        };
        // wavelengths 6.3, 62.8, 628, 6283 against the borders 32 and 128
        let smooth = (128.0 * 0.1 / (2.0 * std::f64::consts::PI) - 1.0) / 3.0;
        let blended = (1.0 - smooth) * 0.1 / 8.0 + smooth * 0.1;
        for (got, want) in table(scaling).iter().zip([1.0, blended, 0.01 / 8.0, 0.001 / 8.0]) {
            assert!((got - want).abs() < 1e-15, "{got} {want}");
        }
    }

    #[test]
    fn factors_and_a_linear_factor_divide() {
        let by_two: Vec<f64> = table(RopeScaling::None).iter().map(|f| f / 2.0).collect();
        assert_eq!(table(RopeScaling::Linear { factor: 2.0 }), by_two);
        assert_eq!(table(RopeScaling::Factors(vec![2.0; 4])), by_two);
    }
}
