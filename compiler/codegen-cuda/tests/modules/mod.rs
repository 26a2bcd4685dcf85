//! Kernels as the PTX interpreter takes them.

use crate::nvrtc_here;
use attar_artifact::program::EntryBlocks;
use attar_codegen_cuda::{Cache, CudaPrograms, CudaTarget, Nvrtc, compile_kernel};
use attar_ptx::Module;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Compiles kernels to PTX, each once.
pub(crate) struct Modules {
    nvrtc: Nvrtc,
    cache: Cache,
    target: CudaTarget,
    parsed: BTreeMap<String, (Module, EntryBlocks)>,
}

impl Modules {
    /// Kernels as a target has them.
    pub(crate) fn find(target: CudaTarget) -> Option<Modules> {
        let cache = Cache::new(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
        Some(Modules { nvrtc: nvrtc_here::find()?, cache, target, parsed: BTreeMap::new() })
    }

    /// A kernel, and how it is launched.
    pub(crate) fn module(&mut self, programs: &CudaPrograms, name: &str) -> (Module, EntryBlocks) {
        let compile = || {
            let spec =
                programs.kernels.iter().find(|k| k.name() == name).expect("programs list their kernels");
            let kernel = compile_kernel(&self.nvrtc, Some(&self.cache), spec, self.target);
            let kernel = kernel.unwrap_or_else(|e| panic!("{e}"));
            let module = Module::parse(&kernel.output.ptx).unwrap_or_else(|e| panic!("{name}: {e}"));
            (module, kernel.emitted.blocks)
        };
        self.parsed.entry(name.to_owned()).or_insert_with(compile).clone()
    }
}
