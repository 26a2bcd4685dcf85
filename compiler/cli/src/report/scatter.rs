//! Size against divergence: a point for each certified artifact, as large as it is fast, and the line of those that no other
//! one beats in both.

use super::Subject;
use serde::Serialize;

const WIDTH: f64 = 1100.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = WIDTH - 30.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = HEIGHT - 50.0;

#[derive(Serialize)]
pub(super) struct Scatter {
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x_ticks: Vec<Tick>,
    y_ticks: Vec<Tick>,
    dots: Vec<Dot>,
    /// Points of a line, as SVG has them.
    front: String,
    note: String,
}

#[derive(Serialize)]
struct Tick {
    at: f64,
    label: String,
}

#[derive(Serialize)]
struct Dot {
    x: f64,
    y: f64,
    r: f64,
    color: &'static str,
    label: String,
    label_x: f64,
    label_y: f64,
    anchor: &'static str,
    title: String,
}

/// `None` with fewer than two certified artifacts.
pub(super) fn scatter(subjects: &[Subject]) -> Option<Scatter> {
    // A model that is its own reference diverges by nothing; a logarithm needs something.
    const LEAST: f64 = 1e-5;
    let points: Vec<(f64, f64, &Subject)> = subjects
        .iter()
        .filter_map(|s| Some((s.bytes as f64 / 1e6, s.certificate.as_ref()?.quality.kld.max(LEAST), s)))
        .collect();
    if points.len() < 2 {
        return None;
    }
    let range = |v: &dyn Fn(&(f64, f64, &Subject)) -> f64| {
        points.iter().map(v).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)))
    };
    let (x_low, x_high) = range(&|p| p.0);
    let pad = ((x_high - x_low) * 0.08).max(1.0);
    let (x_low, x_high) = ((x_low - pad).max(0.0), x_high + pad);
    let (y_low, y_high) = range(&|p| p.1.log10());
    let (y_low, y_high) = (y_low - 0.15, y_high + 0.15);
    let x_of = |x: f64| LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT);
    let y_of = |y: f64| BOTTOM - (y.log10() - y_low) / (y_high - y_low) * (BOTTOM - TOP);

    let fastest = points.iter().filter_map(|p| p.2.tokens_per_second).fold(0.0, f64::max);
    let dots = points.iter().map(|(x, y, s)| {
        let speed = s.tokens_per_second;
        let r = speed.map_or(7.0, |t| 5.0 + 9.0 * (t / fastest.max(1e-9)).sqrt());
        let name = s.file.strip_suffix(".attar").unwrap_or(&s.file);
        let label = speed.map_or(name.to_owned(), |t| format!("{name}, {t:.0} t/s"));
        let right = x_of(*x) > WIDTH * 0.75;
        Dot {
            x: x_of(*x),
            y: y_of(*y),
            r,
            color: "#4477aa",
            label_x: if right { x_of(*x) - r - 6.0 } else { x_of(*x) + r + 6.0 },
            label_y: y_of(*y) + 4.0,
            anchor: if right { "end" } else { "start" },
            title: format!("{}: {x:.1} MB, KLD {y:.4}", s.file),
            label,
        }
    });
    let mut sorted: Vec<(f64, f64)> = points.iter().map(|p| (p.0, p.1)).collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut least = f64::INFINITY;
    sorted.retain(|p| {
        let better = p.1 < least;
        least = least.min(p.1);
        better
    });
    let front: Vec<String> = sorted.iter().map(|p| format!("{:.1},{:.1}", x_of(p.0), y_of(p.1))).collect();
    let speeds = points.iter().any(|p| p.2.tokens_per_second.is_some());
    let note = format!(
        "The dashed line joins artifacts that no other one beats in both.{}",
        if speeds { " The larger a point, the faster it generates on this machine." } else { "" }
    );
    Some(Scatter {
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
        right: RIGHT,
        top: TOP,
        bottom: BOTTOM,
        x_ticks: steps(x_low, x_high).map(|x| Tick { at: x_of(x), label: format!("{x:.0}") }).collect(),
        y_ticks: decades(y_low, y_high).map(|y| Tick { at: y_of(y), label: format!("{y}") }).collect(),
        dots: dots.collect(),
        front: front.join(" "),
        note,
    })
}

/// Round numbers between two, five to ten of them.
fn steps(low: f64, high: f64) -> impl Iterator<Item = f64> {
    let rough = (high - low) / 8.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|f| f * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(move |i| i as f64 * step)
}

/// 1, 2 and 5 times powers of ten between two logarithms.
fn decades(low: f64, high: f64) -> impl Iterator<Item = f64> {
    (low.floor() as i32..=high.ceil() as i32)
        .flat_map(|p| [1.0, 2.0, 5.0].map(|f: f64| (f, p)))
        .map(|(f, p)| (f * 10f64.powi(p) * 1e7).round() / 1e7)
        .filter(move |v| *v > 0.0 && (low..=high).contains(&v.log10()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(steps(58.0, 148.0).collect::<Vec<_>>(), [60.0, 80.0, 100.0, 120.0, 140.0]);
        assert_eq!(decades(-2.1, -0.6).collect::<Vec<_>>(), [0.01, 0.02, 0.05, 0.1, 0.2]);
    }
}
