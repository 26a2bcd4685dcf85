//! What products are in machine code: how many instructions their inner loops have for each of a tensor core, and that nothing is
//! spilled there. Counts are of instructions as they stand, not of cycles.
//!
//! `nvdisasm` is looked for in `ATTAR_NVDISASM`, in `target/nvdisasm` and in `PATH`; PyPI has it as `nvidia-cuda-nvdisasm`.
#![expect(clippy::print_stdout, reason = "a table for whoever asks for it with --nocapture")]

mod nvrtc_here;

use attar_codegen_cuda::{Cache, CudaSpec, CudaTarget, compile_kernel};
use attar_format::{FormatRef, formats};
use attar_kernel::{Epilogue, LinearSpec, RowTile};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The first release of CUDA whose tools read code for `sm_90a`.
const OLDEST: u32 = 12;

/// The major release of CUDA that a tool says it is from.
fn release(version: &str) -> Option<u32> {
    version.split_once("release ")?.1.split('.').next()?.parse().ok()
}

#[test]
fn releases_are_read() {
    assert_eq!(release("Cuda compilation tools, release 13.0, V13.0.85"), Some(13));
    assert_eq!(release("Cuda compilation tools, release 9.2"), Some(9));
    assert_eq!(release("no such thing"), None);
}

fn nvdisasm() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../nvdisasm/nvidia/cu13/bin/nvdisasm");
    let named = std::env::var_os("ATTAR_NVDISASM").map(PathBuf::from);
    let works = |p: &PathBuf| {
        let told = Command::new(p).arg("--version").output().ok().filter(|o| o.status.success());
        told.and_then(|o| release(&String::from_utf8_lossy(&o.stdout))).is_some_and(|major| major >= OLDEST)
    };
    let found = named.into_iter().chain([target, PathBuf::from("nvdisasm")]).find(works);
    if found.is_none() {
        let _ = writeln!(
            std::io::stderr(),
            "skipped 1 test of machine code: there is no nvdisasm of CUDA {OLDEST} or later"
        );
    }
    found
}

/// One instruction of a listing: its mnemonic, and the label it jumps to.
struct Instruction<'a> {
    mnemonic: &'a str,
    jump: Option<&'a str>,
}

/// Instructions of tensor cores that an inner loop has at least, being unrolled.
const UNROLLED: usize = 8;

/// Instructions of a loop.
struct Loop {
    all: usize,
    /// Those of tensor cores.
    products: usize,
    /// Those that read or write what did not fit into registers.
    spilled: usize,
}

impl Loop {
    /// Instructions for each of tensor cores.
    fn each(&self) -> f64 {
        self.all as f64 / self.products as f64
    }
}

/// What is between `;` or `/*0120*/` and the next `;`, without predicate.
fn instruction(line: &str) -> Option<Instruction<'_>> {
    let text = line.trim_start().strip_prefix("/*")?.split_once("*/")?.1;
    let text = text.split_once(';')?.0.trim();
    let text = if text.starts_with('@') { text.split_once(' ')?.1.trim() } else { text };
    let (mnemonic, rest) = text.split_once(' ').unwrap_or((text, ""));
    let jump = rest.split_once("`(").and_then(|(_, label)| label.split_once(')')).map(|(label, _)| label);
    Some(Instruction { mnemonic, jump: jump.filter(|_| mnemonic.starts_with("BRA")) })
}

/// The loop, from a label to a jump back to it, that multiplies with the fewest instructions beside. Whatever is around it has more.
fn main_loop(listing: &str) -> Option<Loop> {
    let (mut code, mut labels) = (Vec::new(), std::collections::BTreeMap::new());
    for line in listing.lines() {
        if let Some(label) = line.trim().strip_suffix(':').filter(|l| l.starts_with(".L_")) {
            labels.insert(label, code.len());
        }
        code.extend(instruction(line));
    }
    let count = |(start, end): (usize, usize)| {
        let of = |names: &[&str]| {
            let named = |i: &&Instruction<'_>| names.iter().any(|n| i.mnemonic.starts_with(n));
            code[start..=end].iter().filter(named).count()
        };
        Loop { all: end + 1 - start, products: of(&["IMMA", "HMMA", "HGMMA"]), spilled: of(&["LDL", "STL"]) }
    };
    let back = code.iter().enumerate().filter_map(|(end, i)| Some((*labels.get(i.jump?)?, end)));
    let loops = back.filter(|(start, end)| start < end).map(count);
    loops.filter(|l| l.products >= UNROLLED).min_by(|a, b| a.each().total_cmp(&b.each()))
}

/// Instructions for each one of tensor cores that the loop of a product may have, a tenth more than it has: with one row, with a
/// few, with many by `mma` and by `wgmma`.
const MOST: &[(&str, [f64; 4])] = &[
    ("w8", [20.8, 28.7, 7.6, 69.0]),
    ("n6", [124.0, 71.6, 12.4, 103.0]),
    ("n5", [75.2, 55.0, 11.1, 79.0]),
    ("n4", [18.5, 15.7, 9.6, 60.0]),
    ("n3", [33.5, 29.2, 9.7, 59.0]),
    ("n2", [29.7, 27.0, 9.3, 54.0]),
];

fn most(format: FormatRef, rows: RowTile, target: CudaTarget) -> f64 {
    let (_, bounds) = MOST.iter().find(|(name, _)| *name == format.name).expect("a bound for every format");
    match rows {
        RowTile::One => bounds[0],
        RowTile::Small => bounds[1],
        RowTile::Many if target.has_wgmma() => bounds[3],
        RowTile::Many => bounds[2],
    }
}

#[test]
fn products_have_the_loops_that_were_meant() {
    let (Some(nvrtc), Some(nvdisasm)) = (nvrtc_here::find(), nvdisasm()) else { return };
    let cache = Cache::new(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("kernel.cubin");
    let mut faults = Vec::new();
    for target in ["cuda:sm_80", "cuda:sm_90a"] {
        let target = CudaTarget::by_name(target).expect("a target");
        println!(
            "\n{target}: instructions of the inner loop, those of tensor cores, the former for each of the latter"
        );
        for format in formats::ALL.iter().copied().filter(|f| !f.is_uncompressed()) {
            for rows in [RowTile::One, RowTile::Small, RowTile::Many] {
                let linear =
                    LinearSpec { format, n: 4096, k: 14336, rows, bias: false, epilogue: Epilogue::Residual };
                let spec = CudaSpec::Linear(linear);
                let at = format!("{} on {target}", spec.name());
                let kernel =
                    compile_kernel(&nvrtc, Some(&cache), &spec, target).unwrap_or_else(|e| panic!("{e}"));
                std::fs::write(&file, &kernel.output.cubin).expect("writable");
                let told = Command::new(&nvdisasm).arg("-c").arg(&file).output().expect("nvdisasm runs");
                assert!(told.status.success(), "{at}: {}", String::from_utf8_lossy(&told.stderr));
                let listing = String::from_utf8(told.stdout).expect("text");
                let Some(l) = main_loop(&listing) else {
                    faults.push(format!("{at}: no loop with instructions of tensor cores"));
                    continue;
                };
                let each = l.each();
                println!("{:4} {rows:?}: {} {} {each:.1}", format.name, l.all, l.products);
                let products = match (rows, target.has_wgmma()) {
                    (RowTile::Many, true) => "HGMMA.64x",
                    (RowTile::Many, false) => "HMMA.16816.F32.BF16",
                    _ => "IMMA.16832.S8.S8",
                };
                if !listing.contains(products) {
                    faults.push(format!("{at}: no {products}"));
                }
                if l.spilled > 0 {
                    faults.push(format!("{at}: {} registers spilled within the loop", l.spilled));
                }
                let most = most(format, rows, target);
                if each > most {
                    faults.push(format!(
                        "{at}: {each:.1} instructions for each of tensor cores, at most {most} were meant"
                    ));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
