//! Worker threads that run a program's launches together.
//!
//! Every thread walks the whole list of launches. Within a launch threads claim chunks of the grid until none is left,
//! then wait until all chunks are finished. Nobody waits for a *thread*: one that lost its core between chunks holds up
//! nothing, finds its claims refused when it comes back, and catches up. So a busy neighbour costs what it takes and
//! not more.
//!
//! A launch too small to be shared out is the *tail* of the one before: whoever finishes that one's last chunk runs the
//! tail whole before the launch counts as finished, so that no barrier stands between the two.
//!
//! A claim counter holds the job's epoch above the number of chunks left, and a claim is a compare-and-swap on both. A
//! thread left behind in an older job can therefore never claim a chunk of a newer one, and what a job points to is
//! read only under a claim, which keeps the job alive: its caller returns only when all chunks are finished.
//!
//! Waiting spins for about 16 µs, then sleeps; between jobs a little longer, since the next token's job follows soon.
//! A wait that looks like a time slice lost by another thread is told to [`super::backoff`], which takes threads away
//! while that goes on. Threads that are away sleep in a room of their own, where nothing wakes them but their return.

use super::backoff::{BackOff, looks_lost};
use super::executable::Kernel;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SPIN: Duration = Duration::from_micros(16);
/// Between two tokens' jobs lies the choice of a token, which takes longer than a launch's tail; sleeping through it
/// would cost two system calls and a late start each time.
const SPIN_BETWEEN_JOBS: Duration = Duration::from_micros(100);
/// Most grid items of a chunk: who has none left waits for the last chunk of the others, and sleeps when that takes long.
const MOST_ITEMS: u64 = 32;
/// Kernels keep panels and sums on the stack, above all those with tiles.
const STACK: usize = 8 << 20;

/// One kernel call of a job, with its arguments resolved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Task {
    pub(crate) kernel: Kernel,
    pub(crate) args: *const u64,
    pub(crate) grid: u64,
    /// Chunks per thread: enough that a slow thread is made up for, few enough that their starts cost little.
    pub(crate) chunks: u64,
    /// Whether threads keep apart in the grid, rather than take its items in order: neighbours among a matrix's channels are
    /// neighbours in the rows they write, and threads that write the same cache lines wait for each other.
    pub(crate) apart: bool,
    /// Run whole by the thread that finishes the task before; never the first of a job.
    pub(crate) tail: bool,
}

/// Threads that run jobs; the caller's thread is one of them.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    epoch: u32,
    backoff: BackOff,
    /// Lost time that the caller's thread saw in the last job, and has told to the back-off.
    told: Duration,
    /// What the back-off's times count from.
    start: Instant,
}

#[derive(Debug)]
struct Shared {
    /// Epoch above the number of launches.
    job: AtomicU64,
    stop: AtomicBool,
    slots: Box<[Slot]>,
    /// Where threads wait for each other, and where those wait that are away.
    room: Room,
    away: Room,
    /// Threads that compute, the caller's included: workers of a higher index are away.
    active: AtomicUsize,
    /// The longest that a worker waited for a lost time slice in the last job, in nanoseconds.
    lost: AtomicU64,
}

/// Threads asleep until something they look at changes.
#[derive(Debug, Default)]
struct Room {
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// State of one launch, on cache lines of its own (128 bytes: neighbouring lines are fetched in pairs).
#[derive(Debug)]
#[repr(align(128))]
struct Slot {
    /// Epoch above the chunks not yet claimed.
    claim: AtomicU64,
    /// Epoch above the chunks not yet finished.
    left: AtomicU64,
    work: UnsafeCell<Work>,
}

#[derive(Debug)]
struct Work {
    task: Option<Task>,
    /// Grid items of a chunk.
    chunk: u64,
    chunks: u64,
    /// Where in the caller's list the tails begin, and how many there are.
    tails: *const Task,
    tail_count: usize,
    /// Runs of chunks that claims take in turns.
    runs: u64,
}

impl Work {
    /// The chunk that the claim number `claim` is for: with two runs 0, C/2, 1, C/2 + 1, … Claims that are worked on at the
    /// same time lie far apart.
    fn place(&self, claim: u64) -> u64 {
        let (run, at) = (claim % self.runs, claim / self.runs);
        run * (self.chunks / self.runs) + run.min(self.chunks % self.runs) + at
    }
}

// SAFETY: `work` is written only by the caller of `run` between jobs, when no chunk is claimable, and read only under
// a claim, which happens after the write (release store and acquire swap of `claim`) and before the job ends.
unsafe impl Sync for Slot {}
// SAFETY: the pointers in `work`, `tails` among them, are plain numbers to a slot; whoever uses them holds a claim as above.
unsafe impl Send for Slot {}

impl Pool {
    /// `threads` threads including the caller's, for jobs of at most `launches` launches. When the system gives fewer
    /// threads, there are fewer.
    pub(crate) fn new(threads: usize, launches: usize) -> Pool {
        let slot = |_| Slot {
            claim: AtomicU64::new(0),
            left: AtomicU64::new(0),
            work: UnsafeCell::new(Work {
                task: None,
                chunk: 0,
                chunks: 0,
                tails: std::ptr::null(),
                tail_count: 0,
                runs: 1,
            }),
        };
        let shared = Arc::new(Shared {
            job: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            slots: (0..launches).map(slot).collect(),
            room: Room::default(),
            away: Room::default(),
            active: AtomicUsize::new(threads),
            lost: AtomicU64::new(0),
        });
        let mut workers = Vec::new();
        for i in 1..threads {
            let shared = Arc::clone(&shared);
            let spawned = std::thread::Builder::new()
                .name(format!("attar-{i}"))
                .stack_size(STACK)
                .spawn(move || shared.work_until_stopped(i));
            match spawned {
                Ok(handle) => workers.push(handle),
                Err(_) => break,
            }
        }
        let threads = workers.len() + 1;
        shared.active.store(threads, Ordering::Release);
        Pool {
            shared,
            workers,
            epoch: 0,
            backoff: BackOff::new(threads),
            told: Duration::ZERO,
            start: Instant::now(),
        }
    }

    /// Threads that work, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs the tasks in order, each to its end before the next begins, with subnormal numbers treated as zero.
    ///
    /// # Safety
    /// For every task the conditions of [`Kernel::call`] hold until this returns, for any way of cutting the grid
    /// into ranges that run at the same time.
    pub(crate) unsafe fn run(&mut self, tasks: &[Task]) {
        let _flush = FlushSubnormals::on();
        let threads = self.adjust();
        if threads == 1 || tasks.len() > self.shared.slots.len() {
            for task in tasks {
                if task.grid > 0 {
                    // SAFETY: as promised by the caller.
                    unsafe { task.kernel.call(task.args, 0, task.grid) };
                }
            }
            return;
        }
        self.epoch = self.epoch.wrapping_add(1);
        let tag = u64::from(self.epoch) << 32;
        let mut launches = 0;
        let mut rest = tasks;
        while let (Some((task, after)), Some(slot)) = (rest.split_first(), self.shared.slots.get(launches)) {
            let tail_count = after.iter().take_while(|t| t.tail).count();
            let (tails, next) = after.split_at_checked(tail_count).unwrap_or_default();
            let wanted = task.grid.min(threads as u64 * task.chunks).max(1);
            let chunk = task.grid.div_ceil(wanted).clamp(1, MOST_ITEMS);
            // With tails there is always a chunk, if an empty one, for somebody to finish.
            let chunks = task.grid.div_ceil(chunk).max(u64::from(tail_count > 0));
            let runs = if task.apart { threads as u64 } else { 1 };
            let work = Work { task: Some(*task), chunk, chunks, tails: tails.as_ptr(), tail_count, runs };
            // SAFETY: the last job has ended, so no chunk of this slot can be claimed and nobody reads.
            unsafe { *slot.work.get() = work };
            slot.left.store(tag | (chunks + u64::from(tail_count > 0)), Ordering::Release);
            slot.claim.store(tag | chunks, Ordering::Release);
            launches += 1;
            rest = next;
        }
        self.shared.job.store(tag | launches as u64, Ordering::Release);
        self.shared.room.wake_all();
        let (shared, backoff, told, start) = (&self.shared, &mut self.backoff, &mut self.told, self.start);
        shared.work(self.epoch, launches, usize::MAX, |now, wait| {
            *told += wait;
            // Workers beyond leave at their next launch; this job's other chunks are claimed by those that stay.
            shared.active.fetch_min(backoff.lost(now - start, wait), Ordering::AcqRel);
        });
    }

    /// Runs the tasks one by one and tells how long each took, from its start to its end on all threads.
    ///
    /// # Safety
    /// As [`Pool::run`].
    pub(crate) unsafe fn run_timed(&mut self, tasks: &[Task], times: &mut [Duration]) {
        for (task, time) in tasks.iter().zip(times) {
            let start = Instant::now();
            // SAFETY: as promised by the caller.
            unsafe { self.run(&[Task { tail: false, ..*task }]) };
            *time = start.elapsed();
        }
    }

    /// Counts what was lost, and takes threads away or calls them back. Returns how many compute now.
    fn adjust(&mut self) -> usize {
        if self.workers.is_empty() {
            return 1;
        }
        let now = self.start.elapsed();
        // All threads that waited for a lost slice saw the same one: only what workers saw and the caller did not is new.
        if self.shared.lost.load(Ordering::Relaxed) > 0 {
            let seen = Duration::from_nanos(self.shared.lost.swap(0, Ordering::Relaxed));
            if seen > self.told {
                self.backoff.lost(now, seen - self.told);
            }
        }
        self.told = Duration::ZERO;
        let threads = self.backoff.threads(now);
        if self.shared.active.swap(threads, Ordering::AcqRel) < threads {
            self.shared.away.wake_all();
        }
        threads
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.room.wake_all();
        self.shared.away.wake_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work_until_stopped(&self, index: usize) {
        let _flush = FlushSubnormals::on();
        let stopped = || self.stop.load(Ordering::Acquire);
        let away = || index >= self.active.load(Ordering::Acquire);
        let mut seen = 0;
        loop {
            if away() {
                self.away.wait(Duration::ZERO, || !away() || stopped());
            }
            self.room.wait(SPIN_BETWEEN_JOBS, || {
                epoch_of(self.job.load(Ordering::Acquire)) != seen || stopped() || away()
            });
            if stopped() {
                return;
            }
            let job = self.job.load(Ordering::Acquire);
            if epoch_of(job) != seen {
                seen = epoch_of(job);
                self.work(seen, count_of(job) as usize, index, |_, wait| {
                    self.lost.fetch_max(wait.as_nanos() as u64, Ordering::Relaxed);
                });
            }
        }
    }

    /// Walks the launches of a job; returns at its end, or when it has ended without this thread, or when this worker
    /// (the caller has the index `usize::MAX`) is sent away. `lost` is told of time slices that others seem to have
    /// lost.
    fn work(&self, epoch: u32, launches: usize, index: usize, mut lost: impl FnMut(Instant, Duration)) {
        let mut begun = Instant::now();
        for slot in self.slots.iter().take(launches) {
            if index != usize::MAX && index >= self.active.load(Ordering::Relaxed) {
                return;
            }
            let mut worked = false;
            loop {
                let now = slot.claim.load(Ordering::Acquire);
                if epoch_of(now) != epoch {
                    return;
                }
                let unclaimed = count_of(now);
                if unclaimed == 0 {
                    break;
                }
                if slot
                    .claim
                    .compare_exchange_weak(now, now - 1, Ordering::AcqRel, Ordering::Acquire)
                    .is_err()
                {
                    continue;
                }
                // SAFETY: we hold a claim, so the job is alive and nobody writes to `work`.
                let work = unsafe { &*slot.work.get() };
                if let Some(task) = work.task {
                    let begin = work.place(work.chunks - unclaimed) * work.chunk;
                    let end = (begin + work.chunk).min(task.grid);
                    if begin < end {
                        // SAFETY: the caller of `run` promised it for every range of the grid while the job lives.
                        unsafe { task.kernel.call(task.args, begin, end) };
                    }
                }
                worked = true;
                let mut left = count_of(slot.left.fetch_sub(1, Ordering::AcqRel)) - 1;
                if left == 1 && work.tail_count > 0 {
                    // What is left are the tails, and we finished what they follow. The job cannot end before them, so
                    // the caller's list is still there.
                    for i in 0..work.tail_count {
                        // SAFETY: `tails` points to as many tasks; the caller of `run` promised what kernels need.
                        unsafe {
                            let tail = &*work.tails.add(i);
                            if tail.grid > 0 {
                                tail.kernel.call(tail.args, 0, tail.grid);
                            }
                        }
                    }
                    left = count_of(slot.left.fetch_sub(1, Ordering::AcqRel)) - 1;
                }
                if left == 0 {
                    self.room.wake_all();
                }
            }
            let done = || {
                let left = slot.left.load(Ordering::Acquire);
                count_of(left) == 0 || epoch_of(left) != epoch
            };
            // The clock is read only where threads really wait: `begun` may lie some launches back, which makes a
            // loss look smaller by what those took, microseconds against a time slice.
            if let Some(waited_from) = self.room.wait(SPIN, done) {
                let now = Instant::now();
                if worked && looks_lost(now - waited_from, waited_from - begun) {
                    lost(now, now - waited_from);
                }
                begun = now;
            }
        }
    }
}

impl Room {
    /// Waits until `done`, spinning for a while first. Returns when the wait began, if it was not over at once.
    fn wait(&self, spin: Duration, done: impl Fn() -> bool) -> Option<Instant> {
        for _ in 0..32 {
            if done() {
                return None;
            }
            spin_loop();
        }
        let start = Instant::now();
        while start.elapsed() < spin {
            for _ in 0..32 {
                if done() {
                    return Some(start);
                }
                spin_loop();
            }
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // Pairs with the fence in `wake_all`: either the waker sees this sleeper, or we see what it did.
        fence(Ordering::SeqCst);
        while !done() {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        Some(start)
    }

    fn wake_all(&self) {
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // Taken and dropped, so that a sleeper is not between its last look and its sleep.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }
}

fn epoch_of(word: u64) -> u32 {
    (word >> 32) as u32
}

fn count_of(word: u64) -> u64 {
    word & 0xffff_ffff
}

/// Makes floating-point operations of this thread take subnormal numbers for zero, until dropped: they cost a
/// hundred times as much as others, and no weight or activation depends on them.
struct FlushSubnormals {
    before: u64,
}

impl FlushSubnormals {
    fn on() -> FlushSubnormals {
        let before = control::read();
        control::write(before | control::FLUSH);
        FlushSubnormals { before }
    }
}

impl Drop for FlushSubnormals {
    fn drop(&mut self) {
        control::write(self.before);
    }
}

/// The floating-point control register.
#[cfg(target_arch = "x86_64")]
mod control {
    /// MXCSR: flush to zero, denormals are zero.
    pub(super) const FLUSH: u64 = 0x8040;

    pub(super) fn read() -> u64 {
        let mut word = 0u32;
        // SAFETY: stores the register to a local.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack, preserves_flags)) };
        word.into()
    }

    pub(super) fn write(value: u64) {
        let word = value as u32;
        // SAFETY: loads a value read from the register, with at most the two flush bits changed. Rust code that runs
        // meanwhile may compute zero for a subnormal; the pool's own code has no floating point.
        unsafe {
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const word, options(nostack, preserves_flags))
        };
    }
}

/// The floating-point control register.
#[cfg(target_arch = "aarch64")]
mod control {
    /// FPCR.FZ.
    pub(super) const FLUSH: u64 = 1 << 24;

    pub(super) fn read() -> u64 {
        let value: u64;
        // SAFETY: reads a register that user code may read.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }

    pub(super) fn write(value: u64) {
        // SAFETY: writes a value read from the register, with at most FZ changed; see the x86 twin.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) value, options(nostack, preserves_flags)) };
    }
}

/// Nothing to set: subnormals cost nothing extra, or there is no such register.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod control {
    pub(super) const FLUSH: u64 = 0;

    pub(super) fn read() -> u64 {
        0
    }

    pub(super) fn write(_value: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// args: cells u64[grid], neighbours' distance; adds 1 to each cell of its range.
    unsafe extern "C" fn bump(args: *const u64, begin: u64, end: u64) {
        // SAFETY: the tests pass the address of an array as long as the grid.
        unsafe {
            let cells = std::ptr::with_exposed_provenance_mut::<u64>(*args as usize);
            for i in begin..end {
                *cells.add(i as usize) += 1;
            }
        }
    }

    /// args: from u64[grid], to u64[grid]: `to[i] = from[0] + from[grid - 1] + i`; wrong unless the launch before it
    /// was complete.
    unsafe extern "C" fn spread(args: *const u64, begin: u64, end: u64) {
        // SAFETY: as `bump`; the third number is the grid.
        unsafe {
            let from = std::ptr::with_exposed_provenance::<u64>(*args as usize);
            let to = std::ptr::with_exposed_provenance_mut::<u64>(*args.add(1) as usize);
            let n = *args.add(2) as usize;
            let sum = (*from).wrapping_add(*from.add(n - 1));
            for i in begin..end {
                *to.add(i as usize) = sum.wrapping_add(i);
            }
        }
    }

    fn address(v: &mut [u64]) -> u64 {
        v.as_mut_ptr().expose_provenance() as u64
    }

    #[test]
    fn every_item_runs_exactly_once() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads, 4);
            let mut cells = vec![0u64; 1000];
            for (round, grid) in [0u64, 1, 2, 5, 17, 100, 999, 1000].into_iter().cycle().take(400).enumerate()
            {
                cells.fill(0);
                let args = [address(&mut cells)];
                let task = Task {
                    kernel: Kernel::of(bump),
                    args: args.as_ptr(),
                    grid,
                    chunks: 6,
                    apart: round % 3 > 0,
                    tail: false,
                };
                // SAFETY: cells and args outlive the call, items are distinct cells.
                unsafe { pool.run(&[task, Task { tail: round % 2 == 0, ..task }, task]) };
                let (ran, rest) = cells.split_at(grid as usize);
                assert!(
                    ran.iter().all(|c| *c == 3) && rest.iter().all(|c| *c == 0),
                    "round {round}, grid {grid}"
                );
            }
        }
    }

    #[test]
    fn runs_cover_all_chunks_and_keep_apart() {
        for (chunks, runs) in (1..40).flat_map(|chunks| (1..9).map(move |runs| (chunks, runs))) {
            let (task, tails) = (None, std::ptr::null());
            let work = Work { task, chunk: 1, chunks, tails, tail_count: 0, runs };
            let places: Vec<u64> = (0..chunks).map(|claim| work.place(claim)).collect();
            let mut sorted = places.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..chunks), "{chunks} chunks, {runs} runs: {places:?}");
            let apart = |p: &[u64]| runs == 1 || p[0].abs_diff(p[1]) + 1 >= chunks / runs;
            assert!(places.windows(2).all(apart), "{chunks} chunks, {runs} runs: {places:?}");
        }
    }

    /// More threads than cores, long chains of dependent launches.
    #[test]
    fn launches_wait_for_those_before_them() {
        let launches = 200;
        for threads in [2, 7, 16] {
            let mut pool = Pool::new(threads, launches);
            let (mut a, mut b) = (vec![1u64; 37], vec![0u64; 37]);
            let n = a.len() as u64;
            let there = [address(&mut a), address(&mut b), n];
            let back = [address(&mut b), address(&mut a), n];
            let mut tasks = Vec::new();
            for i in 0..launches {
                let args = if i % 2 == 0 { there.as_ptr() } else { back.as_ptr() };
                tasks.push(Task {
                    kernel: Kernel::of(spread),
                    args,
                    grid: n,
                    chunks: 6,
                    apart: i % 2 == 0,
                    tail: i % 7 > 4,
                });
            }
            for round in 0..60 {
                a.fill(round);
                // SAFETY: arrays outlive the call; a launch writes only `to`, each item its own cell.
                unsafe { pool.run(&tasks) };
                let (mut first, mut last) = (round, round);
                for _ in 0..launches {
                    let sum = first.wrapping_add(last);
                    (first, last) = (sum, sum.wrapping_add(n - 1));
                }
                assert_eq!((a[0], a[36]), (first, last), "threads {threads}, round {round}");
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_and_pools_drop() {
        for _ in 0..20 {
            let mut pool = Pool::new(4, 1);
            let mut cells = vec![0u64; 64];
            let args = [address(&mut cells)];
            std::thread::sleep(Duration::from_micros(300));
            let task = Task {
                kernel: Kernel::of(bump),
                args: args.as_ptr(),
                grid: 64,
                chunks: 6,
                apart: true,
                tail: false,
            };
            // SAFETY: as above.
            unsafe { pool.run(&[task]) };
            assert!(cells.iter().all(|c| *c == 1));
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn subnormals_are_flushed_inside_and_only_there() {
        /// args: f32 pair; the second becomes half of the first.
        unsafe extern "C" fn halve(args: *const u64, _: u64, _: u64) {
            // SAFETY: the test passes two floats.
            unsafe {
                let x = std::ptr::with_exposed_provenance_mut::<f32>(*args as usize);
                x.add(1).write_volatile(x.read_volatile() * std::hint::black_box(0.5));
            }
        }
        let mut x = [f32::MIN_POSITIVE, 1.0];
        let before = control::read();
        let args = [x.as_mut_ptr().expose_provenance() as u64];
        // SAFETY: x and args outlive the call.
        unsafe {
            Pool::new(1, 1).run(&[Task {
                kernel: Kernel::of(halve),
                args: args.as_ptr(),
                grid: 1,
                chunks: 6,
                apart: false,
                tail: false,
            }])
        };
        assert_eq!(std::hint::black_box(&x)[1], 0.0);
        assert_eq!(control::read() & control::FLUSH, before & control::FLUSH);
    }
}
