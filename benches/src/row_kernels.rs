//! Kernels over rows of activations: norm and quantization, in bytes read and written per second.

use crate::memory::{Random, Region, floats};
use crate::shapes::Model;
use crate::{Kernels, Measured, read, timing};
use anyhow::Result;
use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::{Target, compile_blob};
use attar_kernel::{ActInt8Layout, Activation, KernelSpec};

/// Measures both kernels at the model's widths.
pub(crate) fn run(
    options: &Kernels,
    model: Model,
    target: Target,
    keep: &mut impl FnMut(Measured) -> Result<()>,
) -> Result<()> {
    let sizes = model.sizes();
    for &rows in &options.rows {
        for dim in [sizes.d, sizes.f] {
            let (x, gain) = (floats(&Random(3).f32s(rows * dim))?, floats(&Random(4).f32s(dim))?);
            let codes = ActInt8Layout::new(dim).stride * rows;
            let norm = |out| KernelSpec::RmsNorm { dim, eps: 1e-5, gain: true, out };
            let kernels = [
                ("rms_norm to int8", norm(Activation::Int8), true, codes),
                ("rms_norm to f32", norm(Activation::F32), true, rows * dim * 4),
                ("quantize", KernelSpec::Quantize { dim }, false, codes),
            ];
            for (what, spec, gained, out_bytes) in kernels {
                let out = Region::filled(out_bytes)?;
                let args: Vec<u64> = if gained {
                    vec![x.address(), gain.address(), out.address()]
                } else {
                    vec![x.address(), out.address()]
                };
                let image = ExecImage::load(&compile_blob(target, std::slice::from_ref(&spec))?)?;
                let (name, threads) = (spec.name(), options.threads);
                let launch = |_: usize, thread: usize| {
                    let (begin, end) = (thread * rows / threads, (thread + 1) * rows / threads);
                    // SAFETY: the target runs here; the table holds rows, a gain where the kernel has one, and room for
                    // the rows that it writes.
                    let found = unsafe { image.call(&name, &args, begin as u64, end as u64) };
                    assert!(found, "no kernel {name}");
                };
                let input = |_: usize, thread| read::read::<false>(read::share(x.bytes(), thread, threads));
                let [seconds, reading] = timing::in_turns(threads, &options.effort, [&launch, &input]);
                let rate = (rows * dim * 4) as f64 / seconds / 1e9;
                let limit = (rows * dim * 4) as f64 / reading / 1e9;
                keep(Measured {
                    kernel: format!("{what} {} [{dim}]", sizes.name),
                    target: target.name(),
                    threads,
                    rows,
                    microseconds: seconds * 1e6,
                    rate,
                    unit: "GB/s",
                    limit: Some(limit),
                    limit_is: "reading its input".to_owned(),
                    fraction: Some(rate / limit),
                })?;
            }
        }
    }
    Ok(())
}
