//! Running compiled kernels in this process: for tests and file tests. The runtime has its own loader.

use crate::blob::CodeBlob;
use std::io;

/// A code blob in executable memory.
#[derive(Debug)]
pub struct ExecImage {
    memory: memmap2::Mmap,
    blob: CodeBlob,
}

impl ExecImage {
    /// Copies a blob into executable memory.
    ///
    /// # Errors
    /// When the operating system refuses the memory.
    pub fn load(blob: &CodeBlob) -> io::Result<ExecImage> {
        let mut memory = memmap2::MmapMut::map_anon(blob.bytes.len().max(1))?;
        memory[..blob.bytes.len()].copy_from_slice(&blob.bytes);
        Ok(ExecImage { memory: memory.make_exec()?, blob: blob.clone() })
    }

    /// Runs grid items `begin..end` of a kernel; `false` when the blob has no such kernel.
    ///
    /// # Safety
    /// The blob must be code for this CPU, and `args` what the kernel's spec asks for: addresses of live buffers as
    /// large as the spec says, not otherwise used during the call.
    pub unsafe fn call(&self, kernel: &str, args: &[u64], begin: u64, end: u64) -> bool {
        let Some(entry) = self.blob.entry(kernel) else { return false };
        let code = self.memory[entry.offset as usize..].as_ptr();
        // SAFETY: the entry table points at functions of this signature; the caller answers for CPU and arguments.
        unsafe {
            let function: extern "C" fn(*const u64, u64, u64) = std::mem::transmute(code);
            function(args.as_ptr(), begin, end);
        }
        true
    }
}
