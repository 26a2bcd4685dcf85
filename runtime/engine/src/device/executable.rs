//! Machine code in memory: copied, hashed where it lies, then executable and never writable again.

use crate::error::{Error, ErrorKind};
use attar_artifact::Artifact;
use attar_artifact::manifest::Section;
use memmap2::{Mmap, MmapMut};

/// How kernels are called: by the System V ABI on x86-64, whatever the operating system, else by the C ABI.
#[cfg(target_arch = "x86_64")]
type Function = unsafe extern "sysv64" fn(args: *const u64, begin: u64, end: u64);
/// How kernels are called.
#[cfg(not(target_arch = "x86_64"))]
type Function = unsafe extern "C" fn(args: *const u64, begin: u64, end: u64);

/// A kernel's address. It stays valid as long as the [`Image`] it came from, which whoever holds a kernel must hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel(Function);

impl Kernel {
    /// A kernel that is part of this program. Tests define theirs as `extern "C"`, which is the same where they run.
    #[cfg(all(test, unix))]
    pub(crate) fn of(f: unsafe extern "C" fn(*const u64, u64, u64)) -> Kernel {
        // SAFETY: on Unix both ABIs are the same.
        Kernel(unsafe { std::mem::transmute::<unsafe extern "C" fn(*const u64, u64, u64), Function>(f) })
    }

    /// Computes the grid items `begin..end`.
    ///
    /// # Safety
    /// The image is alive; `args` points to as many numbers as the kernel takes; every address among them is valid for
    /// what the kernel does there, and no other thread touches what it writes.
    pub(crate) unsafe fn call(self, args: *const u64, begin: u64, end: u64) {
        // SAFETY: the caller promises all that the kernel needs.
        unsafe { (self.0)(args, begin, end) }
    }
}

/// The executable copy of a code section.
#[derive(Debug)]
pub(crate) struct Image {
    map: Mmap,
    len: u64,
}

impl Image {
    /// Copies a code section, checks the copy's hash and makes it executable.
    pub(crate) fn load(artifact: &Artifact, section: &Section) -> Result<Image, Error> {
        let fail = |source| ErrorKind::Memory { what: "machine code", bytes: section.len, hint: "", source };
        let len = usize::try_from(section.len).map_err(|_| fail(std::io::ErrorKind::OutOfMemory.into()))?;
        let mut map = MmapMut::map_anon(len.max(1)).map_err(fail)?;
        artifact.read_into(section, &mut map)?;
        let map = map.make_exec().map_err(fail)?;
        make_visible(&map);
        Ok(Image { map, len: section.len })
    }

    /// The kernel whose code is the `len` bytes at `offset`; `None` when they lie outside the section.
    pub(crate) fn kernel(&self, offset: u64, len: u64) -> Option<Kernel> {
        if len == 0 || offset.checked_add(len)? > self.len {
            return None;
        }
        let start = self.map.get(usize::try_from(offset).ok()?..)?.as_ptr();
        // SAFETY: `start` points into memory that is executable and stays so while `self` lives. That it is a kernel's
        // first instruction is the artifact's word, which its hash covers: machine code cannot be checked further.
        let f = unsafe { std::mem::transmute::<*const u8, Function>(start) };
        Some(Kernel(f))
    }
}

/// Makes freshly written instructions visible to instruction fetch. x86 does this by itself.
#[cfg(target_arch = "aarch64")]
fn make_visible(code: &[u8]) {
    use std::arch::asm;
    let ctr: u64;
    // SAFETY: reads a register that user code may read.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) };
    let data_line = 4usize << ((ctr >> 16) & 15);
    let code_line = 4usize << (ctr & 15);
    let start = code.as_ptr() as usize;
    let end = start + code.len();
    let mut at = start & !(data_line - 1);
    while at < end {
        // SAFETY: cleans a cache line of memory that we own.
        unsafe { asm!("dc cvau, {}", in(reg) at, options(nostack, preserves_flags)) };
        at += data_line;
    }
    // SAFETY: a barrier.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
    at = start & !(code_line - 1);
    while at < end {
        // SAFETY: invalidates an instruction cache line of memory that we own.
        unsafe { asm!("ic ivau, {}", in(reg) at, options(nostack, preserves_flags)) };
        at += code_line;
    }
    // SAFETY: barriers.
    unsafe { asm!("dsb ish", "isb", options(nostack, preserves_flags)) };
}

/// Makes freshly written instructions visible to instruction fetch on every hart of the process.
#[cfg(all(target_arch = "riscv64", target_os = "linux"))]
fn make_visible(code: &[u8]) {
    let start = code.as_ptr() as usize;
    let mut result = start;
    // SAFETY: the system call riscv_flush_icache(start, end, flags = all threads) changes no memory.
    unsafe {
        std::arch::asm!(
            "ecall",
            in("a7") 259,
            inlateout("a0") result,
            in("a1") start + code.len(),
            in("a2") 0,
            options(nostack),
        );
    }
    // It fails only where the kernel keeps instruction fetch coherent itself.
    let _ = result;
}

#[cfg(not(any(target_arch = "aarch64", all(target_arch = "riscv64", target_os = "linux"))))]
fn make_visible(_code: &[u8]) {}
