//! Kernels as the PTX interpreter takes them.

use crate::nvrtc_here;
use attar_codegen_cuda::{Cache, CudaPrograms, CudaTarget, Nvrtc, compile_kernel};
use attar_ptx::Module;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Compiles kernels to PTX, each once.
pub(crate) struct Modules {
    nvrtc: Nvrtc,
    cache: Cache,
    parsed: BTreeMap<String, Module>,
}

impl Modules {
    pub(crate) fn find() -> Option<Modules> {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels");
        Some(Modules { nvrtc: nvrtc_here::find()?, cache: Cache::new(folder), parsed: BTreeMap::new() })
    }

    pub(crate) fn module(&mut self, programs: &CudaPrograms, name: &str) -> Module {
        let compile = || {
            let spec =
                programs.kernels.iter().find(|k| k.name() == name).expect("programs list their kernels");
            let kernel = compile_kernel(&self.nvrtc, Some(&self.cache), spec, CudaTarget::Ptx);
            let kernel = kernel.unwrap_or_else(|e| panic!("{e}"));
            Module::parse(&kernel.output.ptx).unwrap_or_else(|e| panic!("{name}: {e}"))
        };
        self.parsed.entry(name.to_owned()).or_insert_with(compile).clone()
    }
}
