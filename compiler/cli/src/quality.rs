//! Figures of quality as people read them: of an evaluation, and of a certificate.

use attar_artifact::certificate::{Certificate, Quality};

/// Labels and values, without those of the reference alone when it is the model itself.
pub fn rows(q: &Quality) -> Vec<[String; 2]> {
    let with_error = |x: f64, error: f64, digits: usize| format!("{x:.digits$} +/- {error:.digits$}");
    let percent = |x: f64, error: f64| format!("{:.3} +/- {:.3} %", 100.0 * x, 100.0 * error);
    let row = |label: &str, text: String| [label.to_owned(), text];
    vec![
        row("perplexity", with_error(q.ppl, q.ppl_error, 4)),
        row("of the reference", with_error(q.ppl_reference, q.ppl_reference_error, 4)),
        row("ratio", with_error(q.ppl_ratio, q.ppl_ratio_error, 5)),
        row("ln(ratio)", with_error(q.ln_ppl_ratio, q.ln_ppl_ratio_error, 5)),
        row("KLD, mean", with_error(q.kld, q.kld_error, 6)),
        row("KLD, median", format!("{:.6}", q.kld_median)),
        row("KLD, 90 %", format!("{:.6}", q.kld_p90)),
        row("KLD, 99 %", format!("{:.6}", q.kld_p99)),
        row("KLD, 99.9 %", format!("{:.6}", q.kld_p999)),
        row("KLD, maximum", format!("{:.6}", q.kld_max)),
        row("same top token", percent(q.top1, q.top1_error)),
        row("RMS of Δp", percent(q.dp_rms, q.dp_rms_error)),
        row("mean of Δp", percent(q.dp_mean, q.dp_mean_error)),
    ]
}

/// All rows, each on a line.
pub fn table(q: &Quality) -> String {
    let lines: Vec<String> = rows(q).into_iter().map(|[label, text]| format!("{label:<17} {text}")).collect();
    lines.join("\n")
}

/// A certificate in two lines.
pub fn summary(c: &Certificate) -> String {
    let q = &c.quality;
    format!(
        "KLD {:.4} +/- {:.4} (median {:.4}, 99 % {:.3}), top-1 {:.1} %, perplexity {:.3} against {:.3} ({} weights)\n\
         on {} tokens of {}, in {} windows of {}, with {}",
        q.kld,
        q.kld_error,
        q.kld_median,
        q.kld_p99,
        100.0 * q.top1,
        q.ppl,
        q.ppl_reference,
        c.reference,
        q.scores,
        c.text.name,
        c.windows,
        c.context,
        c.target
    )
}
