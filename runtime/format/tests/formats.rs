//! Laws every weight format keeps: sizes, packing and unpacking, decoding.

use attar_format::described::Codes;
use attar_format::{Description, Encoded, Format, FormatRef, PackedLayout, Scale, Value, formats};
use proptest::prelude::*;

/// Codes, scales and table drawn at random, within what the format allows.
fn encoded() -> impl Strategy<Value = Encoded> {
    (0..formats::ALL.len(), 1usize..40, 1usize..5, any::<u64>()).prop_map(|(f, n, groups, seed)| {
        let format = formats::ALL[f];
        let mut state = seed | 1;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        // Uncompressed formats hold any K, odd ones too.
        let k = if format.group == 1 { groups * 7 + (seed % 3) as usize } else { groups * format.group };
        let mut e = Encoded::zeros(format, n, k).unwrap();
        match format.value {
            Value::Float(_) => {
                let weights: Vec<f32> = (0..n * k).map(|_| next() as i32 as f32 / 1e6).collect();
                e = Encoded::from_f32(format, n, k, &weights).unwrap();
            }
            Value::Int8 => e.codes.iter_mut().for_each(|c| *c = ((next() % 255) as i32 - 127) as i8 as u8),
            Value::Table(table) => {
                let entries = 1 << table.bits;
                e.codes.iter_mut().for_each(|c| *c = (next() % entries) as u8);
                e.table = std::array::from_fn(|i| if i < entries as usize { next() as i8 } else { 0 });
                e.shift = next() as i8;
            }
        }
        e.row_scale.iter_mut().for_each(|s| *s = next() as i32 as f32 / 1e9);
        match format.scale {
            Scale::None => {}
            // Any finite bf16.
            Scale::Bf16 => e.field.iter_mut().for_each(|s| *s = (next() as u16) & 0xbfff),
            Scale::RowF32Field8 { .. } => e.field.iter_mut().for_each(|s| *s = next() as u16 & 0xff),
        }
        e
    })
}

/// Bits of an index into a table; 0 without a table.
fn format_bits(e: &Encoded) -> usize {
    e.format.table().map_or(0, |t| t.bits)
}

proptest! {
    #[test]
    fn unpacking_undoes_packing(e in encoded()) {
        let bytes = e.pack().unwrap();
        let layout = PackedLayout::new(e.format, e.n, e.k).unwrap();
        prop_assert_eq!(bytes.len(), layout.total_bytes());
        prop_assert_eq!(Encoded::unpack(e.format, e.n, e.k, &bytes).unwrap(), e);
    }

    #[test]
    fn decoded_weights_are_scale_times_code(e in encoded()) {
        let decoded = e.decode();
        prop_assert!(decoded.iter().all(|w| w.is_finite()));
        if e.groups() > 0 {
            for n in 0..e.n {
                for g in 0..e.groups() {
                    let (scale, shift) = e.scale(n, g);
                    let most = match e.format.value {
                        Value::Int8 => 127,
                        _ => e.table.iter().map(|t| (i32::from(*t) + shift).abs()).max().unwrap_or(0),
                    };
                    let bound = scale.abs() * most as f32;
                    let group = &decoded[n * e.k + g * e.format.group..][..e.format.group];
                    prop_assert!(group.iter().all(|w| w.abs() <= bound));
                }
            }
        }
    }

    #[test]
    fn rows_stack_and_come_apart(e in encoded()) {
        let joined = Encoded::concat_rows(&[&e, &e]).unwrap();
        prop_assert_eq!(joined.n, 2 * e.n);
        let rows: Vec<usize> = (e.n..2 * e.n).collect();
        prop_assert_eq!(joined.select_rows(&rows), e.clone());
        let twice: Vec<f32> = [e.decode(), e.decode()].concat();
        prop_assert_eq!(joined.decode(), twice);
    }

    #[test]
    fn positions_never_collide(e in encoded()) {
        let layout = PackedLayout::new(e.format, e.n, e.k).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        let unit = (e.format.code_bits() / 8).max(1);
        for n in 0..e.n {
            for k in 0..e.k {
                if format_bits(&e) > 0 {
                    let mut bits = 0;
                    for part in layout.code_parts(n, k) {
                        prop_assert!(part.at < layout.total_bytes());
                        for bit in 0..part.mask.count_ones() {
                            bits |= 1 << (part.low + bit);
                            prop_assert!(seen.insert((part.at, part.shift + bit)));
                        }
                    }
                    prop_assert_eq!(bits, (1u32 << format_bits(&e)) - 1);
                } else {
                    let at = layout.code_position(n, k);
                    prop_assert!(at + unit <= layout.total_bytes());
                    prop_assert!(seen.insert((at, 0)));
                }
            }
            for g in 0..layout.groups {
                let at = layout.field_position(n, g);
                prop_assert!(at + e.format.field_bytes() <= layout.total_bytes());
                prop_assert!(seen.insert((at, 0)));
            }
        }
    }

    #[test]
    fn uncompressed_formats_keep_their_values(weights in prop::collection::vec(-1e30f32..1e30, 1..60)) {
        let k = weights.len();
        let exact = Encoded::from_f32(&formats::F32, 1, k, &weights).unwrap();
        prop_assert_eq!(exact.decode(), weights.clone());
        for (w, d) in weights.iter().zip(Encoded::from_f32(&formats::BF16, 1, k, &weights).unwrap().decode()) {
            prop_assert!((w - d).abs() <= w.abs() / 256.0, "{} became {}", w, d);
        }
    }
}

#[test]
fn sizes_are_what_documents_say() {
    let bits = |f: FormatRef| f.bits_per_weight();
    assert_eq!(
        formats::ALL.iter().map(|f| bits(f)).collect::<Vec<_>>(),
        [32.0, 16.0, 8.5, 6.25, 5.25, 4.25, 3.25, 2.25]
    );
    let bytes = |f: FormatRef, n, k| PackedLayout::new(f, n, k).unwrap().total_bytes();
    assert_eq!(bytes(&formats::F32, 16, 64), 16 * 64 * 4);
    assert_eq!(bytes(&formats::BF16, 16, 64), 16 * 64 * 2);
    // Two groups of 16 bf16 scales fill one line of 64 bytes.
    assert_eq!(bytes(&formats::W8, 16, 64), 64 + 16 * 64);
    // Header, row scales, two groups of 16 fields padded to 64, codes.
    assert_eq!(bytes(&formats::N4, 16, 64), 64 + 64 + 64 + 16 * 64 / 2);
    // 64 entries and the shift take two lines of header.
    assert_eq!(bytes(&formats::N6, 16, 64), 128 + 64 + 64 + 16 * 64 * 6 / 8);
    assert_eq!(bytes(&formats::N5, 16, 64), 64 + 64 + 64 + 16 * 64 * 5 / 8);
    assert_eq!(bytes(&formats::N3, 16, 64), 64 + 64 + 64 + 16 * 64 * 3 / 8);
    assert_eq!(bytes(&formats::N2, 16, 64), 64 + 64 + 64 + 16 * 64 * 2 / 8);
    // A last block of one channel takes a whole block.
    assert_eq!(bytes(&formats::N4, 17, 64), 64 + 2 * (64 + 64 + 16 * 64 / 2));
    assert_eq!(bytes(&formats::BF16, 1, 3), 2 * 64);
}

#[test]
fn impossible_shapes_are_refused() {
    for format in formats::ALL.iter().copied() {
        assert!(Encoded::zeros(format, 0, 32).is_err() && Encoded::zeros(format, 1, 0).is_err());
        assert!(PackedLayout::new(format, usize::MAX, 32).is_none());
        assert!(PackedLayout::new(format, 1, usize::MAX / 32 * 32).is_none());
        let e = Encoded::unpack(format, 2, 32, &[0; 5]).unwrap_err();
        assert!(e.to_string().contains("packed tensor"), "{e}");
    }
    for format in formats::ALL.iter().copied().filter(|f| !f.is_uncompressed()) {
        let e = Encoded::zeros(format, 4, 33).unwrap_err();
        assert!(e.to_string().contains("multiple of 32"), "{e}");
        assert!(Encoded::from_f32(format, 1, 32, &[0.0; 32]).is_err());
    }
    assert!(Encoded::from_f32(&formats::F32, 2, 2, &[0.0; 3]).is_err());
}

#[test]
fn matrices_of_different_kinds_do_not_join() {
    let of = |format: FormatRef, k| Encoded::zeros(format, 1, k).unwrap();
    let mut other_table = of(&formats::N4, 32);
    other_table.table[3] = 7;
    let pairs = [
        (of(&formats::W8, 32), of(&formats::N4, 32), "format"),
        (of(&formats::W8, 32), of(&formats::W8, 64), "K"),
        (of(&formats::N4, 32), other_table, "table"),
    ];
    for (a, b, what) in &pairs {
        let e = Encoded::concat_rows(&[a, b]).unwrap_err();
        assert!(e.to_string().contains(what), "{e}");
    }
    assert!(Encoded::concat_rows(&[]).is_err());
}

#[test]
fn n4_decodes_by_its_formula() {
    let mut e = Encoded::zeros(&formats::N4, 1, 64).unwrap();
    e.row_scale[0] = 0.5;
    // Scale +3 and choice 2; scale −31 and choice 0.
    (e.field[0], e.field[1]) = ((35 << 2) | 2, 1 << 2);
    (e.codes[0], e.codes[1], e.codes[32]) = (15, 0, 15);
    let w = e.decode();
    assert_eq!(w[0], 0.5 * 3.0 * (110.0 + 8.0));
    assert_eq!(w[1], 0.5 * 3.0 * (-127.0 + 8.0));
    assert_eq!(w[32], 0.5 * -31.0 * 110.0);
}

/// Every kind of format that can be described, and the built-in ones.
fn all_kinds() -> Vec<FormatRef> {
    let mut all: Vec<FormatRef> = formats::ALL.iter().copied().filter(|f| !f.is_uncompressed()).collect();
    for bits in 2..=6usize {
        for (i, scale) in [
            Scale::Bf16,
            Scale::RowF32Field8 { bias: 0, choice_bits: 2 },
            Scale::RowF32Field8 { bias: 32, choice_bits: 2 },
            Scale::RowF32Field8 { bias: 16, choice_bits: 2 },
        ]
        .into_iter()
        .enumerate()
        {
            let (count, shift) = (1i32 << bits, if i < 2 { 0 } else { 2 });
            let entries = (0..count).map(|e| (-100 + 200 * e / (count - 1)) as i8).collect();
            let codes = Codes::Table { bits, entries, shift };
            let name = format!("kind_{bits}_{i}");
            let source = "a test".to_owned();
            all.push(Description { name, source, codes, group: 32, scale }.register().unwrap());
        }
    }
    all
}

#[test]
fn the_reference_encoder_is_near_in_every_format() {
    let mut state = 7u64;
    let mut normal = || {
        let mut sum = 0.0;
        for _ in 0..12 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            sum += (state >> 40) as f32 / (1u64 << 24) as f32;
        }
        (sum - 6.0) * 0.02
    };
    let weights: Vec<f32> = (0..20 * 96).map(|_| normal()).collect();
    let square: f32 = weights.iter().map(|w| w * w).sum();
    for format in all_kinds() {
        let e = Encoded::nearest(format, 20, 96, &weights, None).unwrap();
        assert_eq!(Encoded::unpack(format, 20, 96, &e.pack().unwrap()).unwrap(), e, "{}", format.name);
        let error: f32 = e.decode().iter().zip(&weights).map(|(d, w)| (d - w) * (d - w)).sum();
        let relative = (error / square).sqrt();
        // Evenly spaced codes over +-3 deviations: a step of 6 / 2^bits, an error of a step over the root of 12.
        let bound = 1.25 * 6.0 / f32::from(1u16 << format.code_bits()) / 12f32.sqrt() + 0.01;
        assert!(relative < bound, "{}: {relative} and not {bound}", format.name);
        let zeros = Encoded::nearest(format, 1, 32, &[0.0; 32], None).unwrap();
        assert!(zeros.decode().iter().all(|w| *w == 0.0), "{}", format.name);
    }
    // What counts more is nearer.
    let mut importance = vec![1.0; 96];
    importance[5] = 1e4;
    let column = |importance: Option<&[f32]>| -> f32 {
        let e = Encoded::nearest(&formats::N4, 20, 96, &weights, importance).unwrap().decode();
        (0..20).map(|n| (e[n * 96 + 5] - weights[n * 96 + 5]).powi(2)).sum()
    };
    assert!(column(Some(&importance)) < column(None));
    assert!(Encoded::nearest(&formats::N4, 20, 96, &weights, Some(&[1.0])).is_err());
}

#[test]
fn names_find_their_format() {
    for format in formats::ALL {
        assert_eq!(attar_format::by_name(format.name).map(|f: &Format| f.name), Some(format.name));
    }
    assert!(attar_format::by_name("n7").is_none());
}
