//! Instructions one by one, on values that matter and on random ones, against what Rust, the `half` crate, or a search
//! through all values of a format says.

mod harness;

use half::{bf16, f16};
use harness::*;
use proptest::prelude::*;

/// `op` reads `%r1`, `%r2`, `%r3` (also as `%f…`, low halves as `%h…`, and 64 bits wide as `%rd11`, `%rd12`, `%rd13`) and
/// writes `%r9`, `%f9`, `%h9` or `%rd19`, as `result` says. One thread for each row of operands.
fn apply(op: &str, result: &str, rows: &[[u64; 3]]) -> Vec<u64> {
    let store = match result.trim_start_matches('%').trim_end_matches(char::is_numeric) {
        "r" => format!("cvt.u64.u32 %rd7, {result};"),
        "f" => format!("mov.b32 %r50, {result}; cvt.u64.u32 %rd7, %r50;"),
        "h" => format!("cvt.u64.u16 %rd7, {result};"),
        "p" => format!("selp.b64 %rd7, 1, 0, {result};"),
        _ => format!("mov.u64 %rd7, {result};"),
    };
    let body = format!(
        "mov.u32 %r51, %ctaid.x; mov.u32 %r52, %ntid.x; mad.lo.u32 %r53, %r51, %r52, %r0;
         mul.wide.u32 %rd3, %r53, 24; add.s64 %rd4, %rd1, %rd3; mul.wide.u32 %rd5, %r53, 8; add.s64 %rd6, %rd2, %rd5;
         ld.global.u64 %rd11, [%rd4]; ld.global.u64 %rd12, [%rd4+8]; ld.global.u64 %rd13, [%rd4+16];
         cvt.u32.u64 %r1, %rd11; cvt.u32.u64 %r2, %rd12; cvt.u32.u64 %r3, %rd13;
         mov.b32 %f1, %r1; mov.b32 %f2, %r2; mov.b32 %f3, %r3;
         cvt.u16.u32 %h1, %r1; cvt.u16.u32 %h2, %r2; cvt.u16.u32 %h3, %r3;
         mov.b64 %fd1, %rd11; mov.b64 %fd2, %rd12;
         {op} {store} st.global.u64 [%rd6], %rd7;"
    );
    let bytes: Vec<u8> = rows.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    let threads = rows.len().min(64) as u32;
    assert_eq!(rows.len() % threads as usize, 0);
    let y = run_written(&body, (rows.len() / threads as usize) as u32, threads, &bytes, rows.len() * 8);
    let y = y.unwrap_or_else(|e| panic!("{e}"));
    y.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight"))).collect()
}

/// Compares `op` with `expected` on rows.
fn check(op: &str, result: &str, rows: &[[u64; 3]], expected: impl Fn([u64; 3]) -> u64) {
    for (row, got) in rows.iter().zip(apply(op, result, rows)) {
        assert_eq!(got, expected(*row), "{op} of {row:x?}");
    }
}

/// Words at the edges of integers and floats, in all pairs, and the third operand going round.
fn edges() -> Vec<[u64; 3]> {
    const WORDS: [u32; 16] = [
        0,
        1,
        2,
        31,
        0x7f,
        0xff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x3f80_0000,
        0xbfc0_0000,
        0x7f80_0000,
        0x0080_0000,
        0x0000_0007,
        0x4b00_0001,
        0x1234_5678,
    ];
    let all = WORDS.iter().flat_map(|a| WORDS.iter().map(move |b| (*a, *b)));
    all.enumerate()
        .map(|(i, (a, b))| {
            let c = WORDS[i * 7 % 16];
            [a, b, c].map(|w| u64::from(w) | u64::from(!w) << 32)
        })
        .collect()
}

fn low(v: u64) -> u32 {
    v as u32
}

#[test]
fn integers() {
    let rows = edges();
    let word = |f: fn(u32, u32, u32) -> u32| move |[a, b, c]: [u64; 3]| u64::from(f(low(a), low(b), low(c)));
    check("add.u32 %r9, %r1, %r2;", "%r9", &rows, word(|a, b, _| a.wrapping_add(b)));
    check("sub.s32 %r9, %r1, %r2;", "%r9", &rows, word(|a, b, _| a.wrapping_sub(b)));
    check(
        "add.sat.s32 %r9, %r1, %r2;",
        "%r9",
        &rows,
        word(|a, b, _| (a as i32).saturating_add(b as i32) as u32),
    );
    check(
        "sub.sat.s32 %r9, %r1, %r2;",
        "%r9",
        &rows,
        word(|a, b, _| (a as i32).saturating_sub(b as i32) as u32),
    );
    check("mul.lo.s32 %r9, %r1, %r2;", "%r9", &rows, word(|a, b, _| a.wrapping_mul(b)));
    check(
        "mul.hi.u32 %r9, %r1, %r2;",
        "%r9",
        &rows,
        word(|a, b, _| ((u64::from(a) * u64::from(b)) >> 32) as u32),
    );
    check("mad.lo.s32 %r9, %r1, %r2, %r3;", "%r9", &rows, word(|a, b, c| a.wrapping_mul(b).wrapping_add(c)));
    check("mul.wide.s32 %rd19, %r1, %r2;", "%rd19", &rows, |[a, b, _]| {
        (i64::from(a as i32) * i64::from(b as i32)) as u64
    });
    check("mad.wide.u32 %rd19, %r1, %r2, %rd13;", "%rd19", &rows, |[a, b, c]| {
        (u64::from(low(a)) * u64::from(low(b))).wrapping_add(c)
    });
    check("mul.wide.u16 %r9, %h1, %h2;", "%r9", &rows, |[a, b, _]| {
        u64::from(u32::from(a as u16) * u32::from(b as u16))
    });
    check("min.s32 %r9, %r1, %r2;", "%r9", &rows, word(|a, b, _| (a as i32).min(b as i32) as u32));
    check("max.u32 %r9, %r1, %r2;", "%r9", &rows, word(|a, b, _| a.max(b)));
    check("min.s64 %rd19, %rd11, %rd12;", "%rd19", &rows, |[a, b, _]| (a as i64).min(b as i64) as u64);
    check("abs.s32 %r9, %r1;", "%r9", &rows, word(|a, _, _| (a as i32).wrapping_abs() as u32));
    check("neg.s32 %r9, %r1;", "%r9", &rows, word(|a, _, _| a.wrapping_neg()));
    check(
        "sad.s32 %r9, %r1, %r2, %r3;",
        "%r9",
        &rows,
        word(|a, b, c| (a as i32).abs_diff(b as i32).wrapping_add(c)),
    );
    // Sums of 64 bits in halves.
    let carry = "add.cc.u32 %r10, %r1, %r2; shr.u64 %rd20, %rd11, 32; shr.u64 %rd21, %rd12, 32; cvt.u32.u64 %r11, %rd20;
                 cvt.u32.u64 %r12, %rd21; addc.u32 %r13, %r11, %r12; mov.b64 %rd19, {%r10, %r13};";
    check(carry, "%rd19", &rows, |[a, b, _]| a.wrapping_add(b));
    check(&carry.replace("add", "sub"), "%rd19", &rows, |[a, b, _]| a.wrapping_sub(b));
    let product = "mul.lo.u32 %r10, %r1, %r2; mad.lo.cc.u32 %r11, %r1, %r2, %r3; madc.hi.u32 %r12, %r1, %r2, 0; mov.b64 %rd19, {%r11, %r12};";
    check(product, "%rd19", &rows, |[a, b, c]| u64::from(low(a)) * u64::from(low(b)) + u64::from(low(c)));
}

#[test]
fn bits() {
    let rows = edges();
    let word = |f: fn(u32, u32, u32) -> u32| move |[a, b, c]: [u64; 3]| u64::from(f(low(a), low(b), low(c)));
    check("and.b32 %r9, %r1, %r2;", "%r9", &rows, word(|a, b, _| a & b));
    check("xor.b64 %rd19, %rd11, %rd12;", "%rd19", &rows, |[a, b, _]| a ^ b);
    check("not.b32 %r9, %r1;", "%r9", &rows, word(|a, _, _| !a));
    check("shl.b32 %r9, %r1, %r2;", "%r9", &rows, word(|a, b, _| if b > 31 { 0 } else { a << b }));
    check("shr.s32 %r9, %r1, %r2;", "%r9", &rows, word(|a, b, _| ((a as i32) >> b.min(31)) as u32));
    check(
        "shr.u64 %rd19, %rd11, %r2;",
        "%rd19",
        &rows,
        |[a, b, _]| if low(b) > 63 { 0 } else { a >> low(b) },
    );
    check(
        "shf.l.wrap.b32 %r9, %r1, %r2, %r3;",
        "%r9",
        &rows,
        word(|a, b, c| (((u64::from(b) << 32 | u64::from(a)) << (c & 31)) >> 32) as u32),
    );
    check(
        "shf.r.clamp.b32 %r9, %r1, %r2, %r3;",
        "%r9",
        &rows,
        word(|a, b, c| ((u64::from(b) << 32 | u64::from(a)) >> c.min(32)) as u32),
    );
    check("popc.b64 %r9, %rd11;", "%r9", &rows, |[a, ..]| u64::from(a.count_ones()));
    check("clz.b32 %r9, %r1;", "%r9", &rows, word(|a, _, _| a.leading_zeros()));
    check("brev.b32 %r9, %r1;", "%r9", &rows, word(|a, _, _| a.reverse_bits()));
    check("bfind.u32 %r9, %r1;", "%r9", &rows, word(|a, _, _| a.checked_ilog2().unwrap_or(u32::MAX)));
    check(
        "bfind.shiftamt.u32 %r9, %r1;",
        "%r9",
        &rows,
        word(|a, _, _| if a == 0 { u32::MAX } else { a.leading_zeros() }),
    );
    // Bit by bit, as the manual says.
    check(
        "bfe.s32 %r9, %r1, %r2, %r3;",
        "%r9",
        &rows,
        word(|a, p, l| {
            let (p, l) = (p & 255, l & 255);
            let sign = if l == 0 { 0 } else { a >> (p + l - 1).min(31) & 1 };
            (0..32).fold(0, |d, i| d | (if i < l && p + i <= 31 { a >> (p + i) & 1 } else { sign }) << i)
        }),
    );
    check(
        "bfe.u32 %r9, %r1, %r2, %r3;",
        "%r9",
        &rows,
        word(|a, p, l| {
            let (p, l) = (p & 255, l & 255);
            (0..32).fold(0, |d, i| d | (if i < l && p + i <= 31 { a >> (p + i) & 1 } else { 0 }) << i)
        }),
    );
    check(
        "bfi.b32 %r9, %r1, %r2, %r3, 5;",
        "%r9",
        &rows,
        word(|a, b, p| {
            let p = p & 255;
            (0..5).filter(|i| p + i <= 31).fold(b, |d, i| d & !(1 << (p + i)) | (a >> i & 1) << (p + i))
        }),
    );
    for table in [0x80u8, 0xea, 0x96, 0xf8, 0x01, 0xca] {
        check(&format!("lop3.b32 %r9, %r1, %r2, %r3, {table};"), "%r9", &rows, |[a, b, c]| {
            (0..32).fold(0, |d, i| {
                let index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1;
                d | u64::from(table >> index & 1) << i
            })
        });
    }
    check(
        "prmt.b32 %r9, %r1, %r2, %r3;",
        "%r9",
        &rows,
        word(|a, b, s| {
            let bytes = [a.to_le_bytes(), b.to_le_bytes()].concat();
            let pick = |n: u32| {
                let byte = bytes[(n & 7) as usize];
                if n & 8 == 0 {
                    byte
                } else if byte >= 128 {
                    255
                } else {
                    0
                }
            };
            u32::from_le_bytes([0, 4, 8, 12].map(|at| pick(s >> at & 15)))
        }),
    );
    check(
        "dp4a.s32.u32 %r9, %r1, %r2, %r3;",
        "%r9",
        &rows,
        word(|a, b, c| {
            let terms = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
            terms.fold(c, |sum, (a, b)| sum.wrapping_add_signed(i32::from(a as i8) * i32::from(b)))
        }),
    );
    check(
        "dp2a.lo.u32.s32 %r9, %r1, %r2, %r3;",
        "%r9",
        &rows,
        word(|a, b, c| {
            let [b0, b1, ..] = b.to_le_bytes();
            let products =
                (i64::from(a & 0xffff) * i64::from(b0 as i8)) + (i64::from(a >> 16) * i64::from(b1 as i8));
            c.wrapping_add(products as u32)
        }),
    );
}

#[test]
fn comparison_and_selection() {
    let rows = edges();
    let single = |v: u64| f32::from_bits(v as u32);
    check("setp.lt.s32 %p9, %r1, %r2;", "%p9", &rows, |[a, b, _]| u64::from((a as i32) < b as i32));
    check("setp.hi.u32 %p9, %r1, %r2;", "%p9", &rows, |[a, b, _]| u64::from(low(a) > low(b)));
    check("setp.geu.f32 %p9, %f1, %f2;", "%p9", &rows, |[a, b, _]| {
        let (a, b) = (single(a), single(b));
        u64::from(a.is_nan() || b.is_nan() || a >= b)
    });
    check("setp.ne.f32 %p9, %f1, %f2;", "%p9", &rows, |[a, b, _]| {
        let (a, b) = (single(a), single(b));
        u64::from(!a.is_nan() && !b.is_nan() && a != b)
    });
    let both = "setp.eq.u32 %p8, %r3, 1; setp.gt.or.s32 %p9|%p10, %r1, %r2, %p8;";
    check(both, "%p9", &rows, |[a, b, c]| u64::from(a as i32 > b as i32 || low(c) == 1));
    check(both, "%p10", &rows, |[a, b, c]| u64::from(a as i32 <= b as i32 || low(c) == 1));
    check(
        "set.eq.u32.u32 %r9, %r1, %r2;",
        "%r9",
        &rows,
        |[a, b, _]| if low(a) == low(b) { 0xffff_ffff } else { 0 },
    );
    check("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r9, %r1, %r3, !%p1;", "%r9", &rows, |[a, b, c]| {
        u64::from(if low(a) < low(b) { low(c) } else { low(a) })
    });
    check("slct.b32.s32 %r9, %r1, %r2, %r3;", "%r9", &rows, |[a, b, c]| {
        u64::from(if (c as i32) < 0 { low(b) } else { low(a) })
    });
    check("testp.subnormal.f32 %p9, %f1;", "%p9", &rows, |[a, ..]| u64::from(single(a).is_subnormal()));
    check(
        "setp.lt.u32 %p1, %r1, %r2; setp.lt.u32 %p2, %r2, %r3; xor.pred %p9, %p1, %p2;",
        "%p9",
        &rows,
        |[a, b, c]| u64::from((low(a) < low(b)) ^ (low(b) < low(c))),
    );
}

/// Every value of a format with its code, without NaN and infinity, by rising value.
fn values(codes: std::ops::Range<u32>, value: impl Fn(u32) -> f64) -> Vec<(f64, u32)> {
    let mut out: Vec<(f64, u32)> = codes.map(|c| (value(c), c)).filter(|(v, _)| v.is_finite()).collect();
    out.sort_by(|a, b| a.0.total_cmp(&b.0));
    out
}

/// The code nearest to `x`, found by search; ties go to the even code. `x` lies within the range of the format.
fn nearest(values: &[(f64, u32)], x: f64) -> u32 {
    let above = values.partition_point(|(v, _)| v.total_cmp(&x).is_lt()).min(values.len() - 1);
    let (high, low) = (values[above], values[above.saturating_sub(1)]);
    match (x - low.0).total_cmp(&(high.0 - x)) {
        std::cmp::Ordering::Less => low.1,
        std::cmp::Ordering::Greater => high.1,
        std::cmp::Ordering::Equal if low.1 & 1 == 0 => low.1,
        std::cmp::Ordering::Equal => high.1,
    }
}

fn f16_values() -> Vec<(f64, u32)> {
    values(0..0x1_0000, |c| f16::from_bits(c as u16).to_f64())
}

fn bf16_values() -> Vec<(f64, u32)> {
    values(0..0x1_0000, |c| bf16::from_bits(c as u16).to_f64())
}

/// Bits of an `e4m3` or `e5m2` byte as the OCP specification of 8-bit floats lays them out.
fn fp8(code: u32, exponent_bits: u32) -> f64 {
    let mantissa_bits = 7 - exponent_bits;
    let (exponent, mantissa) = ((code & 127) >> mantissa_bits, code & ((1 << mantissa_bits) - 1));
    let special = if exponent_bits == 4 { code & 127 == 127 } else { exponent == 31 };
    if special {
        return f64::NAN;
    }
    let bias = (1 << (exponent_bits - 1)) - 1;
    let fraction = f64::from(mantissa) / f64::from(1u32 << mantissa_bits);
    let (whole, exponent) = if exponent == 0 { (0.0, 1 - bias) } else { (1.0, exponent as i32 - bias) };
    (whole + fraction) * 2f64.powi(exponent) * if code >= 128 { -1.0 } else { 1.0 }
}

#[test]
fn every_half_and_every_small_float_is_widened() {
    let rows: Vec<[u64; 3]> = (0..0x1_0000).map(|c| [c, 0, 0]).collect();
    let widened = |op: &str, value: &dyn Fn(u16) -> f32| {
        for (code, got) in apply(op, "%f9", &rows).into_iter().enumerate() {
            let (got, expected) = (f32::from_bits(got as u32), value(code as u16));
            assert!(
                got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()),
                "{op} of {code:x}"
            );
        }
    };
    widened("cvt.f32.f16 %f9, %h1;", &|c| f16::from_bits(c).to_f32());
    widened("cvt.f32.bf16 %f9, %h1;", &|c| bf16::from_bits(c).to_f32());
    for (name, bits) in [("e4m3x2", 4), ("e5m2x2", 5)] {
        let rows: Vec<[u64; 3]> = (0..256).map(|c| [c | (255 - c) << 8, 0, 0]).collect();
        let got = apply(&format!("cvt.rn.f16x2.{name} %r9, %h1;"), "%r9", &rows);
        for (code, got) in got.into_iter().enumerate() {
            for (half, code) in [(got as u16, code), ((got >> 16) as u16, 255 - code)] {
                let (got, expected) = (f16::from_bits(half).to_f64(), fp8(code as u32, bits));
                let infinite = bits == 5 && code & 127 == 0x7c;
                assert!(
                    got == expected || (got.is_nan() && expected.is_nan()) || (infinite && got.is_infinite()),
                    "{name} {code:x}: {got}"
                );
            }
        }
    }
}

/// A single that is often near the edges of small formats.
fn any_single() -> impl Strategy<Value = f32> {
    prop_oneof![
        any::<u32>().prop_map(f32::from_bits).prop_filter("a number", |x| !x.is_nan()),
        (-70000.0f32..70000.0),
        (-1.0f32..1.0),
        (-1e-4f32..1e-4),
        // Halves and what lies right between two of them.
        any::<u16>().prop_map(|b| f16::from_bits(b & 0xfbff).to_f32()),
        (any::<u16>(), -2i32..3).prop_map(|(b, d)| {
            let x = f16::from_bits(b & 0x7bfe).to_f32();
            let y = f16::from_bits((b & 0x7bfe) + 1).to_f32();
            f32::from_bits(((x + y) / 2.0).to_bits().wrapping_add_signed(d))
        }),
    ]
}

fn rows_of(values: &[f32]) -> Vec<[u64; 3]> {
    let word = |i: usize| u64::from(values[i % values.len()].to_bits());
    (0..values.len()).map(|i| [word(i), word(i + 1), word(i + 2)]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn singles_are_narrowed(values in prop::collection::vec(any_single(), 64)) {
        let rows = rows_of(&values);
        let single = |v: u64| f32::from_bits(v as u32);
        check("cvt.rn.f16.f32 %h9, %f1;", "%h9", &rows, |[a, ..]| u64::from(f16::from_f32(single(a)).to_bits()));
        check("cvt.rn.bf16.f32 %h9, %f1;", "%h9", &rows, |[a, ..]| u64::from(bf16::from_f32(single(a)).to_bits()));
        check("cvt.rn.bf16x2.f32 %r9, %f1, %f2;", "%r9", &rows, |[a, b, _]| {
            u64::from(bf16::from_f32(single(a)).to_bits()) << 16 | u64::from(bf16::from_f32(single(b)).to_bits())
        });
        check("cvt.rn.relu.f16x2.f32 %r9, %f1, %f2;", "%r9", &rows, |[a, b, _]| {
            let half = |x: f32| u64::from(f16::from_f32(if x < 0.0 { 0.0 } else { x }).to_bits());
            half(single(a)) << 16 | half(single(b))
        });
        // Towards zero: the largest half that is not larger.
        let halves = f16_values();
        for ([a, ..], got) in rows.iter().zip(apply("cvt.rz.f16.f32 %h9, %f1;", "%h9", &rows)) {
            let (x, got) = (f64::from(single(*a)), f16::from_bits(got as u16).to_f64());
            let best = halves.iter().map(|v| v.0).filter(|v| v.abs() <= x.abs() && v.is_sign_negative() == x.is_sign_negative());
            let best = best.max_by(|a, b| a.abs().total_cmp(&b.abs()));
            prop_assert_eq!(Some(got), best.filter(|_| x.is_finite()).or(Some(x)));
        }
        for (name, bits, largest) in [("e4m3x2", 4, 448.0), ("e5m2x2", 5, 57344.0)] {
            let table = values_of_fp8(bits);
            let op = format!("cvt.rn.satfinite.{name}.f32 %h9, %f1, %f2;");
            check(&op, "%h9", &rows, |[a, b, _]| {
                let code = |x: f32| {
                    let near = nearest(&table, f64::from(x).clamp(-largest, largest));
                    u64::from(if near & 127 == 0 { u32::from(x.is_sign_negative()) << 7 } else { near })
                };
                code(single(a)) << 8 | code(single(b))
            });
        }
    }

    #[test]
    fn singles_become_integers(values in prop::collection::vec(any_single(), 64)) {
        let rows = rows_of(&values);
        let single = |v: u64| f32::from_bits(v as u32);
        check("cvt.rzi.s32.f32 %r9, %f1;", "%r9", &rows, |[a, ..]| u64::from(single(a) as i32 as u32));
        check("cvt.rni.s32.f32 %r9, %f1;", "%r9", &rows, |[a, ..]| u64::from(single(a).round_ties_even() as i32 as u32));
        check("cvt.rmi.u32.f32 %r9, %f1;", "%r9", &rows, |[a, ..]| u64::from(single(a).floor() as u32));
        check("cvt.rpi.s64.f32 %rd19, %f1;", "%rd19", &rows, |[a, ..]| single(a).ceil() as i64 as u64);
        check("cvt.rzi.u16.f32 %h9, %f1;", "%h9", &rows, |[a, ..]| u64::from(single(a) as u16));
        check("cvt.rni.s8.f32 %r9, %f1;", "%r9", &rows, |[a, ..]| u64::from(single(a).round_ties_even() as i8 as i32 as u32));
        check("cvt.rni.f32.f32 %f9, %f1;", "%f9", &rows, |[a, ..]| u64::from(single(a).round_ties_even().to_bits()));
        check("cvt.sat.f32.f32 %f9, %f1;", "%f9", &rows, |[a, ..]| {
            let x = single(a);
            u64::from(if x > 0.0 { x.min(1.0) } else { 0.0 }.to_bits())
        });
        check("cvt.rn.tf32.f32 %r9, %f1;", "%r9", &rows, |[a, ..]| {
            // Ten bits of mantissa: what a half has, at any exponent.
            let bits = low(a);
            let (below, above) = (bits & !0x1fff, (bits & !0x1fff) + 0x2000);
            let near = match (bits - below).cmp(&(above - bits)) {
                std::cmp::Ordering::Less => below,
                std::cmp::Ordering::Greater => above,
                std::cmp::Ordering::Equal => if below >> 13 & 1 == 0 { below } else { above },
            };
            u64::from(near)
        });
    }

    #[test]
    fn integers_become_floats(words in prop::collection::vec(any::<u64>(), 64)) {
        let rows: Vec<[u64; 3]> = words.iter().enumerate().map(|(i, w)| [w >> (i % 64), *w, 0]).collect();
        check("cvt.rn.f32.s64 %f9, %rd11;", "%f9", &rows, |[a, ..]| u64::from((a as i64 as f32).to_bits()));
        check("cvt.rn.f32.u64 %f9, %rd11;", "%f9", &rows, |[a, ..]| u64::from((a as f32).to_bits()));
        check("cvt.rn.f64.s64 %fd9, %rd11; mov.b64 %rd19, %fd9;", "%rd19", &rows, |[a, ..]| (a as i64 as f64).to_bits());
        check("cvt.rn.f16.s32 %h9, %r1;", "%h9", &rows, |[a, ..]| u64::from(f16::from_f64(f64::from(a as i32)).to_bits()));
        check("cvt.s32.s8 %r9, %r1;", "%r9", &rows, |[a, ..]| u64::from(a as i8 as i32 as u32));
        check("cvt.s64.s16 %rd19, %h1;", "%rd19", &rows, |[a, ..]| a as i16 as i64 as u64);
        check("cvt.sat.s8.s32 %r9, %r1;", "%r9", &rows, |[a, ..]| u64::from((a as i32).clamp(-128, 127) as u32));
        check("cvt.sat.u8.s32 %r9, %r1;", "%r9", &rows, |[a, ..]| (a as i32).clamp(0, 255) as u64);
        check("cvt.pack.sat.s8.s32.b32 %r9, %r1, %r2, %r1;", "%r9", &rows, |[a, b, _]| {
            let byte = |v: u64| u64::from((v as i32).clamp(-128, 127) as u8);
            (a & 0xffff) << 16 | byte(a) << 8 | byte(b)
        });
        // Directed: the neighbours enclose the integer.
        for ([a, ..], got) in rows.iter().zip(apply("cvt.rz.f32.u64 %f9, %rd11;", "%f9", &rows)) {
            let got = f32::from_bits(got as u32);
            prop_assert!(got as u128 <= u128::from(*a) && u128::from(*a) < got.next_up() as u128 + u128::from(*a < 1 << 24));
        }
    }

    #[test]
    fn arithmetic_of_singles(values in prop::collection::vec(any_single(), 64)) {
        let rows = rows_of(&values);
        let single = |v: u64| f32::from_bits(v as u32);
        let near = |op: &str, f: &dyn Fn(f32, f32, f32) -> f32| {
            for ([a, b, c], got) in rows.iter().zip(apply(op, "%f9", &rows)) {
                let (got, expected) = (f32::from_bits(got as u32), f(single(*a), single(*b), single(*c)));
                assert!(got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()), "{op}: {got} {expected}");
            }
        };
        near("add.f32 %f9, %f1, %f2;", &|a, b, _| a + b);
        near("sub.rn.f32 %f9, %f1, %f2;", &|a, b, _| a - b);
        near("mul.f32 %f9, %f1, %f2;", &|a, b, _| a * b);
        near("div.rn.f32 %f9, %f1, %f2;", &|a, b, _| a / b);
        near("fma.rn.f32 %f9, %f1, %f2, %f3;", &|a, b, c| a.mul_add(b, c));
        near("sqrt.rn.f32 %f9, %f1;", &|a, _, _| a.sqrt());
        near("rcp.rn.f32 %f9, %f1;", &|a, _, _| 1.0 / a);
        near("neg.f32 %f9, %f1;", &|a, _, _| -a);
        near("copysign.f32 %f9, %f1, %f2;", &|a, b, _| b.copysign(a));
        near("max.f32 %f9, %f1, %f2;", &|a, b, _| if a == b && a.is_sign_negative() { b } else { a.max(b) });
        near("mul.sat.f32 %f9, %f1, %f2;", &|a, b, _| { let x = a * b; if x > 0.0 { x.min(1.0) } else { 0.0 } });
        let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
        near("mul.ftz.f32 %f9, %f1, %f2;", &|a, b, _| flush(flush(a) * flush(b)));
        near("fma.rn.ftz.f32 %f9, %f1, %f2, %f3;", &|a, b, c| flush(flush(a).mul_add(flush(b), flush(c))));
        // Directed roundings of products, which are exact in double precision.
        for (mode, op) in [("rz", "mul.rz.f32"), ("rm", "mul.rm.f32"), ("rp", "mul.rp.f32")] {
            let got = apply(&format!("{op} %f9, %f1, %f2;"), "%f9", &rows);
            for ([a, b, _], got) in rows.iter().zip(got) {
                let (exact, got) = (f64::from(single(*a)) * f64::from(single(*b)), f32::from_bits(got as u32));
                if !exact.is_finite() {
                    continue;
                }
                let down = mode == "rm" || (mode == "rz" && exact >= 0.0);
                let value = f64::from(got);
                let tight = if down {
                    value <= exact && exact < f64::from(got.next_up())
                } else {
                    value >= exact && exact > f64::from(got.next_down())
                };
                prop_assert!(tight || value == exact, "{} of {} and {}: {}", op, single(*a), single(*b), got);
            }
        }
    }

    #[test]
    fn directed_sums_and_quotients(numbers in prop::collection::vec((-4096i32..4096, 1i32..4096, -2000i32..2000), 64)) {
        // Of a size that makes sums exact in double precision, and quotients comparable by multiplication.
        let rows: Vec<[u64; 3]> = numbers
            .iter()
            .map(|(a, b, c)| [*a as f32 / 7.0, *b as f32 * 1.1, *c as f32 / 1024.0].map(|x| u64::from(x.to_bits())))
            .collect();
        let single = |v: u64| f32::from_bits(v as u32);
        for (mode, down) in [("rm", true), ("rp", false)] {
            let bounds = |got: f32| if down { (got, got.next_up()) } else { (got.next_down(), got) };
            let inside = |(low, high): (f32, f32), exact: f64| f64::from(low) <= exact && exact <= f64::from(high);
            for ([a, b, c], got) in rows.iter().zip(apply(&format!("fma.{mode}.f32 %f9, %f1, %f2, %f3;"), "%f9", &rows)) {
                let exact = f64::from(single(*a)) * f64::from(single(*b)) + f64::from(single(*c));
                prop_assert!(inside(bounds(f32::from_bits(got as u32)), exact));
            }
            for ([a, b, _], got) in rows.iter().zip(apply(&format!("add.{mode}.f32 %f9, %f1, %f2;"), "%f9", &rows)) {
                prop_assert!(inside(bounds(f32::from_bits(got as u32)), f64::from(single(*a)) + f64::from(single(*b))));
            }
            for ([a, b, _], got) in rows.iter().zip(apply(&format!("div.{mode}.f32 %f9, %f1, %f2;"), "%f9", &rows)) {
                let (low, high) = bounds(f32::from_bits(got as u32));
                let (a, b) = (f64::from(single(*a)), f64::from(single(*b)));
                prop_assert!(f64::from(low) * b <= a && a <= f64::from(high) * b);
            }
            for ([_, b, _], got) in rows.iter().zip(apply(&format!("sqrt.{mode}.f32 %f9, %f2;"), "%f9", &rows)) {
                let (low, high) = bounds(f32::from_bits(got as u32));
                let b = f64::from(single(*b));
                prop_assert!(f64::from(low).powi(2) <= b && b <= f64::from(high).powi(2));
            }
        }
    }

    #[test]
    fn arithmetic_of_halves(words in prop::collection::vec(any::<u64>(), 96)) {
        // Operands of like size, so that sums round often and rarely overflow.
        let rows: Vec<[u64; 3]> = words.chunks_exact(3).map(|w| [w[0], w[1], w[2]].map(|v| v & 0xbfff_bfff)).collect();
        let (halves, brains) = (f16_values(), bf16_values());
        let f = |v: u64| f16::from_bits(v as u16).to_f64();
        let g = |v: u64| bf16::from_bits(v as u16).to_f64();
        let compare = |op: &str, table: &[(f64, u32)], decode: &dyn Fn(u64) -> f64, value: &dyn Fn(f64, f64, f64) -> f64| {
            for (row, got) in rows.iter().zip(apply(op, "%r9", &rows)) {
                for shift in [0, 16] {
                    let [a, b, c] = row.map(|v| decode(v >> shift));
                    let exact = value(a, b, c);
                    let largest = table[table.len() - 1].0;
                    if exact.abs() > largest || !exact.is_finite() {
                        continue;
                    }
                    let got = decode(got >> shift);
                    let near = decode(u64::from(nearest(table, exact)));
                    assert_eq!(got, near, "{op} of {a}, {b}, {c}");
                }
            }
        };
        compare("add.f16x2 %r9, %r1, %r2;", &halves, &f, &|a, b, _| a + b);
        compare("mul.rn.f16x2 %r9, %r1, %r2;", &halves, &f, &|a, b, _| a * b);
        compare("sub.bf16x2 %r9, %r1, %r2;", &brains, &g, &|a, b, _| a - b);
        compare("mul.bf16x2 %r9, %r1, %r2;", &brains, &g, &|a, b, _| a * b);
        // Exact where the sum fits into 53 bits, as of halves it does when exponents are within 20 of each other.
        compare("fma.rn.f16x2 %r9, %r1, %r2, %r3;", &halves, &f, &|a, b, c| a.mul_add(b, c));
        compare("max.f16x2 %r9, %r1, %r2;", &halves, &f, &|a, b, _| a.max(b));
        compare("neg.bf16x2 %r9, %r1;", &brains, &g, &|a, _, _| -a);
    }
}

fn values_of_fp8(exponent_bits: u32) -> Vec<(f64, u32)> {
    values(0..256, |c| fp8(c, exponent_bits))
}

#[test]
fn approximate_functions() {
    let values: Vec<f32> = noise(256, 40).iter().map(|v| v * 20.0).collect();
    let rows = rows_of(&values);
    let near = |op: &str, f: fn(f64) -> f64| {
        for ([a, ..], got) in rows.iter().zip(apply(op, "%f9", &rows)) {
            let (x, got) = (f64::from(f32::from_bits(*a as u32)), f32::from_bits(got as u32));
            let expected = f(x) as f32;
            assert!(got == expected || (got.is_nan() && expected.is_nan()), "{op} of {x}: {got}, {expected}");
        }
    };
    near("ex2.approx.f32 %f9, %f1;", f64::exp2);
    near("ex2.approx.ftz.f32 %f9, %f1;", f64::exp2);
    near("lg2.approx.f32 %f9, %f1;", f64::log2);
    near("sin.approx.f32 %f9, %f1;", f64::sin);
    near("cos.approx.ftz.f32 %f9, %f1;", f64::cos);
    near("tanh.approx.f32 %f9, %f1;", f64::tanh);
    near("rsqrt.approx.f32 %f9, %f1;", |x| 1.0 / x.sqrt());
    near("rcp.approx.ftz.f32 %f9, %f1;", |x| 1.0 / x);
    near("div.full.f32 %f9, %f1, %f1;", |x| x / x);
    near("sqrt.approx.f32 %f9, %f1;", f64::sqrt);
    let halves: Vec<[u64; 3]> =
        (0..64).map(|i| [u64::from(f16::from_f32(i as f32 / 8.0 - 4.0).to_bits()), 0, 0]).collect();
    for ([a, ..], got) in halves.iter().zip(apply("ex2.approx.f16 %h9, %h1;", "%h9", &halves)) {
        let (x, got) = (f16::from_bits(*a as u16).to_f64(), f16::from_bits(got as u16).to_f64());
        assert!((got - x.exp2()).abs() <= x.exp2() / 2048.0, "{x}: {got}");
    }
}

#[test]
fn moves_pack_and_unpack() {
    let rows = edges();
    check("mov.b64 {%r10, %r11}, %rd11; mov.b64 %rd19, {%r11, %r10};", "%rd19", &rows, |[a, ..]| {
        a.rotate_left(32)
    });
    check("mov.b32 {%h4, %h5}, %r1; mov.b32 %r9, {%h5, %h4};", "%r9", &rows, |[a, ..]| {
        u64::from(low(a).rotate_left(16))
    });
    check("mov.b64 {_, %r9}, %rd11;", "%r9", &rows, |[a, ..]| a >> 32);
    check("mov.u32 %r9, WARP_SZ;", "%r9", &rows, |_| 32);
    check("mov.f32 %f9, 0f3FC00000;", "%f9", &rows, |_| 0x3fc0_0000);
    check("mov.f32 %f9, 1.5;", "%f9", &rows, |_| 0x3fc0_0000);
    check("mov.b32 %r9, -5;", "%r9", &rows, |_| 0xffff_fffb);
}

/// What each lane gets, as the manual's pseudocode says.
fn shuffled(mode: &str, lane: u32, by: u32, c: u32) -> (u32, bool) {
    let (by, clamp, segment) = (by & 31, c & 31, c >> 8 & 31);
    let max = (lane & segment) | (clamp & !segment & 31);
    let min = lane & segment;
    let (j, ok) = match mode {
        "up" => (lane.wrapping_sub(by), lane as i32 - by as i32 >= max as i32),
        "down" => (lane + by, lane + by <= max),
        "bfly" => (lane ^ by, (lane ^ by) <= max),
        _ => {
            let j = min | (by & !segment & 31);
            (j, j <= max)
        }
    };
    (if ok { j } else { lane }, ok)
}

#[test]
fn shuffles_and_votes() {
    let rows: Vec<[u64; 3]> = (0..64).map(|i| [i * 1000 + 7, i % 5, i % 3]).collect();
    for mode in ["up", "down", "bfly", "idx"] {
        for (by, c) in [(1, 31), (16, 31), (3, 0), (2, 0x181f), (5, 0x1c1f), (1, 0x1800), (7, 15)] {
            let op = format!("shfl.sync.{mode}.b32 %r9|%p9, %r1, {by}, {c}, -1;");
            let expected: Vec<(u64, u64)> = (0..64)
                .map(|i| {
                    let (from, ok) = shuffled(mode, i % 32, by, c);
                    (u64::from(i / 32 * 32 + from) * 1000 + 7, u64::from(ok))
                })
                .collect();
            assert_eq!(apply(&op, "%r9", &rows), expected.iter().map(|e| e.0).collect::<Vec<_>>(), "{op}");
            assert_eq!(apply(&op, "%p9", &rows), expected.iter().map(|e| e.1).collect::<Vec<_>>(), "{op}");
        }
    }
    let of_warp = |f: &dyn Fn(usize, std::ops::Range<usize>) -> u64| {
        (0..64).map(|i| f(i, i / 32 * 32..i / 32 * 32 + 32)).collect::<Vec<u64>>()
    };
    let ballot = "setp.lt.u32 %p1, %r2, 2; vote.sync.ballot.b32 %r9, %p1, -1;";
    let expected = of_warp(&|_, warp| warp.clone().filter(|j| j % 5 < 2).fold(0, |m, j| m | 1 << (j % 32)));
    assert_eq!(apply(ballot, "%r9", &rows), expected);
    let any = "setp.eq.u32 %p1, %r1, 7; vote.sync.any.pred %p9, %p1, -1;";
    assert_eq!(apply(any, "%p9", &rows), of_warp(&|i, _| u64::from(i < 32)));
    let all = "setp.lt.u32 %p1, %r2, 5; vote.sync.all.pred %p9, %p1, -1;";
    assert_eq!(apply(all, "%p9", &rows), vec![1; 64]);
    let same = "match.any.sync.b32 %r9, %r2, -1;";
    let expected =
        of_warp(&|i, warp| warp.clone().filter(|j| j % 5 == i % 5).fold(0, |m, j| m | 1 << (j % 32)));
    assert_eq!(apply(same, "%r9", &rows), expected);
    let one = "match.all.sync.b32 %r9|%p9, %r2, -1;";
    assert_eq!(apply(one, "%p9", &rows), vec![0; 64]);
    for (op, fold) in [
        ("add.u32", (|a, b| a + b) as fn(u64, u64) -> u64),
        ("max.s32", |a, b| a.max(b)),
        ("min.u32", |a, b| a.min(b)),
        ("xor.b32", |a, b| a ^ b),
    ] {
        let expected =
            of_warp(&|_, warp| warp.clone().map(|j| j as u64 * 1000 + 7).reduce(fold).expect("lanes"));
        assert_eq!(apply(&format!("redux.sync.{op} %r9, %r1, -1;"), "%r9", &rows), expected, "{op}");
    }
    let leader = "elect.sync %r9|%p9, -1;";
    assert_eq!(apply(leader, "%p9", &rows), of_warp(&|i, _| u64::from(i % 32 == 0)));
    let active = "setp.lt.u32 %p1, %r2, 2; mov.u32 %r9, 0; @%p1 activemask.b32 %r9;";
    let expected = of_warp(&|i, warp| {
        if i % 5 < 2 { warp.clone().filter(|j| j % 5 < 2).fold(0, |m, j| m | 1 << (j % 32)) } else { 0 }
    });
    assert_eq!(apply(active, "%r9", &rows), expected);
}

#[test]
fn barriers_that_reduce() {
    let rows: Vec<[u64; 3]> = (0..64).map(|i| [i, 0, 0]).collect();
    assert_eq!(
        apply("setp.lt.u32 %p1, %r1, 40; barrier.red.popc.aligned.u32 %r9, 0, %p1;", "%r9", &rows),
        vec![40; 64]
    );
    assert_eq!(apply("setp.lt.u32 %p1, %r1, 40; bar.red.and.pred %p9, 0, %p1;", "%p9", &rows), vec![0; 64]);
    assert_eq!(apply("setp.lt.u32 %p1, %r1, 1; bar.red.or.pred %p9, 0, %p1;", "%p9", &rows), vec![1; 64]);
}

#[test]
fn atomics() {
    // Each thread updates one word of `x`; the result is the old value.
    let run = |op: &str, x: u32| -> (Vec<u32>, u32) {
        let body = format!(
            "{{ .reg .b32 %old; {op} mul.wide.u32 %rd3, %r0, 4; add.s64 %rd4, %rd2, %rd3; st.global.u32 [%rd4], %old; bar.sync 0;
             setp.eq.u32 %p1, %r0, 0; ld.global.u32 %r20, [%rd1]; @%p1 st.global.u32 [%rd2+128], %r20; }}"
        );
        let module = attar_ptx::Module::parse(&written(&body)).unwrap_or_else(|e| panic!("{e}"));
        let mut memory = attar_ptx::Memory::new();
        let (bx, by) = (memory.alloc("x", &x.to_le_bytes()), memory.alloc_uninit("y", 132));
        let params = [bx.into(), by.into()];
        let launch = attar_ptx::Launch {
            kernel: "k",
            grid: [1; 3],
            block: [32, 1, 1],
            dynamic_shared: 0,
            params: &params,
        };
        let options = attar_ptx::Options::checked(attar_ptx::CopyMode::Lazy);
        module.launch(&mut memory, &launch, &options).unwrap_or_else(|e| panic!("{e}"));
        let mut words: Vec<u32> = as_ints(memory.bytes(by)).iter().map(|v| *v as u32).collect();
        let last = words.pop().expect("a word");
        (words, last)
    };
    let (old, last) = run("atom.global.add.u32 %old, [%rd1], 3;", 100);
    assert_eq!((last, old[0], old[31]), (196, 100, 193));
    assert_eq!(run("atom.global.max.s32 %old, [%rd1], %r0;", 0xffff_fff0).1, 31);
    assert_eq!(run("atom.global.min.u32 %old, [%rd1], %r0;", 7).1, 0);
    assert_eq!(run("atom.global.inc.u32 %old, [%rd1], 9;", 0).1, 2);
    assert_eq!(run("atom.global.dec.u32 %old, [%rd1], 9;", 0).1, 8);
    assert_eq!(run("atom.global.exch.b32 %old, [%rd1], %r0;", 5).1, 31);
    assert_eq!(run("atom.global.cas.b32 %old, [%rd1], 5, 6;", 5).1, 6);
    assert_eq!(run("atom.global.or.b32 %old, [%rd1], %r0;", 64).1, 95);
    assert_eq!(
        run(
            "{ .reg .f32 %o; atom.global.add.f32 %o, [%rd1], 0f3F000000; mov.b32 %old, %o; }",
            1f32.to_bits()
        )
        .1,
        17f32.to_bits()
    );
    assert_eq!(
        run("atom.global.add.noftz.f16x2 %old, [%rd1], 0x3c003800;", 0).1,
        u32::from(f16::from_f32(32.0).to_bits()) << 16 | u32::from(f16::from_f32(16.0).to_bits())
    );
    assert_eq!(run("mov.u32 %old, 0; red.relaxed.gpu.global.add.u32 [%rd1], 1;", 1).1, 33);
}

#[test]
fn loads_extend_and_stores_truncate() {
    let rows: Vec<[u64; 3]> = vec![[0xf1e2_d3c4_b5a6_9788, 0, 0]; 1];
    check("ld.global.s8 %r9, [%rd4];", "%r9", &rows, |_| 0xffff_ff88);
    check("ld.global.u8 %r9, [%rd4+1];", "%r9", &rows, |_| 0x97);
    check("ld.global.s16 %r9, [%rd4+2];", "%r9", &rows, |_| 0xffff_b5a6);
    check("ld.global.s32 %rd19, [%rd4+4];", "%rd19", &rows, |_| 0xffff_ffff_f1e2_d3c4);
    check("ld.global.nc.L1::no_allocate.v2.u32 {%r8, %r9}, [%rd4];", "%r9", &rows, |_| 0xf1e2_d3c4);
    check(
        ".shared .align 8 .b8 s[8]; st.shared.u64 [s], %rd11; bar.warp.sync 1; ld.shared.u16 %h9, [s+6];",
        "%h9",
        &rows,
        |_| 0xf1e2,
    );
    // Generic addresses lead to the space they point into.
    let generic = ".shared .align 8 .b8 s[8]; mov.u64 %rd20, s; cvta.shared.u64 %rd21, %rd20; st.u32 [%rd21+4], %r1;
                   cvta.to.shared.u64 %rd22, %rd21; ld.shared.u32 %r9, [%rd22+4]; isspacep.shared %p1, %rd21; @!%p1 trap;";
    check(generic, "%r9", &rows, |_| 0xb5a6_9788);
    let local = ".local .align 8 .b8 l[8]; mov.u64 %rd20, l; cvta.local.u64 %rd21, %rd20; st.u32 [%rd21], %r1; ld.local.u32 %r9, [l];";
    check(local, "%r9", &rows, |_| 0xb5a6_9788);
}

#[test]
fn branches_by_index() {
    let rows: Vec<[u64; 3]> = (0..64).map(|i| [i % 4, 0, 0]).collect();
    let body =
        "mov.u32 %r9, 0; TABLE: .branchtargets A, B, C, D; brx.idx %r1, TABLE; A: mov.u32 %r9, 10; bra END;
                B: mov.u32 %r9, 20; bra END; C: mov.u32 %r9, 30; D: add.u32 %r9, %r9, 1; END:";
    check(body, "%r9", &rows, |[a, ..]| [10, 20, 31, 1][a as usize]);
}
