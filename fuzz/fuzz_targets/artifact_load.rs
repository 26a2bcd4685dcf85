//! Artifacts: whole files, and manifests and programs with their hashes made right.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../runtime/artifact/tests/hostile_input.rs"]
mod hostile_input;

fuzz_target!(|input: &[u8]| hostile_input::artifact_load(input));
