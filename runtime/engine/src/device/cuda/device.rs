//! A GPU with a model's kernels and weights.

use super::{LEAST_COMPUTE, failed};
use crate::error::{ErrorKind, Result};
use crate::model::Progress;
use attar_artifact::manifest::{Section, SectionKind, device_of_target};
use attar_artifact::program::{EntryBlocks, Program};
use attar_artifact::{Artifact, CHUNK};
use cudarc::driver::sys::{self, CUfunction_attribute, cudaError_enum as Code};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError, result};
use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

/// What parts of memory, and kernels' vectors, are aligned to.
pub(super) const ALIGN: u64 = 256;
/// Chunks of weights that are read, and copied to the device, at a time.
const UPLOAD_CHUNKS: usize = 8;

/// A GPU that a model was opened on.
pub(crate) struct Device {
    pub(super) index: usize,
    context: Arc<CudaContext>,
    pub(crate) target: String,
    /// By name.
    pub(super) kernels: BTreeMap<String, Kernel>,
    pub(super) weights: Memory,
    pub(crate) programs: Vec<Program>,
    /// Whether kernels wait for the launches before them, so that the next may begin before one has ended.
    pub(super) overlaps: bool,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("index", &self.index)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

/// A kernel that was loaded.
pub(super) struct Kernel {
    function: sys::CUfunction,
    /// Keeps it loaded.
    _module: Module,
    pub(super) blocks: EntryBlocks,
}

// SAFETY: a function is a name for the driver, good in any thread that has the context.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// Machine code, or PTX, that the driver has taken.
struct Module {
    raw: sys::CUmodule,
    context: Arc<CudaContext>,
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: loaded once, unloaded once; whoever has launches under way holds the device.
            let _ = unsafe { result::module::unload(self.raw) };
        }
    }
}

impl Kernel {
    /// `image` ends with a zero if it is PTX.
    fn load(
        context: &Arc<CudaContext>,
        image: &[u8],
        name: &str,
        blocks: EntryBlocks,
    ) -> std::result::Result<Kernel, DriverError> {
        context.bind_to_thread()?;
        let name = CString::new(name).map_err(|_| DriverError(Code::CUDA_ERROR_NOT_FOUND))?;
        // SAFETY: the driver reads an image as far as its own header says, or PTX up to its zero.
        let raw = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
        let module = Module { raw, context: context.clone() };
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(module.raw, name) }?;
        if blocks.shared_bytes > 0 {
            // More than what every block may have must be asked for.
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: as above.
            unsafe { result::function::set_function_attribute(function, most, blocks.shared_bytes as i32) }?;
        }
        Ok(Kernel { function, _module: module, blocks })
    }

    /// Launches it. `early`: as soon as the launch before lets it, which it waits for itself.
    ///
    /// # Safety
    /// Arguments are what the kernel takes, 8 bytes each, and name memory that is there.
    pub(super) unsafe fn launch(
        &self,
        stream: &CudaStream,
        grid: [u32; 2],
        threads: u32,
        args: &[u64],
        early: bool,
    ) -> std::result::Result<(), DriverError> {
        let mut args: Vec<*mut c_void> =
            args.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast()).collect();
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: 1,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.blocks.shared_bytes,
            hStream: stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(early),
        };
        // SAFETY: everything that is pointed to outlives the call, which copies it; the rest is the caller's word.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.function, args.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
    }
}

/// Memory of a device, or a part of it that nothing else is given.
#[derive(Debug)]
pub(crate) struct Memory {
    /// All of it, freed with the last part.
    whole: Arc<CudaSlice<u8>>,
    index: usize,
    address: u64,
    len: u64,
}

impl Memory {
    /// Zeroed memory. `what` and `hint` go into the error.
    fn zeroed(
        index: usize,
        stream: &Arc<CudaStream>,
        bytes: u64,
        what: &'static str,
        hint: &'static str,
    ) -> Result<Memory> {
        let fail = |e: DriverError| match e.0 {
            Code::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = stream.context().mem_get_info().map_or(0, |(free, _)| free as u64);
                ErrorKind::DeviceMemory { device: format!("cuda:{index}"), what, bytes, free, hint }.into()
            }
            _ => failed(index, "allocating memory", e),
        };
        let len =
            usize::try_from(bytes.max(1)).map_err(|_| fail(DriverError(Code::CUDA_ERROR_OUT_OF_MEMORY)))?;
        let whole = stream.alloc_zeros(len).map_err(fail)?;
        // It is used on this stream alone, so there is nothing to wait for.
        let address = whole.device_ptr(stream).0;
        Ok(Memory { whole: Arc::new(whole), index, address, len: len as u64 })
    }

    /// Its first `len` bytes, or all if there are fewer, and what is behind.
    fn split(self, len: u64) -> [Memory; 2] {
        let len = len.min(self.len);
        let (whole, index) = (self.whole.clone(), self.index);
        let behind = Memory { whole, index, address: self.address + len, len: self.len - len };
        [Memory { len, ..self }, behind]
    }

    /// The address of `len` bytes from `at` on, if there are so many.
    fn place(&self, at: usize, len: usize) -> std::result::Result<u64, DriverError> {
        let end = at.checked_add(len).filter(|end| *end as u64 <= self.len);
        let at = end.map(|_| self.address + at as u64);
        at.ok_or(DriverError(Code::CUDA_ERROR_INVALID_VALUE))
    }

    /// The stream that it is used on.
    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        self.whole.stream()
    }

    /// The same for the driver, whose context the thread has then.
    fn raw_stream(&self) -> std::result::Result<sys::CUstream, DriverError> {
        self.whole.context().bind_to_thread()?;
        Ok(self.stream().cu_stream())
    }

    /// Copies bytes from the host to a place in it. The copy is over when the stream is done.
    ///
    /// # Safety
    /// Pinned bytes stay as they are until then; others are read before this returns.
    pub(super) unsafe fn receive(&mut self, at: usize, from: &[u8]) -> std::result::Result<(), DriverError> {
        let to = self.place(at, from.len())?;
        // SAFETY: the place is in this memory; the rest is the caller's word.
        unsafe { result::memcpy_htod_async(to, from, self.raw_stream()?) }
    }

    /// Copies numbers from a place in it to the host. They are there when the stream is done.
    ///
    /// # Safety
    /// Nobody uses pinned numbers until then; others are there when this returns.
    pub(super) unsafe fn send<T: bytemuck::Pod>(
        &self,
        at: usize,
        to: &mut [T],
    ) -> std::result::Result<(), DriverError> {
        let to = bytemuck::cast_slice_mut::<T, u8>(to);
        let from = self.place(at, to.len())?;
        // SAFETY: as in `receive`.
        unsafe { result::memcpy_dtoh_async(to, from, self.raw_stream()?) }
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Copies `len` bytes from one place to another that it does not overlap, after all that the stream was given before.
    pub(crate) fn copy_within(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        let copy = || {
            let places = (self.place(from, len)?, self.place(to, len)?);
            if from.abs_diff(to) < len {
                return Err(DriverError(Code::CUDA_ERROR_INVALID_VALUE));
            }
            // SAFETY: both places are in this memory and do not overlap.
            unsafe { result::memcpy_dtod_async(places.1, places.0, len, self.raw_stream()?) }
        };
        copy().map_err(|e| failed(self.index, "copying a page", e))
    }
}

impl Device {
    /// Loads an artifact's kernels and weights onto GPU `index`. `forced` names a code section.
    ///
    /// # Errors
    /// [`ErrorKind::NoCudaCode`] when there are none, and all that can be wrong with a GPU.
    pub(crate) fn open(
        artifact: &Artifact,
        index: usize,
        forced: Option<&str>,
        verify: bool,
        progress: Option<&Progress>,
    ) -> Result<Device> {
        let sections = &artifact.manifest().sections;
        let programs = artifact.programs("cuda").filter(|p| !p.is_empty()).ok_or(ErrorKind::NoCudaCode)?;
        let device = format!("cuda:{index}");
        let count = super::count()?;
        if index >= count {
            let reason = format!("there are {count} GPUs, counted from cuda:0");
            return Err(ErrorKind::DeviceUnavailable { device, reason }.into());
        }
        let fail = |e| failed(index, "started", e);
        let context = CudaContext::new(index).map_err(fail)?;
        let compute = context.compute_capability().map_err(fail)?;
        let candidates = choose(sections, compute, forced);
        if candidates.is_empty() {
            if let Some(target) = forced.filter(|f| code(sections).all(|(_, t)| t != *f)) {
                let have = code(sections).map(|(_, t)| t.to_owned()).collect();
                return Err(ErrorKind::TargetAbsent { target: target.to_owned(), have }.into());
            }
            let have = code(sections).map(|(_, t)| t.to_owned()).collect();
            let name = context.name().map_err(fail)?;
            return Err(
                ErrorKind::DeviceUnsupported { device, name, compute, needed: LEAST_COMPUTE, have }.into()
            );
        }
        // SAFETY: what an engine has is used on its own stream alone, and weights are there before it is made. Events of single
        // allocations would make capturing graphs fail.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(fail)?;
        let (target, kernels) = load_any(artifact, &context, index, &candidates)?;
        let weights = upload(artifact, index, &stream, verify, progress)?;
        let programs = programs.to_vec();
        if let Some(launch) =
            programs.iter().flat_map(|p| &p.launches).find(|l| !kernels.contains_key(&l.kernel))
        {
            let problem = format!("the code section {target} has no kernel {}", launch.kernel);
            return Err(ErrorKind::DeviceFailed { device, action: "loading kernels", problem }.into());
        }
        // What this is compiled to in machine code for compute capability 9.0 and later is not there in other code.
        let generation = target.strip_prefix("cuda:sm_").map(|name| name.trim_end_matches('a'));
        let overlaps = generation.and_then(|g| g.parse::<u32>().ok()).is_some_and(|g| g >= 90);
        Ok(Device { index, context, target, kernels, weights, programs, overlaps })
    }

    /// One arena of zeroed memory on this device, in two parts of so many bytes, with a stream of its own: several engines may
    /// run at once.
    pub(crate) fn arena(
        &self,
        [first, second]: [u64; 2],
        what: &'static str,
        hint: &'static str,
    ) -> Result<[Memory; 2]> {
        // What is too much is more than any device has.
        let first = first.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX);
        let all = first.saturating_add(second);
        let stream = self.context.new_stream().map_err(|e| failed(self.index, "making a stream", e))?;
        Ok(Memory::zeroed(self.index, &stream, all, what, hint)?.split(first))
    }
}

fn code(sections: &[Section]) -> impl Iterator<Item = (&Section, &str)> {
    sections.iter().filter_map(|s| match &s.kind {
        SectionKind::Code { target, .. } if device_of_target(target) == "cuda" => Some((s, target.as_str())),
        _ => None,
    })
}

/// Sections whose code runs on a GPU of that compute capability, the most suitable first: its own machine code, that of
/// earlier ones of the same generation, then PTX.
fn choose<'a>(
    sections: &'a [Section],
    (major, minor): (i32, i32),
    forced: Option<&str>,
) -> Vec<(&'a Section, &'a str)> {
    let compute = 10 * major + minor;
    let rank = |target: &str| -> Option<i32> {
        if let Some(least) = target.strip_prefix("cuda:compute_") {
            return least.parse::<i32>().ok().filter(|least| *least <= compute).map(|_| 1000);
        }
        let name = target.strip_prefix("cuda:sm_")?;
        let (digits, specific) = name.strip_suffix('a').map_or((name, false), |digits| (digits, true));
        let made_for: i32 = digits.parse().ok()?;
        match specific {
            true => (made_for == compute).then_some(0),
            false => (made_for / 10 == major && made_for <= compute).then_some(1 + compute - made_for),
        }
    };
    let fits = code(sections).filter(|(_, target)| forced.is_none_or(|f| f == *target));
    let mut ranked: Vec<_> = fits.filter_map(|(s, t)| Some((rank(t)?, s, t))).collect();
    ranked.sort_by_key(|(rank, _, target)| (*rank, *target));
    if (major, minor) < LEAST_COMPUTE {
        ranked.clear();
    }
    ranked.into_iter().map(|(_, s, t)| (s, t)).collect()
}

/// Loads the first section that the driver takes: machine code may be too new for it where PTX is not, or the other way round.
fn load_any(
    artifact: &Artifact,
    context: &Arc<CudaContext>,
    index: usize,
    candidates: &[(&Section, &str)],
) -> Result<(String, BTreeMap<String, Kernel>)> {
    let mut first = None;
    for (section, target) in candidates {
        match load(artifact, context, section) {
            Ok(kernels) => return Ok(((*target).to_owned(), kernels)),
            Err(Fault::Artifact(e)) => return Err(e),
            Err(Fault::Driver(e)) => {
                let refused = matches!(
                    e.0,
                    Code::CUDA_ERROR_NO_BINARY_FOR_GPU
                        | Code::CUDA_ERROR_INVALID_IMAGE
                        | Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
                        | Code::CUDA_ERROR_INVALID_PTX
                        | Code::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
                );
                let error = failed(index, "loading kernels", e);
                if !refused {
                    return Err(error);
                }
                first = first.or(Some(error));
            }
        }
    }
    Err(first.unwrap_or_else(|| ErrorKind::NoCudaCode.into()))
}

enum Fault {
    Artifact(crate::error::Error),
    Driver(DriverError),
}

fn load(
    artifact: &Artifact,
    context: &Arc<CudaContext>,
    section: &Section,
) -> std::result::Result<BTreeMap<String, Kernel>, Fault> {
    let SectionKind::Code { target, entries, .. } = &section.kind else { return Ok(BTreeMap::new()) };
    // The copy is compared with the section's hash; what the driver gets is this copy.
    let bytes = artifact.read(section).map_err(|e| Fault::Artifact(e.into()))?;
    let mut kernels = BTreeMap::new();
    for entry in entries {
        // The reader has checked the ranges.
        let image = bytes.get(entry.offset as usize..(entry.offset + entry.len) as usize).unwrap_or_default();
        let with_zero;
        let image = if target.starts_with("cuda:compute_") && image.last() != Some(&0) {
            with_zero = [image, &[0]].concat();
            &with_zero
        } else {
            image
        };
        let kernel = Kernel::load(context, image, &entry.kernel, entry.blocks).map_err(Fault::Driver)?;
        kernels.insert(entry.kernel.clone(), kernel);
    }
    Ok(kernels)
}

/// Copies the weights to the device. While a piece is on its way, the next is read and compared with its hash.
fn upload(
    artifact: &Artifact,
    index: usize,
    stream: &Arc<CudaStream>,
    verify: bool,
    progress: Option<&Progress>,
) -> Result<Memory> {
    let total = artifact.section(|k| *k == SectionKind::Weights).map_or(0, |s| s.len);
    let hint = "; use a GPU with more memory, compile with fewer bits, or run on the CPU (--device cpu)";
    let mut memory = Memory::zeroed(index, stream, total, "the weights", hint)?;
    let fail = |e| failed(index, "copying weights to it", e);
    let piece = (UPLOAD_CHUNKS as u64 * CHUNK).min(total.max(1)) as usize;
    let context = stream.context();
    // SAFETY: bytes of any value; each is written before it is read.
    let stages = [(), ()].map(|()| unsafe { context.alloc_pinned::<u8>(piece) });
    let mut done = 0u64;
    let mut stages = stages.into_iter().collect::<std::result::Result<Vec<_>, _>>().map_err(fail)?;
    for turn in 0.. {
        if done >= total {
            break;
        }
        let len = (piece as u64).min(total - done) as usize;
        let Some(stage) = stages.get_mut(turn % 2) else { break };
        // Waits for the copy that was made from it.
        let host = stage.as_mut_slice().map_err(fail)?.get_mut(..len).unwrap_or_default();
        artifact.read_weights(turn * UPLOAD_CHUNKS, host, verify)?;
        let at = done as usize;
        // Nobody else has any of it yet.
        let whole = Arc::get_mut(&mut memory.whole);
        let mut to = whole.and_then(|whole| whole.try_slice_mut(at..at + len));
        let to = to.as_mut().ok_or_else(|| fail(DriverError(Code::CUDA_ERROR_INVALID_VALUE)))?;
        if len == piece {
            stream.memcpy_htod(&*stage, to).map_err(fail)?;
        } else {
            // A shorter one does not say when it is done; there is no other after it.
            stream.memcpy_htod(&*host, to).map_err(fail)?;
            stream.synchronize().map_err(fail)?;
        }
        done += len as u64;
        if let Some(progress) = progress {
            progress.tell(done, total);
        }
    }
    stream.synchronize().map_err(fail)?;
    stream.context().check_err().map_err(fail)?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(target: &str) -> Section {
        Section {
            inflated: None,
            kind: SectionKind::Code {
                target: target.to_owned(),
                features: Vec::new(),
                entries: Vec::new(),
                prefill_differs: true,
            },
            offset: 0,
            len: 0,
            hash: String::new(),
            chunks: Vec::new(),
            required: false,
        }
    }

    #[test]
    fn the_most_suitable_code_comes_first() {
        let names = [
            "x86-64-v3",
            "cuda:compute_80",
            "cuda:sm_80",
            "cuda:sm_86",
            "cuda:sm_90",
            "cuda:sm_90a",
            "cuda:sm_x",
        ];
        let sections: Vec<Section> = names.iter().map(|n| section(n)).collect();
        let order = |compute, forced| -> Vec<&str> {
            choose(&sections, compute, forced).into_iter().map(|(_, t)| t).collect()
        };
        assert_eq!(order((9, 0), None), ["cuda:sm_90a", "cuda:sm_90", "cuda:compute_80"]);
        assert_eq!(order((8, 9), None), ["cuda:sm_86", "cuda:sm_80", "cuda:compute_80"]);
        assert_eq!(order((8, 0), None), ["cuda:sm_80", "cuda:compute_80"]);
        assert_eq!(order((12, 0), None), ["cuda:compute_80"]);
        assert_eq!(order((12, 0), Some("cuda:sm_90a")), [""; 0]);
        assert_eq!(order((9, 0), Some("cuda:compute_80")), ["cuda:compute_80"]);
        assert_eq!(order((7, 5), None), [""; 0]);
    }
}
