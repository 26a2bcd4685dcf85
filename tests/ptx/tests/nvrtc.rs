//! The texts in `kernels` are what NVRTC makes of the sources beside them. The library is looked for in the folder that
//! `ATTAR_NVRTC` names; without it this is reported as skipped. With `ATTAR_UPDATE_PTX=1` the texts are written anew.

use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Each text: source and architecture.
const TEXTS: [(&str, &str); 7] = [
    ("vector", "sm_90a"),
    ("math", "sm_90a"),
    ("norm", "sm_90a"),
    ("gemv", "sm_90a"),
    ("mma", "sm_80"),
    ("mma", "sm_90a"),
    ("wgmma", "sm_90a"),
];

type Program = *mut c_void;

struct Nvrtc {
    library: Library,
    /// Stays loaded: the compiler asks for it by name, and finds only what is.
    _builtins: Library,
}

impl Nvrtc {
    fn open(folder: &Path) -> Result<Nvrtc, libloading::Error> {
        // SAFETY: the libraries of NVIDIA's compiler run no code of their own when they are loaded.
        unsafe {
            Ok(Nvrtc {
                _builtins: Library::new(folder.join("libnvrtc-builtins.so.13.0"))?,
                library: Library::new(folder.join("libnvrtc.so.13"))?,
            })
        }
    }

    /// PTX of a source.
    fn compile(&self, source: &str, architecture: &str) -> String {
        let source = CString::new(source).expect("no NUL");
        let option = CString::new(format!("--gpu-architecture={architecture}")).expect("no NUL");
        // SAFETY: types and order of calls are those of nvrtc.h, and the strings outlive the calls.
        unsafe {
            let create: Symbol<
                '_,
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = self.library.get(b"nvrtcCreateProgram").expect("a symbol");
            let compile: Symbol<'_, unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int> =
                self.library.get(b"nvrtcCompileProgram").expect("a symbol");
            let mut program = std::ptr::null_mut();
            let none = std::ptr::null();
            assert_eq!(create(&mut program, source.as_ptr(), c"kernels.cu".as_ptr(), 0, none, none), 0);
            let code = compile(program, 1, [option.as_ptr()].as_ptr());
            assert_eq!(code, 0, "{}", self.text(program, "ProgramLog"));
            self.text(program, "PTX")
        }
    }

    /// What a pair of `nvrtcGet…Size` and `nvrtcGet…` gives.
    ///
    /// # Safety
    /// The program is one of this library.
    unsafe fn text(&self, program: Program, what: &str) -> String {
        // SAFETY: as above; the buffer has the size that was asked for.
        unsafe {
            let size: Symbol<'_, unsafe extern "C" fn(Program, *mut usize) -> c_int> =
                self.library.get(format!("nvrtcGet{what}Size").as_bytes()).expect("a symbol");
            let get: Symbol<'_, unsafe extern "C" fn(Program, *mut c_char) -> c_int> =
                self.library.get(format!("nvrtcGet{what}").as_bytes()).expect("a symbol");
            let mut bytes = 0;
            assert_eq!(size(program, &mut bytes), 0);
            let mut buffer = vec![0u8; bytes.max(1)];
            assert_eq!(get(program, buffer.as_mut_ptr().cast()), 0);
            CStr::from_bytes_until_nul(&buffer).expect("an end").to_string_lossy().into_owned()
        }
    }
}

#[test]
fn texts_are_what_the_compiler_makes_of_the_sources() {
    let report = |what: &str| {
        let _ = writeln!(std::io::stderr(), "{what}");
    };
    let Some(folder) = std::env::var_os("ATTAR_NVRTC").map(PathBuf::from) else {
        report(&format!("skipped: {} comparisons with NVRTC (ATTAR_NVRTC names no folder)", TEXTS.len()));
        return;
    };
    let nvrtc = Nvrtc::open(&folder).unwrap_or_else(|e| panic!("ATTAR_NVRTC={}: {e}", folder.display()));
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels");
    for (name, architecture) in TEXTS {
        let source = std::fs::read_to_string(kernels.join(format!("{name}.cu"))).expect("a source");
        let made = nvrtc.compile(&source, architecture);
        attar_ptx::Module::parse(&made).unwrap_or_else(|e| panic!("{name} for {architecture}: {e}"));
        let path = kernels.join(format!("{name}.{architecture}.ptx"));
        if std::env::var("ATTAR_UPDATE_PTX").as_deref() == Ok("1") {
            std::fs::write(&path, made).expect("a text");
            continue;
        }
        let kept = std::fs::read_to_string(&path).expect("a text");
        assert!(made == kept, "{} is stale: run this test with ATTAR_UPDATE_PTX=1", path.display());
    }
}
