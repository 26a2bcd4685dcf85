//! How far ahead of the weights kernels prefetch, tuned for the machine in a few milliseconds.
//!
//! The best distance depends on where weights come from: nearer from memory, farther from a large cache. Launches take
//! microseconds, so what one prefetches at its end, the beginning of the next one's weights, counts as much as what it
//! prefetches for itself. So one step of the decode program is run, launch by launch, with another candidate for each layer
//! in turn; no candidate profits from what another has brought into the caches, and only times of the same kernel are
//! compared.

use std::time::Duration;

/// What is tried, in bytes.
pub(crate) const CANDIDATES: [u64; 5] = [512, 1024, 2048, 4096, 8192];
/// Used where a program is too small to tell.
pub(crate) const DEFAULT: u64 = 4096;
/// Greatest distance that may be asked for.
pub(crate) const MOST: u64 = 65536;

/// Weights that a sample reads, at most. Of a larger matrix it reads the beginning, and what its chunks prefetch at their ends
/// must be little beside that: it is not used.
const SLICE_BYTES: u64 = 4 << 20;
/// A launch that reads less is all overhead.
const LEAST_BYTES: u64 = 64 << 10;
/// Launches that share a candidate, at most.
const LAYER: usize = 16;
/// No further round of candidates begins after this.
const BUDGET: Duration = Duration::from_millis(4);
/// What a candidate must be better by than [`DEFAULT`]: less is noise.
const MARGIN: f64 = 0.05;

/// A launch that prefetches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weighed {
    /// Index in the program.
    pub(crate) launch: usize,
    /// Launches of one group run the same kernel.
    pub(crate) group: usize,
    pub(crate) weight_bytes: u64,
    pub(crate) grid: u64,
}

/// Chooses a distance. `run(launch, items, distance)` computes the first items of a launch and returns how long that
/// took.
pub(crate) fn tune(launches: &[Weighed], mut run: impl FnMut(usize, u64, u64) -> Duration) -> u64 {
    let mut launches = launches.iter().filter(|l| l.weight_bytes >= LEAST_BYTES && l.grid > 0).peekable();
    // Threads wake up, and code comes into the caches: the first layer does not count.
    let Some(warm) = launches.next() else { return DEFAULT };
    run(warm.launch, warm.grid.div_ceil(8), DEFAULT);
    for _ in 1..LAYER {
        let Some(l) = launches.next_if(|l| l.group != warm.group) else { break };
        run(l.launch, l.grid.div_ceil(8), DEFAULT);
    }
    let mut groups: Vec<Group> = Vec::new();
    let mut spent = Duration::ZERO;
    let mut layers = 0;
    while let Some(first) = launches.next() {
        // Only after a round of all candidates: none is judged by more samples than another.
        if layers % CANDIDATES.len() == 0 && spent >= BUDGET {
            break;
        }
        // Another order in each round, so that no candidate always follows the same other.
        let candidate = (layers + layers / CANDIDATES.len()) % CANDIDATES.len();
        layers += 1;
        let distance = CANDIDATES.get(candidate).copied().unwrap_or(DEFAULT);
        let mut sample = |l: &Weighed| {
            let items = (u128::from(l.grid) * u128::from(SLICE_BYTES.min(l.weight_bytes)))
                .div_ceil(u128::from(l.weight_bytes)) as u64;
            let time = run(l.launch, items, distance);
            spent += time;
            time.as_secs_f64() / (l.weight_bytes as f64 * items as f64 / l.grid as f64)
        };
        // The beginning of its weights was prefetched with the candidate before.
        sample(first);
        for _ in 1..LAYER {
            let Some(l) = launches.next_if(|l| l.group != first.group) else { break };
            if groups.len() <= l.group {
                groups.resize_with(l.group + 1, Group::default);
            }
            let cost = sample(l);
            if let Some(group) = groups.get_mut(l.group) {
                group.weight_bytes += l.weight_bytes as f64;
                if let Some(costs) = group.costs.get_mut(candidate) {
                    costs.push(cost);
                }
            }
        }
    }
    groups.retain(|g| g.costs.iter().all(|costs| !costs.is_empty()));
    for costs in groups.iter_mut().flat_map(|g| &mut g.costs) {
        costs.sort_unstable_by(f64::total_cmp);
    }
    // Medians: the least would be that of a layer which some cache still holds.
    let cost = |candidate: usize| -> f64 {
        let of = |g: &Group| {
            let costs = g.costs.get(candidate).map_or(&[][..], Vec::as_slice);
            costs.get(costs.len().saturating_sub(1) / 2).copied().unwrap_or(f64::INFINITY) * g.weight_bytes
        };
        groups.iter().map(of).sum()
    };
    let by_default = CANDIDATES.iter().position(|c| *c == DEFAULT).map_or(0.0, cost);
    let found = CANDIDATES.iter().enumerate().map(|(i, distance)| (cost(i), *distance));
    match found.min_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((cost, distance)) if cost < by_default * (1.0 - MARGIN) => distance,
        _ => DEFAULT,
    }
}

/// Launches of the same kernel.
#[derive(Clone, Debug, Default)]
struct Group {
    weight_bytes: f64,
    /// Seconds per byte with each candidate.
    costs: [Vec<f64>; CANDIDATES.len()],
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launches(n: usize, weight_bytes: u64) -> Vec<Weighed> {
        (0..n).map(|launch| Weighed { launch, group: launch % 2, weight_bytes, grid: 100 }).collect()
    }

    /// A machine on which `best` is the fastest distance, by a tenth.
    fn machine(best: u64, ran: &mut Vec<(usize, u64)>) -> impl FnMut(usize, u64, u64) -> Duration {
        move |launch, items, distance| {
            ran.push((launch, distance));
            // Kernels of the odd group take twice as long, and times waver a little.
            let base = items as f64 * if launch % 2 == 1 { 2e-6 } else { 1e-6 };
            let factor = if distance == best { 0.9 } else { 1.0 } + (launch % 7) as f64 * 1e-3;
            Duration::from_secs_f64(base * factor)
        }
    }

    #[test]
    fn the_fastest_is_found_and_no_weights_are_read_twice() {
        for best in CANDIDATES {
            let mut ran = Vec::new();
            assert_eq!(tune(&launches(62, 500_000), machine(best, &mut ran)), best);
            let mut seen: Vec<usize> = ran.iter().map(|r| r.0).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), ran.len());
        }
    }

    #[test]
    fn too_small_programs_get_the_default() {
        let mut ran = Vec::new();
        assert_eq!(tune(&[], machine(0, &mut ran)), DEFAULT);
        assert_eq!(tune(&launches(60, 1000), machine(0, &mut ran)), DEFAULT);
        assert_eq!(tune(&launches(8, 500_000), machine(0, &mut ran)), DEFAULT);
        // No difference worth the name.
        assert_eq!(tune(&launches(60, 500_000), |_, items, _| Duration::from_micros(items)), DEFAULT);
    }

    /// Each layer has four matrices in the same order.
    fn layers(n: usize, weight_bytes: u64) -> Vec<Weighed> {
        (0..4 * n).map(|launch| Weighed { launch, group: launch % 4, weight_bytes, grid: 100 }).collect()
    }

    #[test]
    fn large_models_are_sliced_and_tuned_in_one_round() {
        for best in CANDIDATES {
            let mut bytes = 0;
            let found = tune(&layers(100, 20 << 20), |_, items, distance| {
                bytes += (items << 20) / 5;
                // A slow memory: each sample takes half a millisecond.
                Duration::from_micros(if distance == best { 450 } else { 500 })
            });
            assert_eq!(found, best);
            assert!(bytes <= 100 << 20, "{bytes}");
        }
    }

    /// The first matrix has a format of its own: it is no sign of where layers begin.
    #[test]
    fn an_unlike_first_matrix_costs_no_more() {
        let mut all = layers(30, 500_000);
        all[0].group = 4;
        let mut warm = 0;
        let best = 8192;
        let found = tune(&all, |_, items, distance| {
            warm += usize::from(items < 100);
            Duration::from_micros(if distance == best { 9 } else { 10 })
        });
        assert_eq!((found, warm), (best, LAYER));
    }
}
