//! How many threads compute while other processes take cores away.
//!
//! A thread that loses its core in the middle of a chunk holds up its launch for a time slice, some milliseconds in
//! which a whole token would have been computed. One of n threads is worth an n-th of the speed: where more time than
//! that is lost, fewer threads are faster, and a single one is moved to a free core by the operating system and loses
//! nothing. So lost time takes threads away, multiplicatively; after a pause they are given back one at a time, and
//! the pause doubles when that was too early. It is congestion control the other way round (Chiu, Jain 1989), with
//! threads for packets.
//!
//! A pure state machine: time comes in as numbers, and nothing else is looked at.

use std::time::Duration;

/// Lost time is set against this much of all time.
const WINDOW: Duration = Duration::from_millis(100);
/// Threads go when more than this part of a thread's worth is lost; the rest is for what waits do not show.
const PART: f64 = 0.6;
/// Just after a thread has come back, this much lost is enough: it is known what took it away before.
const LOST_ON_PROBATION: Duration = Duration::from_millis(6);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// At most so long until threads that were taken away are tried again: what a try costs, about two time slices, is
/// lost in it, and a neighbour's end is noticed soon.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Least wait for others' chunks that may be a lost time slice.
const SHORTEST_LOSS: Duration = Duration::from_millis(1);

/// Whether a wait at the end of a launch looks like a time slice lost by another thread, given how long this thread
/// worked on the launch: chunks are of a size, so other threads' last ones should end about as soon.
pub(super) fn looks_lost(wait: Duration, busy: Duration) -> bool {
    wait > SHORTEST_LOSS && wait > busy
}

/// The state. Times are since any fixed moment.
#[derive(Clone, Debug)]
pub(super) struct BackOff {
    most: usize,
    active: usize,
    /// Time lost since `window`.
    lost: Duration,
    window: Duration,
    pause: Duration,
    /// When to try one thread more; only while some are away.
    retry: Duration,
    /// When a thread was last given back.
    grown: Option<Duration>,
}

impl BackOff {
    /// `most` threads, all of them computing.
    pub(super) fn new(most: usize) -> BackOff {
        BackOff {
            most,
            active: most,
            lost: Duration::ZERO,
            window: Duration::ZERO,
            pause: FIRST_PAUSE,
            retry: Duration::ZERO,
            grown: None,
        }
    }

    /// Threads to compute with from now on.
    pub(super) fn threads(&mut self, now: Duration) -> usize {
        if self.active < self.most && now >= self.retry {
            self.active += 1;
            self.grown = Some(now);
            self.retry = now + self.pause;
            (self.lost, self.window) = (Duration::ZERO, now);
        }
        self.active
    }

    /// A thread waited this long for one that had lost its core. Returns the threads to compute with.
    pub(super) fn lost(&mut self, now: Duration, wait: Duration) -> usize {
        if now.saturating_sub(self.window) > WINDOW {
            (self.lost, self.window) = (Duration::ZERO, now.saturating_sub(wait));
        }
        self.lost += wait;
        let probation = self.grown.is_some_and(|g| now.saturating_sub(g) < self.pause);
        let bearable = WINDOW.mul_f64(PART / self.active as f64);
        let bearable = if probation { bearable.min(LOST_ON_PROBATION) } else { bearable };
        if self.lost > bearable && self.active > 1 {
            self.pause = if probation { (2 * self.pause).min(LONGEST_PAUSE) } else { FIRST_PAUSE };
            self.active -= (self.active / 4).max(1);
            self.retry = now + self.pause;
            (self.lost, self.window) = (Duration::ZERO, now);
        }
        self.active
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_slice_now_and_then_changes_nothing() {
        let mut b = BackOff::new(2);
        // A fifth of the time.
        for i in 1..1000 {
            assert_eq!(b.lost(ms(20 * i), ms(4)), 2);
            assert_eq!(b.threads(ms(20 * i + 1)), 2);
        }
    }

    /// Runs for ten seconds beside a neighbour that takes every other slice of 4 ms of the second thread's core.
    /// Returns the tokens computed, where two threads undisturbed take 1 ms and one takes 2 ms.
    fn beside_a_neighbour(b: &mut BackOff) -> f64 {
        let (mut now, mut tokens) = (ms(1000), 0.0);
        while now < ms(11_000) {
            if b.threads(now) == 2 {
                now += ms(8);
                tokens += 4.0;
                b.lost(now, ms(4));
            } else {
                now += ms(2);
                tokens += 1.0;
            }
        }
        tokens
    }

    #[test]
    fn a_neighbour_costs_its_core_and_little_more() {
        let tokens = beside_a_neighbour(&mut BackOff::new(2));
        assert!(tokens >= 0.97 * 5000.0, "{tokens}");
        // And where losses are worse than the time waited, one thread computes nearly always.
        let mut b = BackOff::new(2);
        let (mut now, mut two) = (ms(1000), Duration::ZERO);
        while now < ms(11_000) {
            let threads = b.threads(now);
            now += ms(4);
            if threads == 2 {
                b.lost(now, ms(3));
                two += ms(4);
            }
        }
        assert!(two < ms(500), "{two:?}");
        assert_eq!(b.pause, LONGEST_PAUSE);
    }

    #[test]
    fn threads_come_back_when_the_neighbour_has_gone() {
        for most in [2, 5, 16] {
            let mut b = BackOff::new(most);
            let mut now = ms(1);
            while b.active > 1 {
                now += ms(4);
                b.lost(now, ms(4));
            }
            let gone = now;
            while b.threads(now) < most {
                now += ms(2);
            }
            assert!(now - gone <= most as u32 * (FIRST_PAUSE + ms(2)), "{most}: {:?}", now - gone);
            // And losses much later start from the shortest pause again.
            now += ms(60_000);
            while b.active == most {
                now += ms(4);
                b.lost(now, ms(4));
            }
            assert_eq!(b.pause, FIRST_PAUSE);
        }
    }

    /// With one neighbour on many cores most threads go on.
    #[test]
    fn only_as_many_go_as_must() {
        let mut b = BackOff::new(16);
        let mut now = ms(1);
        let (mut sum, mut steps) = (0, 0);
        while now < ms(10_000) {
            let threads = b.threads(now);
            now += ms(2);
            if threads == 16 {
                b.lost(now, ms(1));
            }
            (sum, steps) = (sum + threads, steps + 1);
        }
        assert!(sum / steps >= 13, "{}", sum / steps);
    }

    #[test]
    fn long_chunks_are_no_losses() {
        assert!(!looks_lost(ms(3), ms(20)));
        assert!(!looks_lost(Duration::from_micros(900), Duration::ZERO));
        assert!(looks_lost(ms(4), ms(1)));
    }

    proptest! {
        #[test]
        fn always_one_to_all(most in 1usize..40, events in proptest::collection::vec((0u64..200, any::<bool>()), 0..300)) {
            let mut b = BackOff::new(most);
            let mut now = Duration::ZERO;
            for (wait, loss) in events {
                now += ms(wait);
                let n = if loss { b.lost(now, ms(wait)) } else { b.threads(now) };
                prop_assert!((1..=most).contains(&n));
            }
        }
    }
}
