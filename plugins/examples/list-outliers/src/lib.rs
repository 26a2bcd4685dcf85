//! `list-outliers`: writes a table of the columns that stand out of the inputs of each layer.
//!
//! Columns whose largest magnitude is many times the root mean square of the layer's inputs are what makes activations hard to
//! quantize (Dettmers et al. 2022, arXiv:2208.07339). The pass changes nothing; it writes a line of CSV for every such column,
//! the largest first within a layer. Needs calibration.

use attar_plugin::{About, Context, Numerics, Pass, Phase, Result};
use std::collections::BTreeSet;
use std::fmt::Write;

attar_plugin::options! {
    /// Options of the pass.
    pub struct Options {
        /// file to write
        pub path: String = "outliers.csv";
        /// how many times the layer's root mean square a column must reach
        pub factor: f64 = 6.0, float 1.0..=1000000.0;
        /// most columns of a layer
        pub most: usize = 16, int 1..=1000000;
    }
}

/// See the crate's documentation.
#[derive(Debug)]
pub struct ListOutliers;

attar_plugin::plugin! { passes: [ListOutliers] }

impl Pass for ListOutliers {
    type Options = Options;

    const ABOUT: About = About {
        name: "list-outliers",
        summary: "writes a table of the columns that stand out of the inputs of layers",
        phase: Phase::Compress,
        numerics: Numerics::Exact,
        takes_tensors: true,
    };

    fn run(options: &Options, cx: &Context<'_>) -> Result<()> {
        let wanted = cx.tensors()?;
        let linears = cx.nodes_of("linear")?;
        let mut table = String::from("layer,column,max_abs,rms_of_column,times_rms_of_layer\n");
        let mut seen = BTreeSet::new();
        let mut count = 0u64;
        for (done, node) in linears.iter().enumerate() {
            let inputs = cx.inputs_of(*node)?;
            let Some(name) = cx.weight_of(inputs[1])? else { continue };
            // q, k and v take the same values; the first of them stands for all.
            if !wanted.contains(&name) || !seen.insert(inputs[0]) {
                continue;
            }
            cx.progress(&name, done as u64, linears.len() as u64)?;
            let statistics = cx.statistics(inputs[0])?;
            let (squares, largest) = (statistics.mean_squares(), statistics.max_abs());
            let rms =
                (squares.iter().map(|s| f64::from(*s)).sum::<f64>() / squares.len().max(1) as f64).sqrt();
            let times = |column: usize| f64::from(largest[column]) / rms.max(f64::MIN_POSITIVE);
            let mut columns: Vec<usize> =
                (0..largest.len()).filter(|c| times(*c) >= options.factor).collect();
            columns.sort_by(|a, b| largest[*b].total_cmp(&largest[*a]).then(a.cmp(b)));
            count += columns.len() as u64;
            cx.metric(&name, [("outlier_columns", (columns.len() as u64).into())])?;
            for column in columns.into_iter().take(options.most) {
                let (max, column_rms) = (largest[column], squares[column].sqrt());
                // Writing to a string does not fail.
                let _ = writeln!(table, "{name},{column},{max:.6},{column_rms:.6},{:.2}", times(column));
            }
        }
        std::fs::write(&options.path, table)
            .map_err(|e| attar_plugin::Error::from(e).context(format!("path {}", options.path)))?;
        cx.info(format!("{count} columns stand out; wrote {}", options.path));
        Ok(())
    }
}
