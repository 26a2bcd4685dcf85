//! A CUDA driver for tests without a GPU: a `libcuda.so` whose device executes PTX in the interpreter, with its checks.
//! Whatever it gives is labelled "PTX interpreter".
//!
//! A test puts it in a folder of its own by [`install`], and starts a child process with that folder in
//! `LD_LIBRARY_PATH`. Variables of the environment make it behave as devices do in trouble; each is a constant here.

mod codes;
mod driver;
mod entry_points;
mod image;
mod settings;

pub use image::fake_cubin;
pub use settings::{CAPABILITY, DEVICES, DRIVER, FAIL_COPY, LOG, LOSE_AFTER, MEMORY, MODE};

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Copies the library into `folder`, as `libcuda.so`, and gives the folder.
///
/// # Errors
/// The library was not built, or the folder cannot be written.
pub fn install(folder: &Path) -> io::Result<PathBuf> {
    let here = std::env::current_exe()?;
    let name = format!("{}attar_fake_cuda{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    // Beside test programs, or one folder up.
    let built = here.ancestors().skip(1).take(2).map(|f| f.join(&name)).find(|p| p.is_file());
    let Some(built) = built else {
        let why = format!("{name} is not beside {}: build the package attar-fake-cuda", here.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    };
    std::fs::create_dir_all(folder)?;
    // Under another name first: several tests may install it at once.
    static INSTALLED: AtomicU64 = AtomicU64::new(0);
    let turn = INSTALLED.fetch_add(1, Ordering::Relaxed);
    let beside = folder.join(format!("libcuda.so.{}.{turn}", std::process::id()));
    std::fs::copy(built, &beside)?;
    std::fs::rename(&beside, folder.join("libcuda.so"))?;
    Ok(folder.to_path_buf())
}
