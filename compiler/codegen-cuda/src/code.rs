//! Code sections: every kernel's machine code, or PTX, laid end to end.

use crate::arch::CudaTarget;
use crate::cache::Cache;
use crate::emit::{Emitted, emit};
use crate::error::Result;
use crate::nvrtc::{Nvrtc, Output};
use crate::resources::Resources;
use crate::spec::CudaSpec;
use attar_artifact::program::Entry;

/// Images start at multiples of this.
const ALIGN: usize = 64;

/// The code section of one target: images that the driver loads one by one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeBlob {
    pub target: CudaTarget,
    pub bytes: Vec<u8>,
    /// One per kernel, in order of name. An image holds one function, which is named as the kernel.
    pub entries: Vec<Entry>,
}

/// One kernel, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompiledKernel {
    pub emitted: Emitted,
    pub output: Output,
    /// What it takes of the machine; `None` where only PTX was made.
    pub resources: Option<Resources>,
}

/// Compiles a kernel, or takes it from the cache.
///
/// # Errors
/// When no template serves the kernel, or NVRTC refuses it.
pub fn compile_kernel(
    nvrtc: &Nvrtc,
    cache: Option<&Cache>,
    spec: &CudaSpec,
    target: CudaTarget,
) -> Result<CompiledKernel> {
    let emitted = emit(spec, target)?;
    let key = Cache::key(&emitted.source, target, nvrtc.version());
    let output = match cache.and_then(|c| c.get(&key)) {
        Some(output) => output,
        None => {
            let output = nvrtc.compile(&emitted.name, &emitted.source, target)?;
            if let Some(cache) = cache {
                cache.put(&key, &output);
            }
            output
        }
    };
    let resources = Resources::parse(&output.log);
    Ok(CompiledKernel { emitted, output, resources })
}

/// Makes the code section of a target. The bytes depend on nothing but kernels, target and NVRTC's version. `progress` hears the
/// name of each kernel, and how many are done.
///
/// # Errors
/// As [`compile_kernel`].
pub fn compile(
    nvrtc: &Nvrtc,
    cache: Option<&Cache>,
    kernels: &[CudaSpec],
    target: CudaTarget,
    progress: &mut dyn FnMut(&str, usize),
) -> Result<CodeBlob> {
    let mut named: Vec<(String, &CudaSpec)> = kernels.iter().map(|k| (k.name(), k)).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named.dedup_by(|a, b| a.0 == b.0);
    let (mut bytes, mut entries) = (Vec::new(), Vec::with_capacity(named.len()));
    for (done, (name, spec)) in named.into_iter().enumerate() {
        progress(&name, done);
        let compiled = compile_kernel(nvrtc, cache, spec, target)?;
        let image = match target {
            CudaTarget::Sm { .. } => compiled.output.cubin,
            // The driver reads PTX up to a zero.
            CudaTarget::Ptx => [compiled.output.ptx.into_bytes(), vec![0]].concat(),
        };
        bytes.resize(usize::next_multiple_of(bytes.len(), ALIGN), 0);
        let (offset, len) = (bytes.len() as u64, image.len() as u64);
        entries.push(Entry { kernel: name, offset, len, blocks: compiled.emitted.blocks });
        bytes.extend_from_slice(&image);
    }
    bytes.resize(usize::next_multiple_of(bytes.len(), ALIGN), 0);
    Ok(CodeBlob { target, bytes, entries })
}
