//! Inner functions of linear kernels, instruction by instruction: the dot products meant and no others, nothing spilled in
//! inner loops, clean upper halves at the end.

use attar_artifact::manifest::KvType;
use attar_codegen_cpu::{Target, compile_blob, disassemble_inners};
use attar_format::{FormatRef, formats};
use attar_kernel::{Activation, Epilogue, KernelSpec, LinearSpec, QkvEpilogue, RowTile};

const LEVELS: [Target; 4] =
    [Target::X86_64V3, Target::X86_64V3Avxvnni, Target::X86_64V4, Target::SapphireRapids];
const ROW_TILES: [RowTile; 3] = [RowTile::One, RowTile::Small, RowTile::Many];

/// One inner function.
struct Function {
    /// Offsets and instructions, in order.
    lines: Vec<(u64, String)>,
}

impl Function {
    fn new(text: &str) -> Function {
        let lines = text.lines().map(|line| {
            let (offset, instruction) = line.split_once(' ').expect("an offset");
            (u64::from_str_radix(offset, 16).expect("hexadecimal"), instruction.to_owned())
        });
        Function { lines: lines.collect() }
    }

    /// Instructions of each loop that holds no other.
    fn inner_loops(&self) -> Vec<&[(u64, String)]> {
        let back: Vec<(usize, usize)> = self
            .lines
            .iter()
            .enumerate()
            .filter_map(|(i, (offset, instruction))| {
                let target = instruction.strip_prefix('j')?.split_whitespace().last()?.strip_suffix('h')?;
                let target = u64::from_str_radix(target, 16).ok()?;
                let start = self.lines.iter().position(|(at, _)| *at == target)?;
                (target <= *offset).then_some((start, i))
            })
            .collect();
        let holds_no_other = |(start, end): &(usize, usize)| {
            !back.iter().any(|(s, e)| (s, e) != (start, end) && s >= start && e <= end)
        };
        back.iter().filter(|l| holds_no_other(l)).map(|(start, end)| &self.lines[*start..=*end]).collect()
    }
}

fn functions(target: Target, spec: &LinearSpec) -> Vec<Function> {
    let texts = disassemble_inners(target, &KernelSpec::Linear(spec.clone())).unwrap();
    texts.iter().map(|t| Function::new(t)).collect()
}

fn count(lines: &[(u64, String)], mnemonic: &str) -> usize {
    lines.iter().filter(|(_, i)| i.split(' ').next() == Some(mnemonic)).count()
}

/// How many `mnemonic` each inner loop has that has any, in ascending order.
fn counts(functions: &[Function], mnemonic: &str) -> Vec<usize> {
    let loops = functions.iter().flat_map(Function::inner_loops);
    let mut counts: Vec<usize> = loops.map(|l| count(l, mnemonic)).filter(|n| *n > 0).collect();
    counts.sort_unstable();
    counts.dedup();
    counts
}

fn specs() -> Vec<LinearSpec> {
    let mut specs = Vec::new();
    for format in formats::ALL {
        for rows in ROW_TILES {
            for (epilogue, n) in [
                (Epilogue::Store, 64),
                (Epilogue::Residual, 35),
                (Epilogue::Swiglu { width: 64, out: Activation::F32 }, 128),
                (Epilogue::Swiglu { width: 64, out: Activation::Int8 }, 128),
            ] {
                for k in [32, 160, 800] {
                    specs.push(LinearSpec { format, n, k, rows, bias: false, epilogue: epilogue.clone() });
                }
            }
            for kv in [KvType::F32, KvType::F16] {
                let qkv =
                    QkvEpilogue { heads: 2, kv_heads: 1, head_dim: 128, qk_norm: None, kv, page_len: 32 };
                let epilogue = Epilogue::Qkv(qkv);
                specs.push(LinearSpec { format, n: 512, k: 32, rows, bias: false, epilogue });
            }
        }
    }
    specs
}

#[test]
fn inner_functions_are_whole_and_keep_to_registers() {
    for target in LEVELS {
        for spec in specs() {
            let name = format!("{} {}", target.name(), KernelSpec::Linear(spec.clone()).name());
            let functions = functions(target, &spec);
            assert!(!functions.is_empty(), "{name}: nothing was assembled");
            for function in &functions {
                let all: Vec<&str> = function.lines.iter().map(|(_, i)| i.as_str()).collect();
                assert!(all.ends_with(&["vzeroupper", "ret"]), "{name} ends in {:?}", all.last());
                assert!(!all.iter().any(|i| i.contains("(bad)")), "{name} does not decode");
                assert!(!all.iter().any(|i| i.starts_with("call")), "{name} calls something");
                // Outside of loops below the stack pointer, and in a frame of their own, functions may keep a little.
                for body in function.inner_loops() {
                    let spill = body.iter().find(|(_, i)| i.contains("[rsp") || i.starts_with("push"));
                    assert!(spill.is_none(), "{name}: {spill:?} in an inner loop");
                }
                let tiles = all.iter().any(|i| i.contains("tmm"));
                let released = all.iter().rev().take(8).any(|i| *i == "tilerelease");
                assert_eq!(tiles, released, "{name} leaves tiles behind");
                assert_eq!(tiles, all.iter().any(|i| i.starts_with("ldtilecfg")), "{name}");
            }
        }
    }
}

/// Legacy encodings of vector instructions would be slow beside clean and dirty upper halves alike.
#[test]
fn vector_instructions_have_vex_or_evex_encodings() {
    for target in LEVELS {
        for spec in specs() {
            for (_, i) in functions(target, &spec).iter().flat_map(|f| &f.lines) {
                let vectors = ["xmm", "ymm", "zmm"].iter().any(|r| i.contains(r));
                assert!(!vectors || i.starts_with('v'), "{}: {i}", target.name());
            }
        }
    }
}

fn spec(format: FormatRef, rows: RowTile) -> LinearSpec {
    LinearSpec { format, n: 64, k: 800, rows, bias: false, epilogue: Epilogue::Store }
}

/// A group has eight quads of inputs. With 256 bits a block of 16 channels takes two instructions per quad and row, with
/// 512 bits one.
#[test]
fn integer_kernels_have_the_dot_products_meant() {
    for format in formats::ALL.iter().copied().filter(|f| f.wants_int8_activations()) {
        for (target, mnemonic, others) in [
            (Target::X86_64V3, "vpmaddubsw", ["vpdpbusd", "vpdpwssd"]),
            (Target::X86_64V3Avxvnni, "vpdpbusd", ["vpmaddubsw", "vpmaddwd"]),
            (Target::X86_64V4, "vpdpbusd", ["vpmaddubsw", "vpmaddwd"]),
            (Target::SapphireRapids, "vpdpbusd", ["vpmaddubsw", "vpmaddwd"]),
        ] {
            let wide = matches!(target, Target::X86_64V4 | Target::SapphireRapids);
            let amx = target == Target::SapphireRapids;
            for rows in ROW_TILES {
                let functions = functions(target, &spec(format, rows));
                let want: &[usize] = match (rows, wide) {
                    (RowTile::One, false) => &[8 * 2],
                    // Tiles of three rows, and of one.
                    (RowTile::Small | RowTile::Many, false) => &[8 * 2, 3 * 8 * 2],
                    (RowTile::One, true) => &[8],
                    // A row after the other, or two, three or four side by side.
                    (RowTile::Small, true) => &[8, 2 * 8, 3 * 8, 4 * 8],
                    // The same for few rows; and tiles of seven rows and of one, by two blocks.
                    (RowTile::Many, true) if !amx => &[8, 2 * 8, 3 * 8, 4 * 8, 7 * 8 * 2],
                    (RowTile::Many, true) => &[8, 2 * 8, 3 * 8, 4 * 8],
                };
                let name = format!("{} {} {rows:?}", target.name(), format.name);
                assert_eq!(counts(&functions, mnemonic), want, "{name}");
                for other in others {
                    let all = functions.iter().map(|f| count(&f.lines, other)).sum::<usize>();
                    assert_eq!(all, 0, "{name} has {other}");
                }
            }
        }
    }
}

/// A table of 16 entries is one shuffle for each quad of inputs, and one more for every further 16; what the shuffles of a
/// larger table have found is put together under masks, or by blends.
#[test]
fn tables_take_the_shuffles_meant() {
    for format in formats::ALL.iter().copied() {
        let Some(table) = format.table() else { continue };
        let sixteens = (1usize << table.bits).div_ceil(16);
        // A loop decodes a group: 8 quads of one block, in two parts with 256 bits.
        for (target, parts, joins) in [(Target::X86_64V3, 2, "vpblendvb"), (Target::X86_64V4, 1, "vptestmb")]
        {
            let functions = functions(target, &spec(format, RowTile::One));
            let name = format!("{} {}", target.name(), format.name);
            assert_eq!(counts(&functions, "vpshufb"), [8 * parts * sixteens], "{name}");
            let per_quad = match sixteens {
                1 => 0,
                2 => 1,
                // Pairs by the lower bit, of which there is one mask, and the two results by the upper.
                _ if joins == "vpblendvb" => 3,
                _ => 2,
            };
            let want: &[usize] = if per_quad == 0 { &[] } else { &[8 * parts * per_quad] };
            assert_eq!(counts(&functions, joins), want, "{name}");
        }
    }
}

/// One accumulator per channel and row, four rows of codes to a turn of the loop.
#[test]
fn float_kernels_have_the_multiplications_meant() {
    for (format, per_code_row) in [(&formats::F32, 1), (&formats::BF16, 2)] {
        for target in LEVELS {
            // Registers of two blocks with 512 bits, of one block with 256.
            let (row_counts, registers) = match target {
                Target::X86_64V3 | Target::X86_64V3Avxvnni => ([1, 2, 4], 2),
                _ => ([1, 2, 8], 2),
            };
            // Many rows of bf16 are for tiles where there are any.
            let rows = if target == Target::SapphireRapids { RowTile::Small } else { RowTile::Many };
            let functions = functions(target, &spec(format, rows));
            let want = row_counts.map(|rows| 4 * per_code_row * rows * registers);
            assert_eq!(counts(&functions, "vfmadd231ps"), want, "{} {}", target.name(), format.name);
        }
    }
}

/// A step of the full tile kernel is four loads and four products; weights are decoded without a store but that of the
/// tile's rows.
#[test]
fn tile_kernels_have_the_products_meant() {
    for format in formats::ALL.iter().copied().filter(|f| *f != &formats::F32) {
        let functions = functions(Target::SapphireRapids, &spec(format, RowTile::Many));
        // Two tiles of rows, and one, by two blocks.
        assert_eq!(counts(&functions, "tdpbf16ps"), [2, 4], "{}", format.name);
        for body in functions.iter().flat_map(Function::inner_loops) {
            match count(body, "tdpbf16ps") {
                0 => {}
                products => {
                    let loads = body.iter().filter(|(_, i)| i.starts_with("tileload")).count();
                    assert_eq!(loads, if products == 4 { 4 } else { 3 });
                    let rest = body.len() - loads - products;
                    assert!(rest <= 4, "{rest} instructions beside loads and products: {body:?}");
                }
            }
        }
        let mut loops = functions.iter().flat_map(Function::inner_loops);
        let unpacked = loops.find(|body| count(body, "vpternlogd") > 0);
        if format.is_uncompressed() {
            assert!(unpacked.is_none(), "weights in bf16 are tiles");
            continue;
        }
        let unpacked = unpacked.expect("weights are decoded");
        // 16 rows of a tile for each of two blocks; codes of 3 bits are put together so too, two quads at once.
        let planes = if format.code_bits() == 3 { 2 * 4 } else { 0 };
        assert_eq!(count(unpacked, "vpternlogd"), 2 * 16 + planes);
        let stores = unpacked.iter().filter(|(_, i)| i.starts_with("vmovups [")).count();
        assert_eq!(stores, 2 * 16);
    }
}

/// Whatever a kernel refers to is in the image: anything else is an error of the compiler.
#[test]
fn no_relocation_is_left() {
    let specs: Vec<KernelSpec> = specs().into_iter().map(KernelSpec::Linear).collect();
    for target in Target::ALL {
        let blob = compile_blob(target, &specs).unwrap();
        assert_eq!(blob.entries.len(), specs.len());
    }
}
