//! NVRTC, NVIDIA's run-time compiler, loaded when it is asked for.
//!
//! Nothing is linked: a build of Attar has no trace of CUDA, and a machine without NVRTC gets an error that says how to get
//! it. Machine code and PTX come from one compilation, whose log says how many registers a kernel takes.

mod search;

pub use search::{MAJOR, VARIABLE, WHEEL};

use crate::arch::CudaTarget;
use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr;

type Program = *mut c_void;

/// The functions that are called, by address.
#[derive(Clone, Copy)]
struct Functions {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log_size: Size,
    log: Bytes,
    ptx_size: Size,
    ptx: Bytes,
    cubin_size: Size,
    cubin: Bytes,
}

type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Bytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// A loaded NVRTC.
pub struct Nvrtc {
    path: PathBuf,
    version: (i32, i32),
    functions: Functions,
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nvrtc")
            .field("path", &self.path)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// What one compilation gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// PTX text.
    pub ptx: String,
    /// Machine code (an ELF file); empty when PTX alone was asked for.
    pub cubin: Vec<u8>,
    /// What the compiler and the assembler said.
    pub log: String,
}

/// Options of every compilation. They are part of the key under which results are kept.
/// Templates are not expected to use all constants that stand before them.
pub const OPTIONS: [&str; 3] = ["--std=c++17", "--diag-suppress=177", "--ptxas-options=-v"];

impl Nvrtc {
    /// Finds NVRTC and loads it: the file or folder that the environment variable [`VARIABLE`] names, else an installed
    /// toolkit, else a Python wheel, else what the system's loader finds.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when there is none; [`Error::Version`] for one of another major version.
    pub fn find() -> Result<Nvrtc> {
        search::find()
    }

    /// Loads a library. Its companion with the built-in functions is loaded first: NVRTC looks for it by bare name, and would
    /// not find it in its own folder.
    ///
    /// # Errors
    /// [`Error::Load`], [`Error::Symbol`], [`Error::Version`].
    pub fn load(path: &Path) -> Result<Nvrtc> {
        if let Some(builtins) = search::builtins_beside(path) {
            open(&builtins)?;
        }
        let library = open(path)?;
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
            symbol(&library, path, "nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the function writes two numbers.
        check("nvrtcVersion", unsafe { version(&mut major, &mut minor) })?;
        if major != MAJOR {
            return Err(Error::Version { path: path.to_owned(), found: (major, minor) });
        }
        let functions = Functions {
            create: symbol(&library, path, "nvrtcCreateProgram")?,
            compile: symbol(&library, path, "nvrtcCompileProgram")?,
            destroy: symbol(&library, path, "nvrtcDestroyProgram")?,
            log_size: symbol(&library, path, "nvrtcGetProgramLogSize")?,
            log: symbol(&library, path, "nvrtcGetProgramLog")?,
            ptx_size: symbol(&library, path, "nvrtcGetPTXSize")?,
            ptx: symbol(&library, path, "nvrtcGetPTX")?,
            cubin_size: symbol(&library, path, "nvrtcGetCUBINSize")?,
            cubin: symbol(&library, path, "nvrtcGetCUBIN")?,
        };
        Ok(Nvrtc { path: path.to_owned(), version: (major, minor), functions })
    }

    /// The library's file, or its bare name where the system's loader found it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles CUDA C++ that includes nothing.
    ///
    /// # Errors
    /// [`Error::Compile`] with the log when the source is refused; [`Error::Call`].
    pub fn compile(&self, kernel: &str, source: &str, target: CudaTarget) -> Result<Output> {
        let bug = |problem: &str| Error::Compile {
            kernel: kernel.to_owned(),
            target: target.to_string(),
            log: problem.to_owned(),
        };
        let text = CString::new(source).map_err(|_| bug("the source has a zero byte"))?;
        let arguments =
            OPTIONS.iter().map(|o| (*o).to_owned()).chain([format!("--gpu-architecture={target}")]);
        let arguments: Vec<CString> = arguments
            .map(CString::new)
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| bug("an option"))?;
        let pointers: Vec<*const c_char> = arguments.iter().map(|a| a.as_ptr()).collect();
        let f = &self.functions;
        let mut program = Guard { program: ptr::null_mut(), destroy: f.destroy };
        // SAFETY: the texts end in zeros and outlive the call; there are no headers.
        let code = unsafe {
            (f.create)(
                &mut program.program,
                text.as_ptr(),
                c"kernel.cu".as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        check("nvrtcCreateProgram", code)?;
        // SAFETY: the program was made above; there are as many options as is said.
        let compiled = unsafe { (f.compile)(program.program, pointers.len() as c_int, pointers.as_ptr()) };
        let log = text_of(self.bytes(&program, f.log_size, f.log, "nvrtcGetProgramLog")?);
        if compiled != 0 {
            return Err(bug(if log.is_empty() { "without a word" } else { &log }));
        }
        let ptx = text_of(self.bytes(&program, f.ptx_size, f.ptx, "nvrtcGetPTX")?);
        let cubin = match target {
            CudaTarget::Sm { .. } => self.bytes(&program, f.cubin_size, f.cubin, "nvrtcGetCUBIN")?,
            CudaTarget::Ptx => Vec::new(),
        };
        Ok(Output { ptx, cubin, log })
    }

    fn bytes(&self, program: &Guard, size: Size, get: Bytes, call: &'static str) -> Result<Vec<u8>> {
        let mut len = 0;
        // SAFETY: the program lives; the function writes one number.
        check(call, unsafe { size(program.program, &mut len) })?;
        let mut out = vec![0u8; len];
        // SAFETY: the function writes as many bytes as it said.
        check(call, unsafe { get(program.program, out.as_mut_ptr().cast()) })?;
        Ok(out)
    }
}

/// A program of NVRTC's, freed when dropped.
struct Guard {
    program: Program,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: made by NVRTC and destroyed once. Failure would leak a little.
            unsafe { (self.destroy)(&mut self.program) };
        }
    }
}

/// Text without the zero that ends it.
fn text_of(mut bytes: Vec<u8>) -> String {
    if bytes.last() == Some(&0) {
        bytes.pop();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn check(call: &'static str, code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::Call { call, code }) }
}

/// Opens a library for good: it has threads and handlers of its own and does not take being unloaded.
fn open(path: &Path) -> Result<ManuallyDrop<Library>> {
    // SAFETY: runs the library's initialisers. That it is what its name says is the user's word.
    let library = unsafe { Library::new(path) };
    library.map(ManuallyDrop::new).map_err(|e| Error::Load { path: path.to_owned(), problem: e.to_string() })
}

fn symbol<T: Copy>(library: &Library, path: &Path, name: &'static str) -> Result<T> {
    // SAFETY: the types are those of NVRTC's header, which have not changed within a major version.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found.map(|s| *s).map_err(|_| Error::Symbol { path: path.to_owned(), symbol: name })
}
