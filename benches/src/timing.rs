//! Timing of work that threads share.

use std::sync::Barrier;
use std::time::Instant;

/// How long to measure.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Effort {
    /// Seconds one measurement takes at least
    #[arg(long, value_name = "SECONDS", default_value_t = 0.2)]
    seconds: f64,
    /// Runs it has at least
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: usize,
}

/// A run should last this long, so that starting threads and reading the clock do not show.
const RUN: f64 = 4e-3;

/// Work of one thread, called with the number of the unit of work and the number of the thread.
pub(crate) type Work<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// Seconds of one unit of work, the least of several runs: what disturbs a run only ever lengthens it.
pub(crate) fn fastest(threads: usize, effort: &Effort, work: Work<'_>) -> f64 {
    let [seconds] = in_turns(threads, effort, [work]);
    seconds
}

/// The same for several kinds of work, run in turns.
pub(crate) fn in_turns<const N: usize>(threads: usize, effort: &Effort, works: [Work<'_>; N]) -> [f64; N] {
    let units = works.map(|work| {
        let once = run(threads, 1, work).max(1e-9);
        let again = run(threads, ((RUN / once) as usize).max(1), work) / (RUN / once).max(1.0);
        ((RUN / again.max(1e-9)) as usize).max(1)
    });
    let mut best = [f64::INFINITY; N];
    let start = Instant::now();
    let mut runs = 0;
    while runs < effort.runs || start.elapsed().as_secs_f64() < effort.seconds * N as f64 {
        for i in 0..N {
            best[i] = best[i].min(run(threads, units[i], works[i]) / units[i] as f64);
        }
        runs += 1;
    }
    best
}

/// Seconds from the first thread's start to the last one's end.
fn run(threads: usize, units: usize, work: Work<'_>) -> f64 {
    let barrier = Barrier::new(threads);
    let one = |thread: usize| {
        barrier.wait();
        let start = Instant::now();
        for unit in 0..units {
            work(unit, thread);
        }
        (start, Instant::now())
    };
    let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|t| scope.spawn({ let one = &one; move || one(t) })).collect();
        let mine = one(0);
        others.into_iter().filter_map(|o| o.join().ok()).chain([mine]).collect()
    });
    let start = spans.iter().map(|s| s.0).min();
    let end = spans.iter().map(|s| s.1).max();
    start.zip(end).map_or(0.0, |(s, e)| (e - s).as_secs_f64())
}
