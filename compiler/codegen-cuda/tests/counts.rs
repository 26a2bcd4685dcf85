//! Bytes and instructions of products and attention, counted by the PTX interpreter. They are exact, and the same on every
//! machine; what they mean for a GPU is reasoned in docs/performance.md, which has the table that this prints.

mod case;
mod modules;
mod nvrtc_here;

use attar_artifact::manifest::KvType;
use attar_codegen_cuda::CudaTarget;
use attar_format::{FormatRef, PackedLayout, formats};
use attar_kernel::{Activation, Epilogue, LinearSpec, RowTile};
use attar_ptx::Stats;
use case::attention_cases::{self, Store};
use case::{Case, Random, linear_cases};
use modules::Modules;
use std::io::Write;

/// What the last launch of a case did: the product itself, where its rows are prepared by one before.
fn count(modules: &mut Modules, case: &Case) -> Stats {
    let (_, mut stats) = case.interpreted(&mut |programs, name| modules.module(programs, name));
    stats.pop().expect("a launch")
}

fn say(text: &str) {
    // Not captured: the table is what people run this for.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// 64 channels of 2048 inputs: enough that what is done once per block counts little. Few rows are multiplied by two blocks of
/// channels at a time, as in any matrix that is large.
fn product(format: FormatRef, rows: RowTile, count: usize) -> (Case, f64, f64) {
    let (n, k) = (64, 2048);
    let epilogue = match rows {
        RowTile::Small => Epilogue::Swiglu { width: n / 2, out: Activation::F32 },
        _ => Epilogue::Store,
    };
    let spec = LinearSpec { format, n, k, rows, bias: false, epilogue };
    let packed = PackedLayout::new(format, n, k).expect("a shape").total_bytes();
    (linear_cases::case(3, spec, count), (n * k) as f64, packed as f64)
}

/// With one row, what is read is the weights and little else, whole sectors of 32 bytes each; and no weight costs more
/// instructions than a GPU has time for while its memory delivers it.
#[test]
fn few_rows_read_every_weight_once() {
    let Some(mut modules) = Modules::find(CudaTarget::Ptx) else { return };
    say("format rows  instructions/weight  sectors*32/packed byte  matrix instructions");
    for format in formats::ALL.iter().copied() {
        for (rows, many) in [(RowTile::One, 1), (RowTile::Small, 8), (RowTile::Small, 16)] {
            let (case, weights, packed) = product(format, rows, many);
            let stats = count(&mut modules, &case);
            let instructions = stats.thread_instructions() as f64 / weights;
            let read = stats.global_read.sectors as f64 * 32.0 / packed;
            let matrix = stats.count("mma.sync").warps;
            say(&format!("{:<6} {many:>4} {instructions:>14.2} {read:>14.2} {matrix:>10}", format.name));
            let at = format!("{} with {many} rows", format.name);
            let most = match (many, format.name) {
                (1, "w8") => 2.4,
                (1, "n2" | "n3" | "n4") => 4.0,
                (1, _) => 9.0,
                // Tensor cores have eight rows for the price of one, but for their scales.
                (8, name) if name.starts_with(['n', 'w']) => 11.5,
                _ => f64::INFINITY,
            };
            assert!(instructions < most, "{at}: {instructions} instructions per weight");
            // Entries below zero and the others are multiplied one after the other where the table has eight of both; what
            // choices add to weights is a product for every four groups.
            let groups = if format.is_uncompressed() { 0 } else { weights as u64 / (16 * 32) };
            let halves = if format.name == "n4" { 2 } else { 1 };
            let choices = if many > 1 && format.table().is_some() { groups / 4 } else { 0 };
            let products = (groups * halves + choices) * many.div_ceil(8) as u64;
            assert_eq!(matrix, products, "{at}: products of 16 channels by 32 inputs");
        }
    }
}

#[test]
fn many_rows_spend_most_on_matrix_products() {
    let Some(mut modules) = Modules::find(CudaTarget::Ptx) else { return };
    say("format  matrix MACs/(M N K)  other instructions of warps/matrix instruction");
    for format in formats::ALL.iter().copied().filter(|f| f.code_bits() != 32) {
        let (case, weights, _) = product(format, RowTile::Many, 128);
        let stats = count(&mut modules, &case);
        let matrix = stats.count("mma.sync").warps as f64;
        let macs = stats.matrix_macs as f64 / (weights * 128.0);
        let others = (stats.warp_instructions() as f64 - matrix) / matrix;
        say(&format!("{:<6} {macs:>10.2} {others:>20.2}", format.name));
        assert!((macs - 1.0).abs() < 1e-9, "{}: every product once", format.name);
        assert!(others < 14.0, "{}: {others} other instructions", format.name);
    }
}

/// The same with `wgmma`, in tiles of 256 rows by 128 channels, of which the second is half full; in units of what `mma.sync`
/// multiplies at once. With fewer channels than that, or a full tile more, tiles would have 128 rows.
#[test]
fn warpgroups_spend_less_beside_matrix_products() {
    let target = CudaTarget::by_name("cuda:sm_90a").expect("a target");
    let Some(mut modules) = Modules::find(target) else { return };
    say("format  wgmma  other instructions of warps/(16 by 8 by 16)");
    let (m, n, k, tiled) = (256, 192, 2048, 256);
    for format in formats::ALL.iter().copied().filter(|f| f.code_bits() != 32) {
        let spec = LinearSpec { format, n, k, rows: RowTile::Many, bias: false, epilogue: Epilogue::Store };
        let stats = count(&mut modules, &linear_cases::case(3, spec, m));
        let products = stats.count("wgmma.mma_async").warps;
        let unit = (m * tiled * k) as f64 / (16 * 8 * 16) as f64;
        let others = (stats.warp_instructions() - products) as f64 / unit;
        say(&format!("{:<6} {products:>10} {others:>20.2}", format.name));
        assert_eq!(stats.matrix_macs, (m * tiled * k) as u64, "{}: every product once", format.name);
        // Sixteen channels of a warp by 256 rows by 16 inputs each.
        assert_eq!(products, (tiled / 16 * k / 16) as u64, "{}", format.name);
        // A matrix product of this size takes a cycle at full rate, in which four others are issued.
        assert!(others < 4.0, "{}: {others} other instructions", format.name);
    }
}

/// Keys and values of a span are read once for all heads of a group of four.
#[test]
fn a_span_of_attention_reads_its_keys_and_values_once() {
    let Some(mut modules) = Modules::find(CudaTarget::Ptx) else { return };
    say("cache  instructions/(position and head dimension)  bytes read/byte of cache");
    for kv in [KvType::F32, KvType::F16, KvType::Int8, KvType::Int4] {
        let spec = attention_cases::spec((8, 2, 64), None, kv, 256);
        let store = Store::new(spec, &[512], &mut Random(5));
        let batch = attention_cases::runs(&[(0, 511, 1)]);
        let case = store.spans(&batch, &attention_cases::queries(&spec, &batch), 0.0);
        let stats = count(&mut modules, &case);
        let positions = (512 * spec.kv_heads * spec.head_dim) as f64;
        let cache = (512 / 32 * spec.kv_heads * kv.block_bytes(spec.head_dim, 32) * 2) as f64;
        let instructions = stats.thread_instructions() as f64 / positions;
        let read = stats.global_read.bytes as f64 / cache;
        say(&format!("{kv:?}  {instructions:>10.1} {read:>20.2}"));
        assert!(read < 1.35, "{kv:?}: {read} bytes read for each of the cache");
        let most = if kv == KvType::F16 { 12.0 } else { 45.0 };
        assert!(instructions < most, "{kv:?}: {instructions} instructions");
    }
}

/// Tiles of 128 rows with tensor cores, behind a context, as most tokens of a long prompt are. Some positions behind a row's own
/// are multiplied as well.
#[test]
fn prompts_spend_most_of_attention_on_matrix_products() {
    let Some(mut modules) = Modules::find(CudaTarget::Ptx) else { return };
    say("cache  head  matrix MACs/needed  other instructions of warps/matrix instruction");
    let (heads, kv_heads, tokens, context) = (16, 4, 64, 992);
    let kinds = [KvType::F16, KvType::Int8, KvType::Int4];
    for (kv, head_dim) in kinds.into_iter().flat_map(|kv| [(kv, 64), (kv, 128)]) {
        let spec = attention_cases::spec((heads, kv_heads, head_dim), None, kv, 256);
        let store = Store::new(spec, &[context + tokens], &mut Random(5));
        let batch = attention_cases::runs(&[(0, context, tokens)]);
        let case = store.tiles(&batch, &attention_cases::queries(&spec, &batch), Activation::Int8);
        let stats = count(&mut modules, &case);
        let matrix = stats.count("mma.sync").warps as f64;
        let seen: usize = batch.iter().map(|(_, position)| position + 1).sum();
        let macs = stats.matrix_macs as f64 / (2 * seen * heads * head_dim) as f64;
        let others = (stats.warp_instructions() as f64 - matrix) / matrix;
        say(&format!("{kv:?} {head_dim:>5} {macs:>10.2} {others:>20.2}"));
        let at = format!("{kv:?} {head_dim}");
        assert!(macs < 1.05, "{at}: {macs} of the products that are needed");
        let most = if head_dim < 128 { 13.5 } else { 9.5 };
        assert!(others < most, "{at}: {others} other instructions");
        for traffic in [stats.shared_read, stats.shared_written] {
            let conflicts = traffic.wavefronts as f64 / traffic.ideal_wavefronts as f64;
            assert!(conflicts < 1.02, "{at}: {conflicts} passes over the banks");
        }
    }
}
