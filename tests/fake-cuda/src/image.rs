//! Module images: PTX, and containers that stand for the machine code of one architecture.

use crate::codes::{self, Code};
use crate::settings::Settings;
use attar_ptx::Module;

/// What a fake cubin begins with; a line with the architecture and the PTX follow.
const MAGIC: &str = "attar fake cubin ";

/// An image that a driver takes as machine code for `architecture` (`sm_90a`), and executes by the PTX in it. It ends
/// with the NUL that ends PTX.
pub fn fake_cubin(architecture: &str, ptx: &str) -> Vec<u8> {
    format!("{MAGIC}{architecture}\n{ptx}\0").into_bytes()
}

/// Loads an image, of which the text is given up to its NUL.
///
/// # Errors
/// The code a driver would give, and why.
pub(crate) fn load(text: &[u8], settings: &Settings) -> Result<Module, (Code, String)> {
    if text.starts_with(b"\x7fELF") {
        // Machine code cannot be executed here, whatever architecture it is for.
        return Err((codes::NO_BINARY_FOR_GPU, "a cubin, which only a GPU executes".to_owned()));
    }
    let Ok(text) = std::str::from_utf8(text) else {
        return Err((codes::INVALID_IMAGE, "an image that is neither PTX nor a cubin".to_owned()));
    };
    let text = match text.strip_prefix(MAGIC) {
        None => text,
        Some(rest) => {
            let (architecture, text) = rest.split_once('\n').unwrap_or((rest, ""));
            if !runs_machine_code(architecture, settings.capability) {
                return Err((codes::NO_BINARY_FOR_GPU, format!("machine code for {architecture}")));
            }
            text
        }
    };
    let directive = |name: &str| {
        let line = text.lines().find_map(|l| l.trim().strip_prefix(name))?;
        line.split([',', ' ', '\t']).find(|w| !w.is_empty())
    };
    let (Some(version), Some(target)) = (directive(".version"), directive(".target")) else {
        return Err((codes::INVALID_PTX, "PTX without .version and .target".to_owned()));
    };
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    let (major, minor) = version.split_once('.').map_or((0, 0), |(a, b)| (number(a), number(b)));
    let newest = settings.newest_ptx();
    if (major, minor) > newest {
        let why = format!("PTX {version}; the driver takes {}.{} at most", newest.0, newest.1);
        return Err((codes::UNSUPPORTED_PTX_VERSION, why));
    }
    if !compiles_for(target, settings.capability) {
        return Err((codes::INVALID_PTX, format!("PTX for {target}")));
    }
    Module::parse(text).map_err(|e| (codes::INVALID_PTX, e.to_string()))
}

/// Capability and suffix of `sm_90a`.
fn architecture(name: &str) -> Option<((i32, i32), bool)> {
    let digits = name.strip_prefix("sm_")?;
    let (digits, specific) = match digits.strip_suffix('a') {
        Some(digits) => (digits, true),
        None => (digits, false),
    };
    let number: i32 = digits.parse().ok()?;
    Some(((number / 10, number % 10), specific))
}

/// Machine code runs on its generation, from its minor version on; that with a suffix on its own architecture only.
fn runs_machine_code(name: &str, capability: (i32, i32)) -> bool {
    match architecture(name) {
        Some((of, true)) => of == capability,
        Some((of, false)) => of.0 == capability.0 && of.1 <= capability.1,
        None => false,
    }
}

/// PTX is compiled for its architecture and all newer ones; that with a suffix for its own only.
fn compiles_for(name: &str, capability: (i32, i32)) -> bool {
    match architecture(name) {
        Some((of, true)) => of == capability,
        Some((of, false)) => of <= capability,
        None => false,
    }
}
