//! Every check fires on a kernel that is wrong in its way, says where, and is silent on the kernel that is right.

mod harness;

use attar_ptx::{CopyMode, Error, ErrorKind, Launch, Memory, Module, Options, Param, Result, Space};
use harness::*;

/// `text` with the `nth` line that contains `from` changed, from 0.
fn mutated(text: &str, from: &str, nth: usize, to: &str) -> String {
    let mut seen = 0;
    let mut done = false;
    let lines = text.lines().map(|line| {
        if !line.contains(from) {
            return line.to_owned();
        }
        seen += 1;
        if seen - 1 == nth {
            done = true;
            line.replace(from, to)
        } else {
            line.to_owned()
        }
    });
    let out = lines.collect::<Vec<_>>().join("\n");
    assert!(done, "there is no {from}, or not so often");
    out
}

fn error(result: Result<impl Sized>) -> Error {
    match result {
        Ok(_) => panic!("nothing was found"),
        Err(error) => error,
    }
}

/// The kind of fault of a written kernel that does not end well in either mode.
fn fault(body: &str, blocks: u32, threads: u32) -> ErrorKind {
    error(run_written(body, blocks, threads, &[7; 256], 256)).kind
}

fn sound(body: &str, blocks: u32, threads: u32) {
    run_written(body, blocks, threads, &[7; 256], 256).unwrap_or_else(|e| panic!("{e}"));
}

/// Four bytes of `y` per thread of the block.
const AT_THREAD: &str = "mul.wide.u32 %rd4, %r0, 4; add.s64 %rd5, %rd2, %rd4;";

#[test]
fn bounds_of_global_memory() {
    let body = |offset: i32| format!("ld.global.u32 %r1, [%rd1+{offset}];");
    sound(&body(252), 1, 1);
    for (offset, at) in [(256, 256), (-4, -4)] {
        let found = error(run_written(&body(offset), 1, 1, &[7; 256], 4));
        let ErrorKind::OutOfBounds { space, buffer, offset, len, size, .. } = &found.kind else {
            panic!("{found}")
        };
        assert_eq!((*space, &buffer[..], *offset, *len, *size), (Space::Global, "x", at, 4, 256));
        // The whole place is told.
        assert_eq!((found.at.kernel.as_deref(), found.at.line), (Some("k"), Some(15)));
        assert_eq!((found.at.block, found.at.thread), (Some([0; 3]), Some([0; 3])));
        let text = found.to_string();
        assert!(
            text.contains("kernel k, PTX line 15 `ld.global.u32") && text.contains("thread (0, 0, 0)"),
            "{text}"
        );
    }
    let far = "mov.u64 %rd3, 12345; ld.global.u32 %r1, [%rd3+3];";
    assert!(matches!(fault(far, 1, 1), ErrorKind::NoBuffer { .. }));
}

#[test]
fn bounds_of_the_other_spaces() {
    let shared = |offset: u32| {
        format!(".shared .align 4 .b8 s[64]; mov.u32 %r1, s; st.shared.u32 [%r1+{offset}], %r0;")
    };
    sound(&shared(60), 1, 1);
    assert!(matches!(
        fault(&shared(64), 1, 1),
        ErrorKind::OutOfBounds { space: Space::Shared, offset: 64, .. }
    ));
    let local = |offset: u32| format!(".local .align 4 .b8 l[16]; st.local.u32 [l+{offset}], %r0;");
    sound(&local(12), 1, 1);
    assert!(matches!(fault(&local(16), 1, 1), ErrorKind::OutOfBounds { space: Space::Local, .. }));
    // A pointer of 0 into shared memory is none.
    let null = "mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];";
    assert!(matches!(fault(null, 1, 1), ErrorKind::OutOfBounds { space: Space::Shared, offset: -1024, .. }));
    assert!(matches!(
        fault("ld.param.u64 %rd3, [x+16];", 1, 1),
        ErrorKind::OutOfBounds { space: Space::Param, .. }
    ));
}

#[test]
fn alignment() {
    sound("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+16];", 1, 1);
    let misaligned = fault("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+8];", 1, 1);
    assert!(matches!(misaligned, ErrorKind::Misaligned { len: 16, .. }), "{misaligned}");
    let shared = ".shared .align 16 .b8 s[64]; st.shared.v2.u32 [s+4], {%r0, %r0};";
    assert!(matches!(fault(shared, 1, 1), ErrorKind::Misaligned { space: Space::Shared, len: 8, .. }));
}

#[test]
fn initialisation() {
    let found = fault("ld.global.u32 %r1, [%rd2+8];", 1, 1);
    assert_eq!(found, ErrorKind::Uninitialised { space: Space::Global, buffer: "y".to_owned(), offset: 8 });
    sound("st.global.u32 [%rd2+8], %r0; ld.global.u32 %r1, [%rd2+8];", 1, 1);
    // Of a word of which half is written.
    let half = "cvt.u16.u32 %h1, %r0; st.global.u16 [%rd2], %h1; ld.global.u32 %r1, [%rd2];";
    assert!(matches!(fault(half, 1, 1), ErrorKind::Uninitialised { offset: 2, .. }));

    let shared = |write: &str| {
        format!(".shared .align 4 .b8 pad[16]; .shared .align 4 .b8 s[16]; {write} ld.shared.u32 %r1, [s+4];")
    };
    sound(&shared("st.shared.u32 [s+4], %r0;"), 1, 1);
    let found = fault(&shared("st.shared.u32 [s+8], %r0;"), 1, 1);
    assert_eq!(found, ErrorKind::Uninitialised { space: Space::Shared, buffer: "s".to_owned(), offset: 4 });

    let local = |write: &str| format!(".local .align 4 .b8 l[16]; {write} ld.local.u32 %r1, [l+4];");
    sound(&local("st.local.u32 [l+4], %r0;"), 1, 1);
    assert!(matches!(fault(&local(""), 1, 1), ErrorKind::Uninitialised { space: Space::Local, .. }));

    let register = fault("add.u32 %r2, %r0, %r9;", 1, 1);
    assert_eq!(register, ErrorKind::UninitialisedRegister { register: "%r9".to_owned() });
    let predicate = fault("@%p3 add.u32 %r2, %r0, 1;", 1, 1);
    assert_eq!(predicate, ErrorKind::UninitialisedRegister { register: "%p3".to_owned() });
    // Written by some lanes, read by all.
    let some = "setp.lt.u32 %p1, %r0, 5; @%p1 mov.u32 %r1, 1; add.u32 %r2, %r1, 1;";
    assert!(matches!(fault(some, 1, 32), ErrorKind::UninitialisedRegister { .. }));
    sound("setp.lt.u32 %p1, %r0, 5; @%p1 mov.u32 %r1, 1; @%p1 add.u32 %r2, %r1, 1;", 1, 32);
}

/// Each thread writes its word of shared memory, and another's after `between`.
fn exchange(between: &str, distance: u32) -> String {
    format!(
        "{AT_THREAD} .shared .align 4 .b8 s[512]; cvt.u32.u64 %r1, %rd4; mov.u32 %r2, s; add.u32 %r3, %r2, %r1;
         st.shared.u32 [%r3], %r0; {between} xor.b32 %r4, %r1, {}; add.u32 %r5, %r2, %r4; ld.shared.u32 %r6, [%r5];",
        distance * 4
    )
}

#[test]
fn races_in_shared_memory() {
    // Between warps only a barrier of the block orders.
    sound(&exchange("bar.sync 0;", 32), 1, 64);
    sound(&exchange("barrier.sync.aligned 3, 64;", 32), 1, 64);
    // Whichever warp comes first reads what nobody has written: that is found before the race is.
    assert!(matches!(fault(&exchange("", 32), 1, 64), ErrorKind::Uninitialised { .. }));
    // Between lanes a warp's barrier is enough, and needed: lockstep is no promise.
    sound(&exchange("bar.warp.sync -1;", 1), 1, 32);
    let found = fault(&exchange("", 1), 1, 32);
    assert!(matches!(found, ErrorKind::SharedRace { .. }), "{found}");
    // A warp that overwrites what another may not have read yet.
    let overwrite =
        |between: &str| format!("{} {between} st.shared.u32 [%r3], %r6;", exchange("bar.sync 0;", 32));
    sound(&overwrite("bar.sync 0;"), 1, 64);
    let found = fault(&overwrite(""), 1, 64);
    assert!(matches!(found, ErrorKind::SharedRace { .. }), "{found}");
    // Writes of different values to one place.
    let both = ".shared .align 4 .b8 s[4]; st.shared.u32 [s], %r0;";
    assert!(matches!(fault(both, 1, 64), ErrorKind::SharedRace { .. }));
    // Neighbouring bytes of a word are no race.
    let bytes = ".shared .align 4 .b8 s[64]; mov.u32 %r1, s; add.u32 %r2, %r1, %r0; st.shared.u8 [%r2], %r0;";
    sound(bytes, 1, 64);
    // Atomics do not race with each other, but with plain reads.
    let atomic = |after: &str| {
        format!(
            ".shared .align 4 .b8 s[4]; mov.u32 %r1, 0; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [s], %r1; bar.sync 0;
             atom.shared.add.u32 %r2, [s], 1; {after} ld.shared.u32 %r3, [s];"
        )
    };
    sound(&atomic("bar.sync 0;"), 1, 64);
    assert!(matches!(fault(&atomic(""), 1, 64), ErrorKind::SharedRace { .. }));
}

#[test]
fn named_barriers_order_who_takes_part() {
    // The first warp produces and arrives, the second waits and reads; a third is not involved.
    let body = |consumer: &str| {
        format!(
            ".shared .align 4 .b8 s[128]; mov.u32 %r1, s; and.b32 %r2, %r0, 31; shl.b32 %r3, %r2, 2; add.u32 %r4, %r1, %r3;
             shr.u32 %r5, %r0, 5; setp.eq.u32 %p1, %r5, 0; setp.eq.u32 %p2, %r5, 1;
             @!%p1 bra NEXT; st.shared.u32 [%r4], %r0; bar.arrive 1, 64; bra END;
             NEXT: @!%p2 bra END; {consumer} ld.shared.u32 %r6, [%r4]; END:"
        )
    };
    sound(&body("bar.sync 1, 64;"), 1, 96);
    // Eagerly the consumer runs first and finds nothing; lazily it is a race.
    let found = fault(&body(""), 1, 96);
    assert!(matches!(found, ErrorKind::SharedRace { earlier_warp: 0, warp: 1, .. }), "{found}");
}

#[test]
fn races_between_blocks() {
    let own = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd4, %r1, 4; add.s64 %rd5, %rd2, %rd4; st.global.u32 [%rd5], %r1;";
    sound(own, 4, 1);
    let same = "mov.u32 %r1, %ctaid.x; st.global.u32 [%rd2], %r1;";
    assert!(matches!(fault(same, 2, 1), ErrorKind::GlobalRace { offset: 0, .. }));
    // The first block reads what the second writes: only running the second first shows it.
    let later = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 ld.global.u32 %r2, [%rd1]; @!%p1 st.global.u32 [%rd1], %r1;";
    assert!(matches!(fault(later, 2, 1), ErrorKind::GlobalRace { .. }));
    sound("mov.u32 %r1, 1; atom.global.add.u32 %r2, [%rd1], %r1;", 4, 32);
    let mixed = "mov.u32 %r1, 1; red.global.add.u32 [%rd1], %r1; ld.global.u32 %r2, [%rd1];";
    assert!(matches!(fault(mixed, 4, 1), ErrorKind::GlobalRace { .. }));
}

/// What the last block reads without a fence of the others is not theirs to rely on.
#[test]
fn a_missing_fence_before_an_atomic() {
    let run = |text: &str| {
        let module = Module::parse(text).expect("PTX");
        let mut memory = Memory::new();
        let x = memory.alloc("x", &[0; 4000]);
        let (partial, out) = (memory.alloc_uninit("partial", 16), memory.alloc_uninit("out", 4));
        let params = [Param::from(x), partial.into(), out.into(), 1000i32.into()];
        let launch = Launch {
            kernel: "last_block_sum",
            grid: [4, 1, 1],
            block: [256, 1, 1],
            dynamic_shared: 0,
            params: &params,
        };
        module.launch_both(&mut memory, &launch)
    };
    let text = text("vector.sm_90a");
    run(&text).expect("no fault");
    let found = error(run(&mutated(&text, "membar.gl", 0, "membar.cta")));
    assert!(matches!(&found.kind, ErrorKind::GlobalRace { buffer, .. } if buffer == "partial"), "{found}");
}

#[test]
fn divergence_at_barriers() {
    let some = "setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0;";
    let found = fault(some, 1, 32);
    assert!(matches!(found, ErrorKind::Divergent { active: 0xffff, alive: 0xffff_ffff, .. }), "{found}");
    // Lanes that have ended do not count.
    sound("setp.lt.u32 %p1, %r0, 16; @!%p1 exit; bar.sync 0;", 1, 32);
    sound("setp.lt.u32 %p1, %r0, 40; @!%p1 exit; bar.sync 0;", 1, 96);
    // Both sides of a branch have one: to the program they are two.
    let two =
        "shr.u32 %r1, %r0, 5; setp.eq.u32 %p1, %r1, 0; @%p1 bra A;\nbar.sync 0;\nbra B;\nA: bar.sync 0;\nB:";
    assert!(matches!(fault(two, 1, 64), ErrorKind::BarrierMismatch { .. }));
    let warp = "setp.lt.u32 %p1, %r0, 16; @%p1 bar.warp.sync -1;";
    assert!(matches!(fault(warp, 1, 32), ErrorKind::Divergent { .. }));
    sound("setp.lt.u32 %p1, %r0, 16; @%p1 bar.warp.sync 0xffff;", 1, 32);
    let member = "setp.lt.u32 %p1, %r0, 16; @%p1 bar.warp.sync 0xff;";
    assert!(matches!(fault(member, 1, 32), ErrorKind::MemberMask { .. }));
    let shuffle = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;";
    assert!(matches!(fault(shuffle, 1, 32), ErrorKind::Divergent { .. }));
    let from_outside = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, 0xffff;";
    assert!(matches!(fault(from_outside, 1, 32), ErrorKind::MemberMask { .. }));
}

/// Code behind the end of a function, from where lanes come back: they are waited for.
#[test]
fn lanes_come_back_from_code_behind() {
    let body = "and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 1; mov.u32 %r2, 10; @%p1 bra COLD;
                BACK: shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; mul.wide.u32 %rd4, %r0, 4; add.s64 %rd5, %rd2, %rd4;
                st.global.u32 [%rd5], %r3; ret; COLD: mov.u32 %r2, 20; bra BACK;";
    let y = run_written(body, 1, 32, &[0; 4], 128).unwrap_or_else(|e| panic!("{e}"));
    let expected: Vec<i32> = (0..32).map(|t| if t % 2 == 0 { 20 } else { 10 }).collect();
    assert_eq!(as_ints(&y), expected);
}

#[test]
fn hangs() {
    let one_warp = "shr.u32 %r1, %r0, 5; setp.eq.u32 %p1, %r1, 0; @%p1 bar.sync 1, 64;";
    let found = fault(one_warp, 1, 64);
    assert!(
        matches!(&found, ErrorKind::Deadlock(who) if who.contains("warp 0 waits at barrier 1")),
        "{found}"
    );
    let mut memory = Memory::new();
    let module = Module::parse(&written("AGAIN: bra AGAIN;")).expect("PTX");
    let params = [Param::from(memory.alloc("x", &[0])), memory.alloc("y", &[0]).into()];
    let launch = Launch { kernel: "k", grid: [1; 3], block: [1; 3], dynamic_shared: 0, params: &params };
    let options = Options { step_limit: 10_000, ..Options::checked(CopyMode::Lazy) };
    let found = error(module.launch(&mut memory, &launch, &options));
    assert_eq!(found.kind, ErrorKind::StepLimit(10_000));
    // A warp that waits in a loop for another lets it run.
    let flag = "setp.lt.u32 %p1, %r0, 32; .shared .align 4 .b8 s[4]; mov.u32 %r1, 0; setp.eq.u32 %p2, %r0, 0;
                @%p2 st.shared.u32 [s], %r1; bar.sync 0; @%p1 bra WAIT; mov.u32 %r2, 1; setp.eq.u32 %p3, %r0, 32;
                @%p3 atom.shared.exch.b32 %r3, [s], %r2; bra END; WAIT: ld.volatile.shared.u32 %r4, [s];
                setp.eq.u32 %p4, %r4, 0; @%p4 bra WAIT; END:";
    sound(flag, 1, 64);
}

fn gemm(text: &str) -> Result<Vec<u8>> {
    let module = Module::parse(text)?;
    let mut memory = Memory::new();
    let (a, b) = (bf16_bytes(&noise(64 * 128, 1)), bf16_bytes(&noise(64 * 128, 2)));
    let (a, b) = (memory.alloc("a", &a), memory.alloc("b", &b));
    let c = memory.alloc_uninit("c", 64 * 64 * 4);
    let params = [Param::from(a), b.into(), c.into(), 64i32.into(), 128i32.into()];
    let launch =
        Launch { kernel: "gemm_bf16", grid: [1; 3], block: [128, 1, 1], dynamic_shared: 0, params: &params };
    module.launch_both(&mut memory, &launch)?;
    Ok(memory.bytes(c).to_vec())
}

#[test]
fn asynchronous_copies_are_waited_for() {
    let right = text("mma.sm_90a");
    gemm(&right).expect("no fault");
    // One group too many may be under way.
    let late = error(gemm(&mutated(&right, "cp.async.wait_group 1;", 0, "cp.async.wait_group 2;")));
    assert!(matches!(late.kind, ErrorKind::AsyncPending { what: "copy", .. }), "{late}");
    let last = error(gemm(&mutated(&right, "cp.async.wait_group 0;", 0, "cp.async.wait_group 1;")));
    assert!(matches!(last.kind, ErrorKind::AsyncPending { .. }), "{last}");
    // Waiting is of one's own copies only: others' need the barrier as well.
    let first_barrier = error(gemm(&mutated(&right, "bar.sync \t0;", 0, "")));
    assert!(
        matches!(first_barrier.kind, ErrorKind::AsyncPending { .. } | ErrorKind::SharedRace { .. }),
        "{first_barrier}"
    );
    // Without the barrier behind the products the next copies go where others still read.
    let second_barrier = error(gemm(&mutated(&right, "bar.sync \t0;", 1, "")));
    assert!(
        matches!(second_barrier.kind, ErrorKind::SharedRace { .. } | ErrorKind::AsyncPending { .. }),
        "{second_barrier}"
    );
}

/// What is fetched into a cache changes nothing, but must be there.
#[test]
fn bounds_of_what_is_fetched_ahead() {
    let body =
        |offset: i32, bytes: u32| format!("cp.async.bulk.prefetch.L2.global [%rd1+{offset}], {bytes};");
    sound(&body(16, 240), 1, 1);
    let behind = error(run_written(&body(16, 256), 1, 1, &[7; 256], 4));
    assert!(
        matches!(behind.kind, ErrorKind::OutOfBounds { offset: 16, len: 256, size: 256, .. }),
        "{behind}"
    );
    for odd in [body(8, 16), body(0, 24)] {
        let odd = error(run_written(&odd, 1, 1, &[7; 256], 4));
        assert!(matches!(odd.kind, ErrorKind::Misaligned { align: 16, .. }), "{odd}");
    }
}

/// A warp that feeds itself by bulk copies, longer than a deadlock takes to be noticed.
#[test]
fn long_pipelines_are_no_deadlocks() {
    let body = ".shared .align 16 .b8 s[16]; .shared .align 8 .b8 b[8]; mov.u32 %r1, s; mov.u32 %r2, b; mov.u32 %r3, 0;
                mbarrier.init.shared.b64 [%r2], 1; fence.proxy.async;
                NEXT: mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 16;
                cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 16, [%r2];
                and.b32 %r4, %r3, 1; WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%r2], %r4; @!%p1 bra WAIT;
                ld.shared.u32 %r5, [%r1]; fence.proxy.async; add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 300; @%p2 bra NEXT;";
    sound(body, 1, 1);
}

/// Each mode alone finds what it is for.
#[test]
fn lazy_and_eager_find_different_faults() {
    let run = |text: &str, copies| {
        let module = Module::parse(text).expect("PTX");
        let mut memory = Memory::new();
        let (a, b) = (memory.alloc("a", &[0; 64 * 256]), memory.alloc("b", &[0; 64 * 256]));
        let c = memory.alloc_uninit("c", 64 * 64 * 4);
        let params = [Param::from(a), b.into(), c.into(), 64i32.into(), 128i32.into()];
        let launch = Launch {
            kernel: "gemm_bf16",
            grid: [1; 3],
            block: [128, 1, 1],
            dynamic_shared: 0,
            params: &params,
        };
        module.launch(&mut memory, &launch, &Options::checked(copies))
    };
    let missing_wait = mutated(&text("mma.sm_90a"), "cp.async.wait_group 1;", 0, "cp.async.wait_group 2;");
    assert!(run(&missing_wait, CopyMode::Lazy).is_err());
    assert!(run(&missing_wait, CopyMode::Eager).is_ok());
    // A copy of stale length leaves zeros in both.
    let overwrite = mutated(&text("mma.sm_90a"), "bar.sync \t0;", 1, "");
    assert!(matches!(error(run(&overwrite, CopyMode::Eager)).kind, ErrorKind::SharedRace { .. }));
}

#[test]
fn copies_not_waited_for_at_the_end() {
    let body = |wait: &str| {
        format!(
            ".shared .align 16 .b8 s[16]; mov.u32 %r1, s; cp.async.cg.shared.global [%r1], [%rd1], 16;
             cp.async.commit_group; {wait}"
        )
    };
    sound(&body("cp.async.wait_all;"), 1, 1);
    assert!(matches!(fault(&body(""), 1, 1), ErrorKind::NotWaited(_)));
}

fn wgmma(text: &str, kernel: &str) -> Result<()> {
    let module = Module::parse(text)?;
    let mut memory = Memory::new();
    let values = bf16_bytes(&noise(6 * 1024, 3));
    let (a, b) = (memory.alloc("a", &values), memory.alloc("b", &values));
    let c = memory.alloc_uninit("c", 64 * 64 * 4);
    let mut params = vec![Param::from(a), b.into(), c.into()];
    if kernel == "wgmma_bulk" {
        params.push(6i32.into());
    }
    let launch = Launch { kernel, grid: [1; 3], block: [128, 1, 1], dynamic_shared: 0, params: &params };
    module.launch_both(&mut memory, &launch).map(|_| ())
}

#[test]
fn products_of_warpgroups() {
    let right = text("wgmma.sm_90a");
    wgmma(&right, "wgmma_swizzled").expect("no fault");
    wgmma(&right, "wgmma_bulk").expect("no fault");
    let swizzled =
        |from: &str, nth, to: &str| error(wgmma(&mutated(&right, from, nth, to), "wgmma_swizzled")).kind;
    let bulk = |from: &str, nth, to: &str| error(wgmma(&mutated(&right, from, nth, to), "wgmma_bulk")).kind;
    let lines = |what: &str, kernel: &str| {
        let start = right.find(&format!(".entry {kernel}")).expect("a kernel");
        right[..start].matches(what).count()
    };
    let at = |what| lines(what, "wgmma_swizzled");

    let fence = swizzled("fence.proxy.async;", 0, "");
    assert!(matches!(fence, ErrorKind::ProxyFence { reader: "wgmma", .. }), "{fence}");
    let registers = swizzled("wgmma.fence.sync.aligned;", at("wgmma.fence"), "");
    assert!(matches!(&registers, ErrorKind::Matrix(why) if why.contains("wgmma.fence")), "{registers}");
    let wait = "wgmma.wait_group.sync.aligned 0;";
    let early = swizzled(wait, at(wait), "wgmma.wait_group.sync.aligned 1;");
    assert!(matches!(early, ErrorKind::RegisterPending { .. }), "{early}");
    let barrier = swizzled("bar.sync \t0;", at("bar.sync"), "");
    assert!(
        matches!(
            barrier,
            ErrorKind::Uninitialised { .. } | ErrorKind::SharedRace { .. } | ErrorKind::ProxyFence { .. }
        ),
        "{barrier}"
    );

    // The copies of the next stage go where the product reads.
    let overwritten = bulk("bar.sync \t0;", 1, "");
    assert!(
        matches!(overwritten, ErrorKind::SharedRace { .. } | ErrorKind::AsyncPending { .. }),
        "{overwritten}"
    );
    // More bytes are expected than come.
    let hang = bulk("mov.u32 \t%r23, 4096;", 0, "mov.u32 \t%r23, 4112;");
    assert!(matches!(&hang, ErrorKind::Deadlock(_)), "{hang}");
    let init = bulk("mbarrier.init.shared::cta.b64 [%r20], 1;", 0, "");
    assert!(matches!(&init, ErrorKind::Mbarrier { why, .. } if why.contains("init")), "{init}");
    let race = bulk("bar.sync \t0;", 0, "");
    assert!(matches!(race, ErrorKind::SharedRace { .. } | ErrorKind::Mbarrier { .. }), "{race}");
}

/// Operand A in registers may be read while a product is under way, and written when it is waited for.
#[test]
fn registers_of_products_under_way() {
    let body = |now: &str, then: &str| {
        format!(
            ".reg .b32 %d<4>; .shared .align 1024 .b8 s[1024];
             mov.u32 %r1, s; mul.lo.u32 %r2, %r0, 8; add.u32 %r2, %r1, %r2; mov.b64 %rd3, 0; st.shared.u64 [%r2], %rd3;
             fence.proxy.async; bar.sync 0;
             shr.u32 %r3, %r1, 4; cvt.u64.u32 %rd4, %r3; mov.u64 %rd5, 0x4000004000010000; or.b64 %rd6, %rd4, %rd5;
             mov.u32 %r4, 1; mov.u32 %r5, 2; mov.u32 %r6, 3; mov.u32 %r7, 4;
             mov.b32 %d0, 0; mov.b32 %d1, 0; mov.b32 %d2, 0; mov.b32 %d3, 0;
             wgmma.fence.sync.aligned;
             wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%d0, %d1, %d2, %d3}}, {{%r4, %r5, %r6, %r7}}, %rd6, 1, 1, 1, 0;
             wgmma.commit_group.sync.aligned; {now}
             wgmma.wait_group.sync.aligned 0; {then}"
        )
    };
    sound(&body("add.u32 %r8, %r4, 1;", "mov.u32 %r4, 9;"), 1, 128);
    let written = fault(&body("mov.u32 %r6, 9;", ""), 1, 128);
    assert!(matches!(&written, ErrorKind::RegisterInUse { register, .. } if register == "%r6"), "{written}");
}

#[test]
fn bulk_copies_are_waited_for() {
    let right = text("wgmma.sm_90a");
    let run = |text: &str| {
        let module = Module::parse(text)?;
        let mut memory = Memory::new();
        let (from, into) = (memory.alloc("in", &[1; 4096]), memory.alloc_uninit("out", 4096));
        let params = [Param::from(from), into.into()];
        let launch = Launch {
            kernel: "bulk_through",
            grid: [1; 3],
            block: [64, 1, 1],
            dynamic_shared: 0,
            params: &params,
        };
        module.launch_both(&mut memory, &launch)
    };
    run(&right).expect("no fault");
    let n = right.matches("mbarrier.try_wait").count();
    let unwaited = mutated(
        &right,
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%r11], %r12;",
        0,
        "setp.eq.u32 p, %r12, %r12;",
    );
    assert!(n > 0);
    let early = error(run(&unwaited));
    assert!(matches!(early.kind, ErrorKind::AsyncPending { what: "bulk copy", .. }), "{early}");
    let fence = error(run(&mutated(&right, "fence.proxy.async.shared::cta;", 0, "")));
    assert!(matches!(fence.kind, ErrorKind::ProxyFence { reader: "bulk copy", .. }), "{fence}");
    // Addresses of bulk copies are multiples of sixteen.
    let short = error(run(&mutated(&right, "[%r7], [%rd3], 4096, [%r8];", 0, "[%r7], [%rd3], 4088, [%r8];")));
    assert!(matches!(short.kind, ErrorKind::Misaligned { align: 16, .. }), "{short}");
}

#[test]
fn buffers_that_are_freed_or_constant() {
    let module =
        Module::parse(&written("ld.global.u32 %r1, [%rd1]; st.global.u32 [%rd2], %r1;")).expect("PTX");
    let run = |spoil: &dyn Fn(&mut Memory, attar_ptx::Buffer, attar_ptx::Buffer)| {
        let mut memory = Memory::new();
        let (x, y) = (memory.alloc("x", &[0; 4]), memory.alloc("y", &[0; 4]));
        spoil(&mut memory, x, y);
        let params = [Param::from(x), y.into()];
        let launch = Launch { kernel: "k", grid: [1; 3], block: [1; 3], dynamic_shared: 0, params: &params };
        module.launch_both(&mut memory, &launch)
    };
    run(&|_, _, _| {}).expect("no fault");
    assert!(matches!(error(run(&|m, x, _| m.free(x))).kind, ErrorKind::Freed { .. }));
    assert!(matches!(error(run(&|m, _, y| m.set_read_only(y))).kind, ErrorKind::ReadOnly { .. }));
}

#[test]
fn what_is_not_known_is_refused_with_its_line() {
    let refused = |body: &str| error(Module::parse(&written(body)));
    for (body, word) in [
        ("frobnicate.u32 %r1, %r0;", "frobnicate.u32"),
        ("add.wrong.u32 %r1, %r0, 1;", "modifier .wrong"),
        ("add.u32 %r1, %nonsense, 1;", "%nonsense"),
        ("add.u32 %r1, %r0;", "3 operands"),
        ("bra NOWHERE;", "NOWHERE"),
        ("mma.sync.aligned.m16n8k16.col.row.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r1}, {%f1};", "mma"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r1], 16;", "cp.reduce"),
        ("call missing;", "missing"),
        (".reg .b128 %q;", "128 bits"),
        ("add.u32 %r1, %r0, #;", "'#'"),
    ] {
        let found = refused(body);
        assert_eq!(found.at.line, Some(15), "{found}");
        assert!(found.to_string().contains(word), "{found}");
    }
    let newer = error(Module::parse(".version 9.5\n.target sm_90a\n.address_size 64\n"));
    assert!(matches!(&newer.kind, ErrorKind::Version { found, .. } if found == "9.5"), "{newer}");
    assert!(matches!(error(Module::parse("")).kind, ErrorKind::Syntax { .. }));
    // What could exhaust the stack or the memory is refused as well.
    let deep = "{".repeat(100_000);
    for body in [
        format!("mov.b64 %rd3, {deep}"),
        format!("mov.b64 %rd3, {}%p1", "!".repeat(100_000)),
        ".local .align 8 .b8 l[1000000];".to_owned(),
        ".reg .b32 %many<4000000>;".to_owned(),
        ".shared .b8 s[9999999999999];".to_owned(),
    ] {
        let found = refused(&body);
        assert_eq!(found.at.line, Some(15), "{found}");
    }
    assert!(Module::parse(&format!("{}{deep}", written(""))).is_err());
    let itself = ".func f() { call f; ret; }";
    let recursive = written("call f;").replace(".visible", &format!("{itself}\n.visible"));
    assert!(
        matches!(&error(Module::parse(&recursive)).kind, ErrorKind::Unsupported(why) if why.contains("recursion"))
    );
}

#[test]
fn launches_a_device_would_refuse() {
    let module = Module::parse(&written("bar.sync 0;")).expect("PTX");
    let mut memory = Memory::new();
    let params = [Param::from(memory.alloc("x", &[0])), memory.alloc("y", &[0]).into()];
    let options = Options::checked(CopyMode::Lazy);
    let right = Launch { kernel: "k", grid: [1; 3], block: [32, 1, 1], dynamic_shared: 0, params: &params };
    module.launch(&mut memory, &right, &options).expect("no fault");
    let wrong = [
        Launch { kernel: "other", ..right.clone() },
        Launch { grid: [0, 1, 1], ..right.clone() },
        Launch { grid: [1, 65536, 1], ..right.clone() },
        Launch { block: [2048, 1, 1], ..right.clone() },
        Launch { dynamic_shared: 1 << 18, ..right.clone() },
        Launch { params: &params[..1], ..right.clone() },
    ];
    for launch in wrong {
        let found = error(module.launch(&mut memory, &launch, &options));
        assert!(
            matches!(
                found.kind,
                ErrorKind::NoKernel { .. } | ErrorKind::Launch(_) | ErrorKind::Params { .. }
            ),
            "{found}"
        );
    }
    assert!(matches!(fault("trap;", 1, 1), ErrorKind::Trap));
}
