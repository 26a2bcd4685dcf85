//! The CPU: what it can do, and the code section that suits it best.

use super::executable::{Image, Kernel};
use crate::error::{Error, ErrorKind};
use attar_artifact::Artifact;
use attar_artifact::cpu::has_feature;
use attar_artifact::manifest::{Section, SectionKind, device_of_target};
use std::collections::BTreeMap;

/// Targets from most to least preferred. One that is not listed comes after these, more features first.
const PREFERENCE: [&str; 10] = [
    "sapphirerapids",
    "x86-64-v4",
    "x86-64-v3+avxvnni",
    "x86-64-v3",
    "x86-64-v2",
    "aarch64+i8mm",
    "aarch64+dotprod",
    "aarch64",
    "riscv64gcv",
    "riscv64",
];

/// The chosen code section, ready to run.
#[derive(Debug)]
pub(crate) struct Code {
    pub(crate) target: String,
    /// See [`SectionKind::Code`].
    pub(crate) prefill_differs: bool,
    kernels: BTreeMap<String, Kernel>,
    /// Holds the memory that the kernels lie in.
    _image: Option<Image>,
}

impl Code {
    /// Chooses (or takes the `forced`) code section and makes it executable.
    pub(crate) fn load(artifact: &Artifact, forced: Option<&str>) -> Result<Code, Error> {
        let section = choose(&artifact.manifest().sections, forced, &Cpu::here())?;
        let SectionKind::Code { target, entries, prefill_differs, .. } = &section.kind else {
            return Err(ErrorKind::Missing { what: "code section", hint: "" }.into());
        };
        let image = Image::load(artifact, section)?;
        let mut kernels = BTreeMap::new();
        for entry in entries {
            // The reader has checked the ranges; an entry that is refused here is one no launch will find.
            if let Some(kernel) = image.kernel(entry.offset, entry.len) {
                kernels.insert(entry.kernel.clone(), kernel);
            }
        }
        Ok(Code { target: target.clone(), prefill_differs: *prefill_differs, kernels, _image: Some(image) })
    }

    /// Kernels that are part of the test program.
    #[cfg(test)]
    pub(crate) fn of(kernels: &[(&str, Kernel)]) -> Code {
        let kernels = kernels.iter().map(|(name, k)| ((*name).to_owned(), *k)).collect();
        Code { target: "test".to_owned(), prefill_differs: false, kernels, _image: None }
    }

    pub(crate) fn kernel(&self, name: &str) -> Option<Kernel> {
        self.kernels.get(name).copied()
    }
}

/// What a CPU offers.
pub(crate) struct Cpu {
    /// `x86_64`, `aarch64`, `riscv64`, …
    pub(crate) arch: &'static str,
    has: fn(&str) -> bool,
}

impl Cpu {
    pub(crate) fn here() -> Cpu {
        Cpu { arch: std::env::consts::ARCH, has: has_feature }
    }

    /// Why code for `target` cannot run; `None` when it can.
    fn refuses(&self, target: &str, features: &[String]) -> Option<String> {
        let arch = arch_of(target);
        if arch != Some(self.arch) {
            return Some(match arch {
                Some(a) => format!("{target} is for {a}"),
                None => format!("{target} is unknown to this version"),
            });
        }
        let missing: Vec<&str> = features.iter().map(String::as_str).filter(|f| !(self.has)(f)).collect();
        if missing.is_empty() { None } else { Some(format!("{target} needs {}", missing.join(", "))) }
    }
}

/// Why this CPU cannot run code of a target that needs these features; `None` when it can.
pub(crate) fn refusal(target: &str, features: &[&str]) -> Option<String> {
    let features: Vec<String> = features.iter().map(|f| (*f).to_owned()).collect();
    Cpu::here().refuses(target, &features)
}

/// The target of the code section that would be used here.
pub(crate) fn chosen(sections: &[Section]) -> Option<String> {
    match &choose(sections, None, &Cpu::here()).ok()?.kind {
        SectionKind::Code { target, .. } => Some(target.clone()),
        _ => None,
    }
}

/// Code targets that this CPU can and cannot run: `(target, why not)`.
pub(crate) fn judge(sections: &[Section]) -> Vec<(String, Option<String>)> {
    let cpu = Cpu::here();
    code_sections(sections).map(|(_, t, f)| (t.to_owned(), cpu.refuses(t, f))).collect()
}

fn code_sections(sections: &[Section]) -> impl Iterator<Item = (&Section, &str, &[String])> {
    sections.iter().filter_map(|s| match &s.kind {
        SectionKind::Code { target, features, .. } if device_of_target(target) == "cpu" => {
            Some((s, target.as_str(), features.as_slice()))
        }
        _ => None,
    })
}

fn choose<'a>(sections: &'a [Section], forced: Option<&str>, cpu: &Cpu) -> Result<&'a Section, Error> {
    if let Some(forced) = forced {
        let Some((section, target, features)) = code_sections(sections).find(|(_, t, _)| *t == forced) else {
            let have = code_sections(sections).map(|(_, t, _)| t.to_owned()).collect();
            return Err(ErrorKind::TargetAbsent { target: forced.to_owned(), have }.into());
        };
        return match cpu.refuses(target, features) {
            None => Ok(section),
            Some(reason) => {
                let (target, cpu) = (target.to_owned(), cpu.arch.to_owned());
                Err(ErrorKind::TargetUnsupported { target, cpu, reason }.into())
            }
        };
    }
    let rank = |target: &str| PREFERENCE.iter().position(|p| *p == target).unwrap_or(PREFERENCE.len());
    let best = code_sections(sections)
        .filter(|(_, target, features)| cpu.refuses(target, features).is_none())
        .min_by_key(|(_, target, features)| (rank(target), usize::MAX - features.len(), target.to_string()));
    match best {
        Some((section, _, _)) => Ok(section),
        None => {
            let refused = code_sections(sections).filter_map(|(_, t, f)| cpu.refuses(t, f)).collect();
            Err(ErrorKind::NoCode { cpu: cpu.arch.to_owned(), refused }.into())
        }
    }
}

/// Architecture of a target, as [`std::env::consts::ARCH`] spells it.
fn arch_of(target: &str) -> Option<&'static str> {
    if target.starts_with("x86-64") || target == "sapphirerapids" {
        Some("x86_64")
    } else if target.starts_with("aarch64") {
        Some("aarch64")
    } else if target.starts_with("riscv64") {
        Some("riscv64")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(target: &str, features: &[&str]) -> Section {
        Section {
            inflated: None,
            kind: SectionKind::Code {
                target: target.to_owned(),
                features: features.iter().map(|f| (*f).to_owned()).collect(),
                entries: Vec::new(),
                prefill_differs: false,
            },
            offset: 0,
            len: 0,
            hash: String::new(),
            chunks: Vec::new(),
            required: false,
        }
    }

    fn all() -> Vec<Section> {
        vec![
            section("cuda:sm_90a", &[]),
            section("aarch64", &["neon"]),
            section("aarch64+dotprod", &["neon", "dotprod"]),
            section("x86-64-v2", &["ssse3"]),
            section("x86-64-v3", &["avx2", "fma"]),
            section("x86-64-v9", &["avx4096"]),
            section("z80", &[]),
        ]
    }

    fn pick(cpu: &Cpu, forced: Option<&str>) -> Result<String, String> {
        let all = all();
        choose(&all, forced, cpu).map(|s| s.kind.name()).map_err(|e| e.to_string())
    }

    #[test]
    fn the_best_that_runs_is_chosen() {
        let v3 = Cpu { arch: "x86_64", has: |f| ["ssse3", "avx2", "fma"].contains(&f) };
        assert_eq!(pick(&v3, None).unwrap(), "code x86-64-v3");
        let v2 = Cpu { arch: "x86_64", has: |f| f == "ssse3" };
        assert_eq!(pick(&v2, None).unwrap(), "code x86-64-v2");
        let arm = Cpu { arch: "aarch64", has: |f| f == "neon" };
        assert_eq!(pick(&arm, None).unwrap(), "code aarch64");
        let dot = Cpu { arch: "aarch64", has: |_| true };
        assert_eq!(pick(&dot, None).unwrap(), "code aarch64+dotprod");
    }

    #[test]
    fn none_fits_lists_why() {
        let old = Cpu { arch: "x86_64", has: |_| false };
        let e = pick(&old, None).unwrap_err();
        assert!(e.contains("x86-64-v2 needs ssse3") && e.contains("x86-64-v3 needs avx2, fma"), "{e}");
        assert!(e.contains("aarch64 is for aarch64") && e.contains("z80 is unknown"), "{e}");
        let e = choose(&[], None, &old).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains("none at all"), "{e}");
    }

    #[test]
    fn a_forced_target_is_checked_too() {
        let v3 = Cpu { arch: "x86_64", has: |f| ["ssse3", "avx2", "fma"].contains(&f) };
        assert_eq!(pick(&v3, Some("x86-64-v2")).unwrap(), "code x86-64-v2");
        let e = pick(&v3, Some("x86-64-v9")).unwrap_err();
        assert!(e.contains("cannot run on this CPU") && e.contains("avx4096"), "{e}");
        let e = pick(&v3, Some("x86-64-v4")).unwrap_err();
        assert!(e.contains("no code for target x86-64-v4; it has: aarch64,"), "{e}");
    }
}
