//! Matrix instructions in all their types and layouts. Fragments and layouts are written down here as the PTX manual
//! gives them, element by element, and the products in plain loops.

mod harness;

use half::{bf16, f16};
use harness::*;

/// An element type, with the codes of small whole numbers in it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Element {
    F16,
    Bf16,
    Tf32,
    E4m3,
    S8,
    U8,
    S4,
}

impl Element {
    fn bits(self) -> usize {
        match self {
            Element::F16 | Element::Bf16 => 16,
            Element::Tf32 => 32,
            Element::E4m3 | Element::S8 | Element::U8 => 8,
            Element::S4 => 4,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
            Element::Tf32 => "tf32",
            Element::E4m3 => "e4m3",
            Element::S8 => "s8",
            Element::U8 => "u8",
            Element::S4 => "s4",
        }
    }

    /// Some number the type holds exactly.
    fn number(self, i: usize) -> f64 {
        let spread = (i * 37 + i / 7 * 11) % 97;
        match self {
            Element::U8 => (spread * 2) as f64,
            Element::S4 => (spread % 16) as f64 - 8.0,
            Element::E4m3 => ((spread % 15) as f64 - 7.0) / 4.0,
            _ => spread as f64 - 48.0,
        }
    }

    fn code(self, x: f64) -> u32 {
        match self {
            Element::F16 => u32::from(f16::from_f64(x).to_bits()),
            Element::Bf16 => u32::from(bf16::from_f64(x).to_bits()),
            Element::Tf32 => (x as f32).to_bits(),
            Element::E4m3 => {
                // By search: sign, four bits of exponent with bias 7, three of mantissa.
                let value = |c: u32| {
                    let (e, m) = (c >> 3 & 15, f64::from(c & 7) / 8.0);
                    let size = if e == 0 { m * 2f64.powi(-6) } else { (1.0 + m) * 2f64.powi(e as i32 - 7) };
                    if c >= 128 { -size } else { size }
                };
                (0..255).filter(|c| c & 127 != 127).find(|c| value(*c) == x).expect("a number of the type")
            }
            Element::S8 | Element::U8 => x as i32 as u32 & 0xff,
            Element::S4 => x as i32 as u32 & 15,
        }
    }
}

/// Words that hold `codes` of `bits` bits, lowest first.
fn words(codes: &[u32], bits: usize) -> Vec<u32> {
    codes.chunks(32 / bits).map(|c| c.iter().enumerate().fold(0, |w, (i, c)| w | c << (i * bits))).collect()
}

/// `mma.sync` of one warp on matrices of whole numbers.
fn check_mma(a: Element, b: Element, sum: &str, depth: usize) {
    let (bits, per) = (a.bits(), 32 / a.bits());
    let left: Vec<Vec<f64>> =
        (0..16).map(|r| (0..depth).map(|k| a.number(r * depth + k)).collect()).collect();
    let right: Vec<Vec<f64>> =
        (0..8).map(|n| (0..depth).map(|k| b.number(n * depth + k + 5)).collect()).collect();
    let before = |r: usize, n: usize| (r * 8 + n) as f64;
    let mut x = Vec::new();
    let (mut n_a, mut n_b) = (0, 0);
    for lane in 0..32 {
        let (group, thread) = (lane / 4, lane % 4);
        // Elements a0, a1, …: runs of `per` alternate between the rows, and the second half is further along.
        let a_codes: Vec<u32> = (0..16 * depth / 32)
            .map(|i| {
                let row = if i / per % 2 == 0 { group } else { group + 8 };
                let column = thread * per + i % per + if i < 2 * per { 0 } else { 4 * per };
                a.code(left[row][column])
            })
            .collect();
        let b_codes: Vec<u32> = (0..8 * depth / 32)
            .map(|i| b.code(right[group][thread * per + i % per + i / per * 4 * per]))
            .collect();
        let (a_words, b_words) = (words(&a_codes, bits), words(&b_codes, bits));
        (n_a, n_b) = (a_words.len(), b_words.len());
        let sums = [
            (group, thread * 2),
            (group, thread * 2 + 1),
            (group + 8, thread * 2),
            (group + 8, thread * 2 + 1),
        ];
        let c = sums.map(|(r, n)| before(r, n));
        let c_words = match sum {
            "f32" => c.map(|v| (v as f32).to_bits()).to_vec(),
            "f16" => words(&c.map(|v| u32::from(f16::from_f64(v).to_bits())), 16),
            _ => c.map(|v| v as i32 as u32).to_vec(),
        };
        x.extend(a_words);
        x.extend(b_words);
        x.extend(c_words);
    }
    let n_c = if sum == "f16" { 2 } else { 4 };
    let row = n_a + n_b + n_c;
    let mut body = format!("mul.wide.u32 %rd3, %r0, {}; add.s64 %rd4, %rd1, %rd3;\n", row * 4);
    for i in 0..row {
        body += &format!("ld.global.u32 %r{}, [%rd4+{}];\n", i + 1, i * 4);
    }
    let list = |from: usize, n: usize| {
        let names: Vec<String> = (from..from + n).map(|i| format!("%r{i}")).collect();
        format!("{{{}}}", names.join(", "))
    };
    // Registers of 32 bits serve for every type.
    body += &format!(
        "mma.sync.aligned.m16n8k{depth}.row.col.{sum}.{}.{}.{sum} {}, {}, {}, {};\n",
        a.name(),
        b.name(),
        list(40, n_c),
        list(1, n_a),
        list(1 + n_a, n_b),
        list(1 + n_a + n_b, n_c)
    );
    body += &format!("mul.wide.u32 %rd5, %r0, {}; add.s64 %rd6, %rd2, %rd5;\n", n_c * 4);
    for i in 0..n_c {
        body += &format!("st.global.u32 [%rd6+{}], %r{};\n", i * 4, 40 + i);
    }
    let bytes: Vec<u8> = x.iter().flat_map(|w| w.to_le_bytes()).collect();
    let y = run_written(&body, 1, 32, &bytes, 32 * n_c * 4).unwrap_or_else(|e| panic!("{e}"));
    let y: Vec<u32> = y.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four"))).collect();
    for lane in 0..32 {
        for i in 0..4 {
            let (r, n) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
            let exact = before(r, n) + left[r].iter().zip(&right[n]).map(|(a, b)| a * b).sum::<f64>();
            let got = match sum {
                "f32" => f64::from(f32::from_bits(y[lane * 4 + i])),
                "f16" => f16::from_bits((y[lane * 2 + i / 2] >> (i % 2 * 16)) as u16).to_f64(),
                _ => f64::from(y[lane * 4 + i] as i32),
            };
            let expected = if sum == "f16" { f16::from_f64(exact).to_f64() } else { exact };
            assert_eq!(got, expected, "{a:?} {b:?} {sum} k{depth} at {r}, {n}");
        }
    }
}

#[test]
fn products_of_a_warp() {
    check_mma(Element::Bf16, Element::Bf16, "f32", 16);
    check_mma(Element::Bf16, Element::Bf16, "f32", 8);
    check_mma(Element::F16, Element::F16, "f32", 16);
    check_mma(Element::F16, Element::F16, "f16", 16);
    check_mma(Element::F16, Element::F16, "f16", 8);
    check_mma(Element::Tf32, Element::Tf32, "f32", 8);
    check_mma(Element::Tf32, Element::Tf32, "f32", 4);
    check_mma(Element::E4m3, Element::E4m3, "f32", 32);
    check_mma(Element::S8, Element::S8, "s32", 32);
    check_mma(Element::S8, Element::S8, "s32", 16);
    check_mma(Element::U8, Element::S8, "s32", 32);
    check_mma(Element::S4, Element::S4, "s32", 64);
}

/// How a matrix lies in shared memory.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// 0, 32, 64 or 128 bytes.
    swizzle: usize,
    /// Rows run along memory (M- or N-major) instead of the depth (K-major).
    transposed: bool,
    leading: usize,
    stride: usize,
}

impl Layout {
    /// Byte offset of an element: the canonical layouts, `((…)):((…))` of the manual, in units of elements, and the
    /// swizzle of their addresses.
    fn offset(&self, element_bytes: usize, outer: usize, k: usize) -> usize {
        let t = 16 / element_bytes;
        let (lbo, sbo) = (self.leading / element_bytes, self.stride / element_bytes);
        let c = self.swizzle / 16;
        let at = match (self.transposed, self.swizzle) {
            // ((8,m),(T,2)):((1T,SBO),(1,LBO))
            (false, 0) => outer % 8 * t + outer / 8 * sbo + k % t + k / t * lbo,
            // ((8,m),(T,2)):((cT,SBO),(1,T))
            (false, _) => outer % 8 * c * t + outer / 8 * sbo + k % t + k / t * t,
            // ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))
            (true, 0) => outer % t + outer / t * sbo + k % 8 * t + k / 8 * lbo,
            // ((T,c,m),(8,k)):((1,T,LBO),(cT,SBO))
            (true, _) => outer % t + outer / t % c * t + outer / t / c * lbo + k % 8 * c * t + k / 8 * sbo,
        };
        let byte = at * element_bytes;
        match self.swizzle {
            128 => byte ^ (byte >> 7 & 7) << 4,
            64 => byte ^ (byte >> 7 & 3) << 4,
            32 => byte ^ (byte >> 7 & 1) << 4,
            _ => byte,
        }
    }

    fn descriptor(&self) -> u64 {
        let mode: u64 = match self.swizzle {
            128 => 1,
            64 => 2,
            32 => 3,
            _ => 0,
        };
        (self.leading as u64 >> 4) << 16 | (self.stride as u64 >> 4) << 32 | mode << 62
    }
}

/// A layout for `outer` rows: pieces apart from each other, so that swapped strides do not go unnoticed.
fn layout(swizzle: usize, transposed: bool, outer: usize) -> Layout {
    match (transposed, swizzle) {
        (false, 0) => Layout { swizzle, transposed, leading: outer * 16 + 128, stride: 128 },
        (false, _) => Layout { swizzle, transposed, leading: 16, stride: swizzle * 8 },
        (true, 0) => Layout { swizzle, transposed, leading: outer * 16 + 256, stride: 128 },
        (true, _) => Layout { swizzle, transposed, leading: swizzle * 16, stride: swizzle * 8 },
    }
}

struct Case {
    element: Element,
    columns: usize,
    sum: &'static str,
    /// Absent where A is in registers.
    a: Option<Layout>,
    b: Layout,
    accumulate: bool,
    negate: bool,
}

/// `wgmma` of one warpgroup on whole numbers.
fn check_wgmma(case: &Case) {
    const B_AT: usize = 16384;
    const BYTES: usize = 49152;
    let Case { element, columns, sum, a, b, accumulate, negate } = case;
    let bytes = element.bits() / 8;
    let depth = 32 / bytes;
    let left: Vec<Vec<f64>> =
        (0..64).map(|r| (0..depth).map(|k| element.number(r * depth + k)).collect()).collect();
    let right: Vec<Vec<f64>> =
        (0..*columns).map(|n| (0..depth).map(|k| element.number(n * depth + k + 3)).collect()).collect();
    let mut image = vec![0u8; BYTES];
    let mut place = |at: usize, value: f64| {
        image[at..at + bytes].copy_from_slice(&element.code(value).to_le_bytes()[..bytes]);
    };
    for k in 0..depth {
        for (r, row) in left.iter().enumerate() {
            if let Some(a) = a {
                place(a.offset(bytes, r, k), row[k]);
            }
        }
        for (n, row) in right.iter().enumerate() {
            place(B_AT + b.offset(bytes, n, k), row[k]);
        }
    }
    // Behind the image, registers of A: four words for each thread.
    let per = 4 / bytes;
    for t in 0..128 {
        for q in 0..4 {
            let row = t / 32 * 16 + t % 32 / 4 + q % 2 * 8;
            let column = t % 4 * per + q / 2 * 4 * per;
            let codes: Vec<u32> = (0..per).map(|i| element.code(left[row][column + i])).collect();
            image.extend(words(&codes, element.bits())[0].to_le_bytes());
        }
    }
    let n_d = if *sum == "f16" { columns / 4 } else { columns / 2 };
    let start = match *sum {
        "f32" => 3f32.to_bits(),
        "f16" => u32::from(f16::from_f32(3.0).to_bits()) * 0x1_0001,
        _ => 3,
    };
    let d: Vec<String> = (0..n_d).map(|i| format!("%d{i}")).collect();
    let left_operand = if a.is_some() { "%rd10".to_owned() } else { "{%r20, %r21, %r22, %r23}".to_owned() };
    let sign = if *negate { -1 } else { 1 };
    let transposed = |l: &Layout| u32::from(l.transposed);
    let flags = match (*sum, element.bits(), a) {
        ("s32", ..) => String::new(),
        (_, 16, Some(a)) => format!(", {sign}, 1, {}, {}", transposed(a), transposed(b)),
        (_, 16, None) => format!(", {sign}, 1, {}", transposed(b)),
        _ => format!(", {sign}, 1"),
    };
    let (ty, k) = (element.name(), depth);
    let body = format!(
        ".reg .b32 %d<{n_d}>; .shared .align 1024 .b8 s[{BYTES}];
         mov.u32 %r1, %r0;
         COPY: shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd1, %rd3;
         ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd4]; mov.u32 %r7, s; add.u32 %r8, %r7, %r2;
         st.shared.v4.u32 [%r8], {{%r3, %r4, %r5, %r6}}; add.u32 %r1, %r1, 128; setp.lt.u32 %p1, %r1, {};
         @%p1 bra COPY;
         mul.wide.u32 %rd3, %r0, 16; add.s64 %rd4, %rd1, %rd3;
         ld.global.v4.u32 {{%r20, %r21, %r22, %r23}}, [%rd4+{BYTES}];
         fence.proxy.async; bar.sync 0;
         shr.u32 %r9, %r7, 4; cvt.u64.u32 %rd5, %r9; mov.u64 %rd6, {}; or.b64 %rd10, %rd5, %rd6;
         add.s64 %rd7, %rd5, {}; mov.u64 %rd8, {}; or.b64 %rd11, %rd7, %rd8;
         {} wgmma.fence.sync.aligned; setp.eq.u32 %p2, %r7, {};
         wgmma.mma_async.sync.aligned.m64n{columns}k{k}.{sum}.{ty}.{ty} {{{}}}, {left_operand}, %rd11, %p2{flags};
         wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
         mul.wide.u32 %rd12, %r0, {}; add.s64 %rd13, %rd2, %rd12; {}",
        BYTES / 16,
        a.map_or(0, |a| a.descriptor()),
        B_AT / 16,
        b.descriptor(),
        d.iter().map(|d| format!("mov.b32 {d}, {start};")).collect::<String>(),
        // Shared memory begins at 1024.
        if *accumulate { 1024 } else { 0 },
        d.join(", "),
        n_d * 4,
        d.iter().enumerate().map(|(i, d)| format!("st.global.u32 [%rd13+{}], {d};", i * 4)).collect::<String>(),
    );
    let y = run_written(&body, 1, 128, &image, 128 * n_d * 4).unwrap_or_else(|e| panic!("{e}"));
    let y: Vec<u32> = y.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four"))).collect();
    for t in 0..128 {
        for i in 0..columns / 2 {
            let (row, column) = (t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2);
            let product: f64 = left[row].iter().zip(&right[column]).map(|(a, b)| a * b).sum();
            let exact = if *negate { -product } else { product } + if *accumulate { 3.0 } else { 0.0 };
            let got = match *sum {
                "f32" => f64::from(f32::from_bits(y[t * n_d + i])),
                "f16" => f16::from_bits((y[t * n_d + i / 2] >> (i % 2 * 16)) as u16).to_f64(),
                _ => f64::from(y[t * n_d + i] as i32),
            };
            let expected = if *sum == "f16" { f16::from_f64(exact).to_f64() } else { exact };
            assert_eq!(got, expected, "{element:?} n{columns} {a:?} {b:?} at {row}, {column}");
        }
    }
}

#[test]
fn layouts_in_shared_memory() {
    for swizzle_a in [0, 32, 64, 128] {
        for swizzle_b in [0, 32, 64, 128] {
            for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
                let a = Some(layout(swizzle_a, transpose_a, 64));
                let b = layout(swizzle_b, transpose_b, 64);
                let element = if transpose_a { Element::F16 } else { Element::Bf16 };
                check_wgmma(&Case {
                    element,
                    columns: 64,
                    sum: "f32",
                    a,
                    b,
                    accumulate: true,
                    negate: false,
                });
            }
        }
    }
}

#[test]
fn types_and_widths_of_warpgroup_products() {
    let case = |element, columns, sum, in_registers| Case {
        element,
        columns,
        sum,
        a: if in_registers { None } else { Some(layout(128, false, 64)) },
        b: layout(128, false, columns),
        accumulate: false,
        negate: false,
    };
    for columns in [8, 16, 24, 128, 256] {
        check_wgmma(&case(Element::Bf16, columns, "f32", false));
        check_wgmma(&case(Element::Bf16, columns, "f32", true));
    }
    for in_registers in [false, true] {
        check_wgmma(&case(Element::S8, 64, "s32", in_registers));
        check_wgmma(&case(Element::U8, 32, "s32", in_registers));
        check_wgmma(&case(Element::Tf32, 64, "f32", in_registers));
        check_wgmma(&case(Element::E4m3, 64, "f32", in_registers));
        check_wgmma(&case(Element::F16, 64, "f16", in_registers));
    }
    check_wgmma(&Case { accumulate: true, negate: true, ..case(Element::Bf16, 32, "f32", false) });
    check_wgmma(&Case { accumulate: true, ..case(Element::F16, 32, "f16", false) });
}

/// The four matrices of `ldmatrix.x4` and back by `stmatrix`, transposed or not.
#[test]
fn matrices_come_and_go() {
    for (load, store) in [("", ""), (".trans", ""), ("", ".trans"), (".trans", ".trans")] {
        // Rows of eight halves; lane l gives the address of row l.
        let body = format!(
            ".shared .align 16 .b8 s[1024]; mov.u32 %r1, s; shl.b32 %r2, %r0, 4; add.u32 %r3, %r1, %r2;
             mul.wide.u32 %rd3, %r0, 16; add.s64 %rd4, %rd1, %rd3; ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd4];
             st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}}; bar.warp.sync -1;
             ldmatrix.sync.aligned.m8n8.x4{load}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r3];
             stmatrix.sync.aligned.m8n8.x4{store}.shared.b16 [%r3+512], {{%r10, %r11, %r12, %r13}}; bar.warp.sync -1;
             ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3+512]; add.s64 %rd5, %rd2, %rd3;
             st.global.v4.u32 [%rd5], {{%r4, %r5, %r6, %r7}};"
        );
        let halves: Vec<u16> = (0..256).collect();
        let bytes: Vec<u8> = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
        let y = run_written(&body, 1, 32, &bytes, 512).unwrap_or_else(|e| panic!("{e}"));
        let got: Vec<u16> = y.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        let turned = |i: usize| i / 64 * 64 + i % 8 * 8 + i % 64 / 8;
        let expected: Vec<u16> =
            (0..256).map(|i| halves[if load == store { i } else { turned(i) }]).collect();
        assert_eq!(got, expected, "{load} {store}");
    }
    let turn = "mul.wide.u32 %rd3, %r0, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3; ld.global.u32 %r1, [%rd4];
                movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.u32 [%rd5], %r2;";
    let bytes: Vec<u8> = (0..64u16).flat_map(|h| h.to_le_bytes()).collect();
    let y = run_written(turn, 1, 32, &bytes, 128).unwrap_or_else(|e| panic!("{e}"));
    let expected: Vec<u8> = (0..64u16).flat_map(|i| (i % 8 * 8 + i / 8).to_le_bytes()).collect();
    assert_eq!(y, expected);
}
