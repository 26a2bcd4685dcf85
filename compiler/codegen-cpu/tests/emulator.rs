//! The emulation of instructions that this machine may lack, against the instructions where it has them, and against
//! what the manual says where it has not.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod case;

use attar_artifact::cpu::has_feature;
use attar_artifact::program::{Entry, EntryBlocks};
use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::{CodeBlob, Target};
use case::Random;
use case::emulate::{Products, TileFile, emulated_instructions, vpdpbusd, way};
use iced_x86::code_asm::{
    CodeAssembler, ptr, rax, rcx, rdi, rsi, rsp, tmm0, tmm1, tmm2, ymm0, ymm1, ymm2, ymm3, ymm13, ymm15,
};
use std::io::Write;

fn bytes<const N: usize>(random: &mut Random) -> [u8; N] {
    std::array::from_fn(|_| random.bits() as u8)
}

/// Runs a function that gets the address of a table of addresses.
fn execute(
    target: Target,
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    table: &[u64],
) {
    way(target).expect("runs here, natively or not");
    let mut a = CodeAssembler::new(64).unwrap();
    code(&mut a).unwrap();
    a.ret().unwrap();
    // The handler may look 15 bytes ahead.
    a.db(&[0x90; 16]).unwrap();
    let bytes = a.assemble(0).unwrap();
    let entry =
        Entry { kernel: "body".to_owned(), offset: 0, len: bytes.len() as u64, blocks: EntryBlocks::PLAIN };
    let blob = CodeBlob { target, bytes, entries: vec![entry], features: target.features() };
    let image = ExecImage::load(&blob).unwrap();
    // SAFETY: the code is for this machine, or what it lacks is emulated; it touches what the table points at.
    assert!(unsafe { image.call("body", table, 0, 0) });
}

#[test]
fn byte_products_are_those_of_the_instruction() {
    if !(has_feature("avx512vnni") && has_feature("avx512vl")) {
        let _ = writeln!(std::io::stderr(), "skipped: 1 comparison with the 256-bit vpdpbusd of AVX-512");
        return;
    }
    let mut random = Random(3);
    for _ in 0..1000 {
        let [acc, a, b] = std::array::from_fn(|_| bytes::<32>(&mut random));
        // SAFETY: the features are there.
        let native = unsafe { native_dot(acc, a, b) };
        assert_eq!(vpdpbusd(acc, a, b), native);
    }
}

#[target_feature(enable = "avx512vnni,avx512vl")]
unsafe fn native_dot(acc: [u8; 32], a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
    // SAFETY: plain bytes of equal size.
    unsafe {
        let [acc, a, b] = [acc, a, b].map(|v| std::mem::transmute::<[u8; 32], std::arch::x86_64::__m256i>(v));
        std::mem::transmute(std::arch::x86_64::_mm256_dpbusd_epi32(acc, a, b))
    }
}

#[test]
fn vector_registers_and_memory_operands_are_found() {
    let mut random = Random(5);
    let [acc, a, b] = std::array::from_fn(|_| bytes::<32>(&mut random));
    let mut out = [[0u8; 32]; 3];
    let table = [acc.as_ptr() as u64, a.as_ptr() as u64, b.as_ptr() as u64, out.as_mut_ptr() as u64];
    let before = emulated_instructions();
    execute(
        Target::X86_64V3Avxvnni,
        |s| {
            s.mov(rax, ptr(rdi))?;
            s.vmovups(ymm15, ptr(rax))?;
            s.vmovups(ymm3, ptr(rax))?;
            s.vmovups(ymm0, ptr(rax))?;
            s.mov(rax, ptr(rdi + 8))?;
            s.vmovups(ymm1, ptr(rax))?;
            s.mov(rax, ptr(rdi + 16))?;
            s.vmovups(ymm13, ptr(rax))?;
            s.vpdpbusd(ymm15, ymm1, ymm13)?;
            s.mov(rcx, 8u64)?;
            s.sub(rax, 64)?;
            s.vpdpbusd(ymm3, ymm1, ptr(rax + rcx * 4 + 32))?;
            // Zeros known to the CPU as such, which the context need not hold.
            s.vzeroall()?;
            s.vpdpbusd(ymm2, ymm1, ymm13)?;
            s.vmovups(ymm0, ymm2)?;
            s.mov(rax, ptr(rdi + 24))?;
            s.vmovups(ptr(rax), ymm0)
        },
        &table,
    );
    assert_eq!(out[0], [0; 32]);
    execute(
        Target::X86_64V3Avxvnni,
        |s| {
            s.mov(rax, ptr(rdi))?;
            s.vmovups(ymm15, ptr(rax))?;
            s.vmovups(ymm3, ptr(rax))?;
            s.mov(rax, ptr(rdi + 8))?;
            s.vmovups(ymm1, ptr(rax))?;
            s.mov(rax, ptr(rdi + 16))?;
            s.vmovups(ymm13, ptr(rax))?;
            s.vpdpbusd(ymm15, ymm1, ymm13)?;
            s.mov(rcx, 8u64)?;
            s.sub(rax, 64)?;
            s.vpdpbusd(ymm3, ymm1, ptr(rax + rcx * 4 + 32))?;
            s.mov(rax, ptr(rdi + 24))?;
            s.vmovups(ptr(rax), ymm15)?;
            s.vmovups(ptr(rax + 32), ymm3)?;
            s.vmovups(ptr(rax + 64), ymm1)?;
            s.vzeroupper()
        },
        &table,
    );
    let want = vpdpbusd(acc, a, b);
    assert_eq!(out, [want, want, a]);
    if way(Target::X86_64V3Avxvnni) == Some(case::emulate::Way::Emulated) {
        assert!(emulated_instructions() >= before + 5);
    }
}

/// Rows and bytes per row of tiles 0, 1, 2.
fn configuration(shapes: [(u8, u16); 3]) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    for (i, (rows, row_bytes)) in shapes.into_iter().enumerate() {
        bytes[16 + 2 * i..18 + 2 * i].copy_from_slice(&row_bytes.to_le_bytes());
        bytes[48 + i] = rows;
    }
    bytes
}

/// One product of tiles of 5 x 24, 5 x 12 and 3 x 24 bytes, out of memory and back.
fn product(products: Products, c: &[[u8; 24]; 5], a: &[[u8; 12]; 5], b: &[[u8; 24]; 3]) -> [[u8; 24]; 5] {
    let mut tiles = TileFile::INITIAL;
    tiles.configure(&configuration([(5, 24), (5, 12), (3, 24)])).unwrap();
    tiles.load(0, |r, row| row.copy_from_slice(&c[r])).unwrap();
    tiles.load(1, |r, row| row.copy_from_slice(&a[r])).unwrap();
    tiles.load(2, |r, row| row.copy_from_slice(&b[r])).unwrap();
    tiles.multiply(products, 0, 1, 2).unwrap();
    let mut out = [[0; 24]; 5];
    tiles.store(0, |r, row| out[r].copy_from_slice(row)).unwrap();
    out
}

#[test]
fn tile_products_go_through_registers_and_memory() {
    let mut random = Random(11);
    let c: [[u8; 24]; 5] = std::array::from_fn(|_| bytes(&mut random));
    let a: [[u8; 12]; 5] = std::array::from_fn(|_| bytes(&mut random));
    let b: [[u8; 24]; 3] = std::array::from_fn(|_| bytes(&mut random));
    let all = [
        Products::Bf16,
        Products::Bytes(true, true),
        Products::Bytes(true, false),
        Products::Bytes(false, true),
        Products::Bytes(false, false),
    ];
    for products in all {
        let configuration = configuration([(5, 24), (5, 12), (3, 24)]);
        let mut stored = [0u8; 64];
        // Rows of the result are further apart than they are long.
        let mut out = [[7u8; 40]; 5];
        let table = [
            configuration.as_ptr() as u64,
            c.as_ptr() as u64,
            a.as_ptr() as u64,
            b.as_ptr() as u64,
            out.as_mut_ptr() as u64,
            stored.as_mut_ptr() as u64,
        ];
        execute(
            Target::SapphireRapids,
            |s| {
                s.mov(rax, ptr(rdi))?;
                s.ldtilecfg(ptr(rax))?;
                s.mov(rax, ptr(rdi + 40))?;
                s.sttilecfg(ptr(rax))?;
                s.mov(rax, ptr(rdi + 8))?;
                s.mov(rsi, 24u64)?;
                s.tileloadd(tmm0, ptr(rax + rsi))?;
                s.mov(rax, ptr(rdi + 24))?;
                s.tileloaddt1(tmm2, ptr(rax + rsi))?;
                s.mov(rsi, 3u64)?;
                s.mov(rax, ptr(rdi + 16))?;
                s.sub(rax, 128)?;
                s.tileloadd(tmm1, ptr(rax + rsi * 4 + 128))?;
                match products {
                    Products::Bf16 => s.tdpbf16ps(tmm0, tmm1, tmm2)?,
                    Products::Bytes(true, true) => s.tdpbssd(tmm0, tmm1, tmm2)?,
                    Products::Bytes(true, false) => s.tdpbsud(tmm0, tmm1, tmm2)?,
                    Products::Bytes(false, true) => s.tdpbusd(tmm0, tmm1, tmm2)?,
                    Products::Bytes(false, false) => s.tdpbuud(tmm0, tmm1, tmm2)?,
                }
                s.mov(rax, ptr(rdi + 32))?;
                s.mov(rsi, 40u64)?;
                s.tilestored(ptr(rax + rsi), tmm0)?;
                s.tilezero(tmm0)?;
                s.tilerelease()?;
                s.lea(rsp, ptr(rsp))
            },
            &table,
        );
        let want = product(products, &c, &a, &b);
        for (got, want) in out.iter().zip(want) {
            let same = got[..24].chunks(4).zip(want.chunks(4)).all(|(g, w)| {
                let [g, w] = [g, w].map(|v| f32::from_le_bytes(v.try_into().unwrap()));
                g.to_bits() == w.to_bits() || (products == Products::Bf16 && g.is_nan() && w.is_nan())
            });
            assert!(same, "{products:?}: got {got:?}, want {want:?}");
            assert_eq!(got[24..], [7; 16]);
        }
        assert_eq!(stored, configuration);
        assert!(!case::emulate::tiles_in_use());
    }
}

fn pair(low: f32, high: f32) -> [u8; 4] {
    let [low, high] = [low, high].map(|v| (v.to_bits() >> 16) as u16);
    (u32::from(low) | u32::from(high) << 16).to_le_bytes()
}

/// A tile product of one row and one column: pairs of `a` and `b` over k.
fn bf16_product(c: f32, pairs: &[([f32; 2], [f32; 2])]) -> f32 {
    let mut tiles = TileFile::INITIAL;
    let k = pairs.len();
    tiles.configure(&configuration([(1, 4), (1, 4 * k as u16), (k as u8, 4)])).unwrap();
    tiles.load(0, |_, row| row.copy_from_slice(&c.to_le_bytes())).unwrap();
    tiles
        .load(1, |_, row| {
            for (at, (a, _)) in row.chunks_mut(4).zip(pairs) {
                at.copy_from_slice(&pair(a[0], a[1]));
            }
        })
        .unwrap();
    tiles.load(2, |r, row| row.copy_from_slice(&pair(pairs[r].1[0], pairs[r].1[1]))).unwrap();
    tiles.multiply(Products::Bf16, 0, 1, 2).unwrap();
    let mut out = 0.0;
    tiles.store(0, |_, row| out = f32::from_le_bytes(row.try_into().unwrap())).unwrap();
    out
}

#[test]
fn bf16_sums_follow_the_order_of_the_manual() {
    assert_eq!(bf16_product(1.0, &[([2.0, 3.0], [5.0, 7.0]), ([1.0, 1.0], [1.0, -1.0])]), 32.0);
    // Even elements cancel among themselves before odd ones join: one long sum would lose the 1.
    let big = 1e30;
    assert_eq!(bf16_product(0.0, &[([big, 1.0], [1.0, 1.0]), ([-big, 0.0], [1.0, 0.0])]), 1.0);
    // The old value is added last.
    assert_eq!(bf16_product(1.0, &[([big, -big], [1.0, 1.0])]), 1.0);
    // 1 + 2^-7 squared is exact within the fused product, and so is its difference to the rounded square.
    let x = 1.0 + 2f32.powi(-7);
    assert_eq!(bf16_product(0.0, &[([-x, 0.0], [x, 0.0]), ([x, 0.0], [x, 0.0])]), 0.0);
}

#[test]
fn subnormal_numbers_count_as_zero() {
    let tiny = f32::from_bits(0x0040_0000);
    assert_eq!(bf16_product(0.0, &[([tiny, 0.0], [1e30, 0.0])]), 0.0);
    // A result below the normal range.
    let small = f32::from_bits(0x0080_0000);
    assert_eq!(bf16_product(0.0, &[([small, 0.0], [0.5, 0.0])]), 0.0);
    assert_eq!(bf16_product(tiny, &[([0.0, 0.0], [0.0, 0.0])]), 0.0);
    assert_eq!(bf16_product(0.0, &[([small, 0.0], [1.0, 0.0])]), small);
}

#[test]
fn what_the_architecture_forbids_is_an_error() {
    let good = configuration([(2, 8), (2, 8), (2, 8)]);
    let refused = |change: &dyn Fn(&mut [u8; 64])| {
        let mut bytes = good;
        change(&mut bytes);
        TileFile::INITIAL.clone().configure(&bytes).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|b| b[0] = 2), "palette");
    assert!(refused(&|b| b[5] = 1), "reserved");
    assert!(refused(&|b| b[40] = 1), "reserved");
    assert!(refused(&|b| b[16] = 65), "bytes of a row");
    assert!(refused(&|b| b[48] = 17), "rows");
    assert!(refused(&|b| b[48] = 0), "bytes without rows");
    let mut tiles = TileFile::INITIAL;
    assert!(tiles.zero(0).is_err(), "no configuration");
    tiles.configure(&configuration([(2, 8), (2, 8), (2, 8)])).unwrap();
    assert!(tiles.zero(0).is_ok());
    assert!(tiles.zero(3).is_err(), "no shape");
    assert!(tiles.multiply(Products::Bf16, 0, 1, 2).is_ok());
    assert!(tiles.multiply(Products::Bf16, 0, 1, 1).is_err(), "the same tile twice");
    for shapes in [
        [(2, 8), (2, 8), (3, 8)],
        [(2, 8), (3, 8), (2, 8)],
        [(2, 8), (2, 8), (2, 12)],
        [(2, 8), (2, 6), (1, 8)],
    ] {
        tiles.configure(&configuration(shapes)).unwrap();
        assert!(tiles.multiply(Products::Bf16, 0, 1, 2).is_err(), "{shapes:?}");
    }
    tiles.release();
    assert!(tiles.zero(0).is_err(), "released");
}

/// All beyond a tile's shape is zero after a load.
#[test]
fn loads_clear_what_they_do_not_fill() {
    let mut tiles = TileFile::INITIAL;
    tiles.configure(&configuration([(2, 8), (2, 8), (2, 8)])).unwrap();
    tiles.load(1, |_, row| row.fill(9)).unwrap();
    let mut seen = 0;
    tiles.store(1, |_, row| seen += row.iter().filter(|b| **b == 9).count()).unwrap();
    assert_eq!(seen, 16);
    tiles.zero(1).unwrap();
    tiles.store(1, |_, row| assert!(row.iter().all(|b| *b == 0))).unwrap();
}
