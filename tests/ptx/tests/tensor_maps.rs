//! Copies of boxes of tensors, by `cp.async.bulk.tensor`.

use attar_ptx::{Buffer, ErrorKind, Launch, Memory, Module, Param, Result, TensorMap};

const ROWS: usize = 20;
const COLUMNS: usize = 96;

/// A tensor of 16-bit elements, `ROWS` by `COLUMNS`, and a box of it.
fn map(address: u64, box_dims: [u32; 2], swizzle: usize) -> TensorMap {
    TensorMap {
        address,
        element_bytes: 2,
        dims: vec![COLUMNS as u64, ROWS as u64],
        strides: vec![COLUMNS as u64 * 2],
        box_dims: box_dims.to_vec(),
        swizzle,
    }
}

/// Brings the box at (`column`, `row`) into shared memory, copies shared memory to `y`, and the box to the tensor `z`.
const KERNEL: &str = "
.version 9.0
.target sm_90a
.address_size 64
.visible .entry move_box(.param .align 64 .b8 from[128], .param .align 64 .b8 into[128], .param .u64 y, .param .u32 column,
    .param .u32 row, .param .u32 bytes)
{
    .reg .pred %p<4>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<20>;
    .shared .align 1024 .b8 s[8192];
    .shared .align 8 .b8 bar[8];
    mov.b64 %rd1, from;
    cvta.param.u64 %rd2, %rd1;
    mov.b64 %rd3, into;
    cvta.param.u64 %rd4, %rd3;
    ld.param.u64 %rd5, [y];
    ld.param.u32 %r1, [column];
    ld.param.u32 %r2, [row];
    ld.param.u32 %r3, [bytes];
    mov.u32 %r4, %tid.x;
    mov.u32 %r5, s;
    mov.u32 %r6, bar;
    setp.ne.u32 %p1, %r4, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r6], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], %r3;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r5], [%rd2, {%r1, %r2}], [%r6];
READY:
    bar.sync 0;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r6], 0;
    @!%p2 bra WAIT;
    shl.b32 %r7, %r4, 4;
COPY:
    setp.ge.u32 %p3, %r7, %r3;
    @%p3 bra DONE;
    add.u32 %r8, %r5, %r7;
    ld.shared.v4.u32 {%r9, %r10, %r11, %r12}, [%r8];
    cvt.u64.u32 %rd6, %r7;
    add.s64 %rd7, %rd5, %rd6;
    st.global.v4.u32 [%rd7], {%r9, %r10, %r11, %r12};
    add.u32 %r7, %r7, 512;
    bra COPY;
DONE:
    @%p1 bra END;
    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd4, {%r1, %r2}], [%r5];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
END:
    ret;
}
";

struct Moved {
    /// Shared memory behind the copy.
    image: Vec<u16>,
    /// The second tensor, into which the box was copied back.
    back: Vec<u16>,
}

fn halves(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

fn move_box(text: &str, box_dims: [u32; 2], swizzle: usize, at: [i32; 2]) -> Result<Moved> {
    let module = Module::parse(text)?;
    let mut memory = Memory::new();
    let values: Vec<u8> = (0..(ROWS * COLUMNS) as u16).flat_map(|v| (v + 1).to_le_bytes()).collect();
    let from = memory.alloc("from", &values);
    let into = memory.alloc("into", &vec![0; ROWS * COLUMNS * 2]);
    let bytes = box_dims.iter().product::<u32>() * 2;
    let y = memory.alloc_uninit("y", bytes as usize);
    let encoded =
        |buffer: Buffer| Param::bytes(&map(buffer.address(), box_dims, swizzle).encode().expect("a map"));
    let params = [encoded(from), encoded(into), y.into(), at[0].into(), at[1].into(), bytes.into()];
    let launch =
        Launch { kernel: "move_box", grid: [1; 3], block: [32, 1, 1], dynamic_shared: 0, params: &params };
    module.launch_both(&mut memory, &launch)?;
    Ok(Moved { image: halves(memory.bytes(y)), back: halves(memory.bytes(into)) })
}

#[test]
fn boxes_are_packed_swizzled_and_cut_at_the_edges() {
    for (swizzle, width) in [(0, 96), (0, 8), (32, 16), (64, 32), (128, 64)] {
        for at in [[0, 0], [16, 5], [80, 15], [-8, -3], [96, 0]] {
            let box_dims = [width, 10];
            let moved = move_box(KERNEL, box_dims, swizzle, at).unwrap_or_else(|e| panic!("{e}"));
            let value = |r: i32, c: i32| {
                let inside = (0..ROWS as i32).contains(&r) && (0..COLUMNS as i32).contains(&c);
                if inside { (r * COLUMNS as i32 + c) as u16 + 1 } else { 0 }
            };
            for r in 0..10 {
                for c in 0..width as i32 {
                    let byte = (r * width as i32 + c) as usize * 2;
                    let place = match swizzle {
                        128 => byte ^ (byte >> 7 & 7) << 4,
                        64 => byte ^ (byte >> 7 & 3) << 4,
                        32 => byte ^ (byte >> 7 & 1) << 4,
                        _ => byte,
                    };
                    let expected = value(at[1] + r, at[0] + c);
                    assert_eq!(moved.image[place / 2], expected, "swizzle {swizzle}, {at:?}, {r}, {c}");
                }
            }
            for r in 0..ROWS as i32 {
                for c in 0..COLUMNS as i32 {
                    let in_box =
                        (at[1]..at[1] + 10).contains(&r) && (at[0]..at[0] + width as i32).contains(&c);
                    let expected = if in_box { value(r, c) } else { 0 };
                    assert_eq!(moved.back[r as usize * COLUMNS + c as usize], expected);
                }
            }
        }
    }
}

#[test]
fn faults_of_tensor_copies() {
    let fault = |text: &str, box_dims, swizzle, at| match move_box(text, box_dims, swizzle, at) {
        Ok(_) => panic!("nothing was found"),
        Err(error) => error.kind,
    };
    let unwaited = KERNEL.replace("@!%p2 bra WAIT;", "");
    assert!(matches!(fault(&unwaited, [64, 8], 128, [0, 0]), ErrorKind::AsyncPending { .. }));
    let misplaced = KERNEL.replace("mov.u32 %r5, s;", "mov.u32 %r5, s; add.u32 %r5, %r5, 512;");
    assert!(matches!(fault(&misplaced, [64, 8], 128, [0, 0]), ErrorKind::Misaligned { align: 1024, .. }));
    let other_bytes = KERNEL.replace("mov.b64 %rd1, from;", "mov.b64 %rd1, y;");
    assert!(!matches!(fault(&other_bytes, [64, 8], 128, [0, 0]), ErrorKind::Deadlock(_)));
    let short = KERNEL.replace(".tile.mbarrier", ".mbarrier").replace("[%r6], %r3;", "[%r6], 512;");
    assert!(matches!(fault(&short, [64, 8], 128, [0, 0]), ErrorKind::Mbarrier { .. }));
    let rank = KERNEL.replace("tensor.2d.shared::cluster", "tensor.3d.shared::cluster");
    assert!(matches!(fault(&rank, [64, 8], 128, [0, 0]), ErrorKind::Unsupported(_)));
}

#[test]
fn maps_a_driver_would_refuse() {
    let right = map(1 << 20, [64, 8], 128);
    right.encode().expect("a map");
    let wrong = [
        TensorMap { address: right.address + 8, ..right.clone() },
        TensorMap { strides: vec![100], ..right.clone() },
        TensorMap { strides: vec![], ..right.clone() },
        TensorMap { box_dims: vec![72, 8], ..right.clone() },
        TensorMap { box_dims: vec![32, 8], ..right.clone() },
        TensorMap { box_dims: vec![64, 300], ..right.clone() },
        TensorMap { box_dims: vec![4, 8], swizzle: 0, ..right.clone() },
        TensorMap { element_bytes: 3, ..right.clone() },
        TensorMap { swizzle: 48, ..right.clone() },
        TensorMap { dims: vec![0, 20], ..right },
    ];
    for map in wrong {
        assert!(map.encode().is_err(), "{map:?}");
    }
}
