//! Targets as users name them.

use crate::error::{Error, Result};
use attar_codegen_cpu::Target;
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
    fn an_unknown_target_is_told_the_known_ones() {
        let error = resolve_targets(&["x86-64-v9"]).expect_err("no such target").to_string();
        assert!(error.contains("x86-64-v9") && error.contains("aarch64+dotprod"), "{error}");
        let none: [&str; 0] = [];
        assert!(resolve_targets(&none).is_err());
    }
}
