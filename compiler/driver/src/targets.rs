//! Targets as users name them.

use crate::error::{Error, Result};
use attar_artifact::manifest::device_of_target;
use attar_codegen_cpu::Target;
use attar_codegen_cuda::CudaTarget;
use std::collections::BTreeSet;

/// Targets by name, each once, in the order of [`Target::ALL`]. `native` is the best of ours that this machine runs;
/// `all` is every one.
///
/// # Errors
/// For a name that is no target, and for `native` on a machine none of ours fits.
pub fn resolve_targets(names: &[impl AsRef<str>]) -> Result<Vec<Target>> {
    let mut targets = BTreeSet::new();
    for name in names {
        match name.as_ref() {
            "native" => {
                let none = || format!("no target fits this machine; name one of {}", known());
                targets.insert(Target::native().ok_or_else(|| Error::option("--target", none()))?);
            }
            "all" => targets.extend(Target::ALL),
            name => {
                let unknown = || format!("unknown target {name}; known: native, all, {}", known());
                targets.insert(Target::by_name(name).ok_or_else(|| Error::option("--target", unknown()))?);
            }
        }
    }
    if targets.is_empty() {
        return Err(Error::option("--target", "name at least one target"));
    }
    Ok(Target::ALL.into_iter().filter(|t| targets.contains(t)).collect())
}

/// What an artifact gets code for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    pub cpu: Vec<Target>,
    pub cuda: Vec<CudaTarget>,
}

/// As [`resolve_targets`], with names of GPUs among them: `cuda:sm_90a` and its like, and `cuda` for those of data centres.
///
/// # Errors
/// As [`resolve_targets`]; for a name that is no GPU's.
pub fn resolve_all_targets(names: &[impl AsRef<str>]) -> Result<Targets> {
    let is_cuda = |name: &&str| device_of_target(name) == "cuda";
    let (gpus, cpus): (Vec<&str>, Vec<&str>) = names.iter().map(|n| n.as_ref()).partition(is_cuda);
    let mut cuda = BTreeSet::new();
    for name in gpus {
        let names: &[&str] = if name == "cuda" { &["cuda:sm_80", "cuda:sm_90a"] } else { &[name] };
        for name in names {
            let unknown = || {
                let known: Vec<String> = CudaTarget::ALL.into_iter().map(CudaTarget::name).collect();
                Error::option("--target", format!("unknown GPU {name}; known: cuda, {}", known.join(", ")))
            };
            cuda.insert(CudaTarget::by_name(name).ok_or_else(unknown)?);
        }
    }
    let cpu = if cpus.is_empty() && !cuda.is_empty() { Vec::new() } else { resolve_targets(&cpus)? };
    Ok(Targets { cpu, cuda: cuda.into_iter().collect() })
}

fn known() -> String {
    Target::ALL.map(Target::name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_resolved_once_each_in_order() {
        let targets = resolve_targets(&["aarch64", "x86-64-v2", "aarch64"]).expect("known names");
        assert_eq!(targets, [Target::X86_64V2, Target::Aarch64]);
        assert_eq!(resolve_targets(&["all"]).expect("known name"), Target::ALL);
    }

    #[test]
    fn gpus_stand_beside_cpus() {
        let targets = resolve_all_targets(&["cuda:sm_90a", "aarch64", "cuda"]).expect("known names");
        assert_eq!(targets.cpu, [Target::Aarch64]);
        let names: Vec<String> = targets.cuda.iter().map(|t| t.name()).collect();
        assert_eq!(names, ["cuda:sm_80", "cuda:sm_90a"]);
        assert!(resolve_all_targets(&["cuda:sm_80"]).expect("a GPU alone").cpu.is_empty());
        let error = resolve_all_targets(&["cuda:sm_20"]).expect_err("too old").to_string();
        assert!(error.contains("cuda:sm_20") && error.contains("cuda:sm_90a"), "{error}");
    }

    #[test]
    fn an_unknown_target_is_told_the_known_ones() {
        let error = resolve_targets(&["x86-64-v9"]).expect_err("no such target").to_string();
        assert!(error.contains("x86-64-v9") && error.contains("aarch64+dotprod"), "{error}");
        let none: [&str; 0] = [];
        assert!(resolve_targets(&none).is_err());
    }
}
