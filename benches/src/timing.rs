//! Timing of work that threads share.

use std::ops::Range;
use std::sync::Barrier;
use std::time::Instant;

/// How long to measure.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Effort {
    /// Seconds one measurement takes at least
    #[arg(long, value_name = "SECONDS", default_value_t = 0.2)]
    pub(crate) seconds: f64,
    /// Runs it has at least
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) runs: usize,
}

/// A run should last this long, so that starting threads and reading the clock do not show.
const RUN: f64 = 4e-3;

/// Kernels keep panels and tiles on the stack; the runtime gives its threads as much.
const STACK: usize = 8 << 20;

/// Work of one thread, called with the number of the unit of work and the number of the thread. Units are counted on from
/// run to run, so that work which goes round some memory does not begin with what it has just left in the caches.
pub(crate) type Work<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// Seconds of one unit of work, the least of several runs: what disturbs a run only ever lengthens it.
pub(crate) fn fastest(threads: usize, effort: &Effort, work: Work<'_>) -> f64 {
    let [seconds] = in_turns(threads, effort, [work]);
    seconds
}

/// The same for several kinds of work, run in turns.
pub(crate) fn in_turns<const N: usize>(threads: usize, effort: &Effort, works: [Work<'_>; N]) -> [f64; N] {
    let units = works.map(|work| {
        let once = run(threads, 0..1, work).max(1e-9);
        let few = ((RUN / once) as usize).max(1);
        let again = run(threads, 1..few + 1, work) / few as f64;
        ((RUN / again.max(1e-9)) as usize).max(1)
    });
    let mut next = [0; N];
    let mut best = [f64::INFINITY; N];
    let start = Instant::now();
    let mut runs = 0;
    while runs < effort.runs || start.elapsed().as_secs_f64() < effort.seconds * N as f64 {
        for i in 0..N {
            let range = next[i]..next[i] + units[i];
            next[i] = range.end;
            best[i] = best[i].min(run(threads, range, works[i]) / units[i] as f64);
        }
        runs += 1;
    }
    best
}

/// Seconds from the first thread's start to the last one's end.
fn run(threads: usize, units: Range<usize>, work: Work<'_>) -> f64 {
    let barrier = Barrier::new(threads);
    let one = |thread: usize| {
        barrier.wait();
        let start = Instant::now();
        for unit in units.clone() {
            work(unit, thread);
        }
        (start, Instant::now())
    };
    let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let spawn = |thread| {
            let one = &one;
            let builder = std::thread::Builder::new().stack_size(STACK);
            builder.spawn_scoped(scope, move || one(thread)).expect("a thread")
        };
        let all: Vec<_> = (0..threads).map(spawn).collect();
        all.into_iter().map(|t| t.join().expect("the work ends")).collect()
    });
    let start = spans.iter().map(|s| s.0).min();
    let end = spans.iter().map(|s| s.1).max();
    start.zip(end).map_or(0.0, |(s, e)| (e - s).as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    #[test]
    fn units_are_counted_on_and_reach_every_thread() {
        let seen = Mutex::new(Vec::new());
        let work = |unit, thread| seen.lock().unwrap().push((unit, thread));
        run(3, 5..9, &work);
        let seen: BTreeSet<(usize, usize)> = seen.into_inner().unwrap().into_iter().collect();
        assert_eq!(seen, (5..9).flat_map(|u| (0..3).map(move |t| (u, t))).collect());
    }

    #[test]
    fn the_longer_work_takes_longer() {
        let nap = |ms| move |_: usize, _: usize| std::thread::sleep(std::time::Duration::from_millis(ms));
        let effort = Effort { seconds: 0.0, runs: 2 };
        let [short, long] = in_turns(1, &effort, [&nap(1), &nap(30)]);
        assert!(short >= 1e-3 && long >= 30e-3, "{short} {long}");
    }
}
