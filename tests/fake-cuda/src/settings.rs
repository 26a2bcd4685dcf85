//! What the environment asks of the fake driver.

use attar_ptx::CopyMode;

/// Number of devices; 1 where not said.
pub const DEVICES: &str = "ATTAR_FAKE_CUDA_DEVICES";
/// Bytes of memory of each device; 16 GiB where not said.
pub const MEMORY: &str = "ATTAR_FAKE_CUDA_MEMORY";
/// Compute capability, as `8.0`; `9.0` where not said.
pub const CAPABILITY: &str = "ATTAR_FAKE_CUDA_CAPABILITY";
/// Version of the driver as CUDA counts it; 13000 where not said. It decides which PTX is too new.
pub const DRIVER: &str = "ATTAR_FAKE_CUDA_DRIVER";
/// The copy from the host that fails, from 1.
pub const FAIL_COPY: &str = "ATTAR_FAKE_CUDA_FAIL_COPY";
/// Launches after which the device is lost: every later call fails.
pub const LOSE_AFTER: &str = "ATTAR_FAKE_CUDA_LOSE_AFTER";
/// Asynchronous copies and the order of turns: `lazy` or `eager`; `lazy` where not said.
pub const MODE: &str = "ATTAR_FAKE_CUDA_MODE";
/// A file that gets a line for every launch: kernel, grid, block, warp instructions, bytes read and written; and one before those
/// of a graph: `graph`, and how many items of work it has.
pub const LOG: &str = "ATTAR_FAKE_CUDA_LOG";

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) devices: usize,
    pub(crate) memory: usize,
    pub(crate) capability: (i32, i32),
    pub(crate) driver: i32,
    pub(crate) fail_copy: Option<u64>,
    pub(crate) lose_after: Option<u64>,
    pub(crate) mode: CopyMode,
    pub(crate) log: Option<String>,
}

impl Settings {
    /// # Errors
    /// The variable that holds what it must not.
    pub(crate) fn from_environment() -> Result<Settings, String> {
        let read = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let number = |name: &str| match read(name) {
            None => Ok(None),
            Some(text) => {
                text.parse::<u64>().map(Some).map_err(|_| format!("{name}={text}: a number is expected"))
            }
        };
        let capability = match read(CAPABILITY) {
            None => (9, 0),
            Some(text) => text
                .split_once('.')
                .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
                .ok_or_else(|| format!("{CAPABILITY}={text}: as 9.0"))?,
        };
        let mode = match read(MODE).as_deref() {
            None | Some("lazy") => CopyMode::Lazy,
            Some("eager") => CopyMode::Eager,
            Some(other) => return Err(format!("{MODE}={other}: lazy or eager")),
        };
        Ok(Settings {
            devices: number(DEVICES)?.unwrap_or(1).min(16) as usize,
            memory: number(MEMORY)?.unwrap_or(16 << 30) as usize,
            capability,
            driver: number(DRIVER)?.unwrap_or(13000) as i32,
            fail_copy: number(FAIL_COPY)?,
            lose_after: number(LOSE_AFTER)?,
            mode,
            log: read(LOG),
        })
    }

    /// Newest PTX ISA the driver takes, as major and minor.
    pub(crate) fn newest_ptx(&self) -> (u32, u32) {
        let (major, minor) = ((self.driver / 1000) as u32, (self.driver % 1000 / 10) as u32);
        // One ISA for each release, but for 12.6, which had that of 12.5.
        let skipped = u32::from(major == 12 && minor >= 6);
        (major.saturating_sub(4), minor - skipped)
    }
}
