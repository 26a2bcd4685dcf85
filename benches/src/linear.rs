//! Matrix products: decode against reading, prefill against multiplying.
//!
//! Weights are random codes in the packed layout. A decode kernel (up to 16 rows) goes round copies of its weight, so
//! that each is read from where the whole model would be; a prefill kernel uses one.

use crate::memory::{Random, Region, floats};
use crate::peak::Instruction;
use crate::shapes::Model;
use crate::{Kernels, Measured, read, timing};
use anyhow::{Context, Result, ensure};
use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::{Target, compile_blob};
use attar_format::{CHANNELS, Encoded, FormatRef, PackedLayout, Scale, Value, formats};
use attar_kernel::{ActInt8Layout, Activation, Epilogue, KernelSpec, LinearSpec, RowTile, reference};

/// Measures every matrix of the model in every format and for every number of rows that was asked for.
pub(crate) fn run(
    options: &Kernels,
    model: Model,
    target: Target,
    keep: &mut impl FnMut(Measured) -> Result<()>,
) -> Result<()> {
    let formats: &[FormatRef] = if options.format.is_empty() { formats::ALL } else { &options.format };
    for &format in formats {
        for (name, n, k) in model.sizes().matrices() {
            let weight = packed(format, n, k)?;
            let (copies, stride) = Region::copies(&weight, options.footprint << 20)?;
            for &rows in &options.rows {
                let tile = match rows {
                    1 => RowTile::One,
                    2..=16 => RowTile::Small,
                    _ => RowTile::Many,
                };
                let spec =
                    LinearSpec { format, n, k, rows: tile, bias: false, epilogue: epilogue(name, format, n) };
                let used = if rows <= 16 { copies.bytes() } else { &copies.bytes()[..stride] };
                let (seconds, limit, limit_is) = measure(options, target, &spec, rows, used, stride)?;
                let (work, unit) = if rows <= 16 {
                    (weight.len() as f64, "GB/s")
                } else {
                    (2.0 * (rows * n * k) as f64, "GOP/s")
                };
                let rate = work / seconds / 1e9;
                keep(Measured {
                    kernel: format!("linear {} {} {} [{n}, {k}]", model.sizes().name, format.name, name),
                    target: target.name(),
                    threads: options.threads,
                    rows,
                    microseconds: seconds * 1e6,
                    rate,
                    unit,
                    limit,
                    limit_is,
                    fraction: limit.map(|l| rate / l),
                })?;
            }
        }
    }
    Ok(())
}

/// What a model does with a matrix's sums, but for heads, which go to attention.
fn epilogue(matrix: &str, format: FormatRef, n: usize) -> Epilogue {
    match matrix {
        "gate-up" => {
            let out = if format.wants_int8_activations() { Activation::Int8 } else { Activation::F32 };
            Epilogue::Swiglu { width: n / 2, out }
        }
        "o" | "down" => Epilogue::Residual,
        _ => Epilogue::Store,
    }
}

/// Seconds of one launch, its limit in G per second, and what that is.
fn measure(
    options: &Kernels,
    target: Target,
    spec: &LinearSpec,
    rows: usize,
    weights: &[u8],
    stride: usize,
) -> Result<(f64, Option<f64>, String)> {
    let grid = spec.items() as u64;
    let kernel = KernelSpec::Linear(spec.clone());
    let name = kernel.name();
    let image = ExecImage::load(&compile_blob(target, &[kernel])?)?;
    let x = activations(spec.format, rows, spec.k)?;
    let out = Region::filled(rows * spec.n * 4)?;
    let count = weights.len() / stride;
    let residual = (spec.epilogue == Epilogue::Residual).then(|| out.address());
    let tables: Vec<Vec<u64>> = (0..count)
        .map(|copy| {
            let weight = weights.as_ptr() as u64 + (copy * stride) as u64;
            let operands = [x.address(), weight].into_iter().chain(residual);
            operands.chain([out.address(), rows as u64, options.prefetch as u64]).collect()
        })
        .collect();
    let threads = options.threads;
    let launch = |unit: usize, thread: usize| {
        let (begin, end) =
            (thread as u64 * grid / threads as u64, (thread as u64 + 1) * grid / threads as u64);
        // SAFETY: the target runs here, and the table holds what a linear kernel with such an epilogue takes: rows of
        // activations, a packed weight, a residual where one is added (in place), room for the outputs, the number of
        // rows, a prefetch distance. Threads take parts of the grid that do not overlap.
        let found = unsafe { image.call(&name, &tables[unit % count], begin, end) };
        assert!(found, "no kernel {name}");
    };
    if rows <= 16 {
        let part =
            |unit: usize, thread| read::share(&weights[unit % count * stride..][..stride], thread, threads);
        let plain = |unit, thread| read::read::<false>(part(unit, thread));
        let ahead = |unit, thread| read::read::<true>(part(unit, thread));
        let [seconds, plain, ahead] = timing::in_turns(threads, &options.effort, [&launch, &plain, &ahead]);
        let limit = stride as f64 / plain.min(ahead) / 1e9;
        return Ok((seconds, Some(limit), "pure read".to_owned()));
    }
    let instruction = Instruction::meant(target, spec.format, rows);
    match instruction.and_then(|i| Some((i, i.work()?))) {
        Some((instruction, work)) => {
            let [seconds, peak] = timing::in_turns(threads, &options.effort, [&launch, &work]);
            Ok((seconds, Some(instruction.rate_of(peak, threads)), instruction.name().to_owned()))
        }
        None => Ok((timing::fastest(threads, &options.effort, &launch), None, "no loop for it".to_owned())),
    }
}

/// A packed weight of random codes: one block of channels, over and over.
fn packed(format: FormatRef, n: usize, k: usize) -> Result<Vec<u8>> {
    let layout = PackedLayout::new(format, n, k).context("a shape the format has")?;
    let random = &mut Random(1);
    let mut block = match format.value {
        Value::Float(_) => Encoded::from_f32(format, CHANNELS, k, &random.f32s(CHANNELS * k))?,
        _ => Encoded::zeros(format, CHANNELS, k)?,
    };
    if format.scale != Scale::None {
        let codes = if format.value == Value::Int8 { 255 } else { 1 << format.code_bits() };
        block.codes.fill_with(|| (random.bits() % codes) as u8);
        // Scales must be numbers of ordinary size: others would take other paths through the processor.
        block.field.fill_with(|| match format.scale {
            Scale::RowF32Field8 { .. } => (random.bits() % 256) as u16,
            _ => 0x3a00 + (random.bits() % 128) as u16,
        });
        block.row_scale.fill_with(|| 1e-5 * (1.5 + random.unit()));
    }
    let one = block.pack()?;
    ensure!(one.len() == layout.header_bytes + layout.block_bytes, "packed blocks are of equal size");
    let mut bytes = Vec::with_capacity(layout.total_bytes());
    bytes.extend_from_slice(&one[..layout.header_bytes]);
    for _ in 0..layout.blocks {
        bytes.extend_from_slice(&one[layout.header_bytes..]);
    }
    Ok(bytes)
}

/// Rows of activations as the format wants them.
fn activations(format: FormatRef, rows: usize, k: usize) -> Result<Region> {
    let x = floats(&Random(2).f32s(rows * k))?;
    if !format.wants_int8_activations() {
        return Ok(x);
    }
    let out = Region::filled(rows * ActInt8Layout::new(k).stride)?;
    // SAFETY: both regions are as large as the spec says.
    unsafe {
        reference::run(&KernelSpec::Quantize { dim: k }, &[x.address(), out.address()], 0..rows as u64)
    };
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put together from one block unpacks as a tensor of the shape it claims.
    #[test]
    fn repeated_blocks_are_a_packed_tensor() {
        for &format in formats::ALL {
            let bytes = packed(format, 3 * CHANNELS, 64).unwrap();
            let all = Encoded::unpack(format, 3 * CHANNELS, 64, &bytes).unwrap();
            let one: Vec<usize> = (0..3 * CHANNELS).map(|row| row % CHANNELS).collect();
            assert_eq!(all.decode(), all.select_rows(&one).decode(), "{}", format.name);
            assert!(all.decode().iter().all(|w| w.is_finite()), "{}", format.name);
        }
    }
}
