//! The body of the fuzz target `artifact_load`, and the replay of what it was given: its seeds and its findings.
//!
//! The first byte of an input says what the rest is: a whole file, or (so that hashes do not keep the fuzzer out) the
//! manifest or the programs of a file that is otherwise in order, or a certificate.

use attar_artifact::certificate::Certificate;
use attar_artifact::header::{HEADER_BYTES, Header, PAGE, VERSION};
use attar_artifact::program::{Arg, StepSize};
use attar_artifact::{Artifact, Verify};

/// Opens whatever it is given in every way there is; anything but a panic is fine.
pub fn artifact_load(input: &[u8]) {
    let Some((mode, rest)) = input.split_first() else { return };
    if *mode == b'c' {
        if let Ok(certificate) = Certificate::parse(rest) {
            assert!(certificate.to_json().is_ok(), "what was read can be written");
        }
        return;
    }
    let file = match mode {
        b'm' => with_manifest(&[0; 4096], rest),
        b'p' => with_manifest(rest, manifest_for(rest).as_bytes()),
        _ => rest.to_vec(),
    };
    for verify in [Verify::None, Verify::Full] {
        let Ok(a) = Artifact::from_bytes(file.clone(), verify) else { continue };
        let _ = a.verify_weights(1);
        for section in &a.manifest().sections {
            let _ = a.read(section);
            let _ = a.text(&section.kind);
        }
        let _ = a.certificate();
        for tensor in &a.manifest().tensors {
            let _ = a.weights().map(|w| w.tensor(&tensor.name).map(<[u8]>::len));
        }
        for program in a.programs("cpu").unwrap_or_default() {
            let m = &a.manifest().model;
            let (tokens, spans) = (program.max_tokens.into(), m.kv.spans(m.context_length.into()));
            let step = StepSize { tokens, rows: 1, spans };
            let arena = program.arena.at(step).expect("a checked arena does not overflow");
            for launch in &program.launches {
                assert!(launch.grid.at(step).is_some(), "a checked grid does not overflow");
                for arg in &launch.args {
                    if let Arg::Arena { offset, len } = arg {
                        let end = offset.at(step).zip(len.at(step)).and_then(|(o, l)| o.checked_add(l));
                        assert!(end.is_some_and(|e| e <= arena), "a checked range lies in the arena");
                    }
                }
            }
        }
    }
}

/// Header, one section's bytes, a manifest.
fn with_manifest(section: &[u8], manifest: &[u8]) -> Vec<u8> {
    let mut file = vec![0; PAGE as usize];
    file.extend_from_slice(section);
    file.resize(file.len().next_multiple_of(PAGE as usize), 0);
    let manifest_offset = file.len() as u64;
    file.extend_from_slice(manifest);
    let header = Header {
        major: VERSION.0,
        minor: VERSION.1,
        manifest_offset,
        manifest_len: manifest.len() as u64,
        file_len: file.len() as u64,
        manifest_hash: *blake3::hash(manifest).as_bytes(),
    };
    file[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
    file
}

/// A manifest in order whose only section are these programs.
fn manifest_for(programs: &[u8]) -> String {
    let (len, hash) = (programs.len(), blake3::hash(programs).to_hex());
    format!(
        r#"{{"generator":"fuzz","model":{{"name":"","architecture":"","layers":2,"hidden":8,"heads":2,"kv_heads":1,
        "head_dim":4,"vocab":16,"context_length":64,"parameters":1,"rope":[{{"inv_freq":[1,0.5],"mscale":1}}],
        "kv":{{"dtype":"f16","page_len":32,"span":32}},"eos":[],"bos":null}},"tensors":[],"sections":[{{"kind":"programs",
        "device":"cpu","offset":4096,"len":{len},"hash":"{hash}"}}]}}"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn seeds_and_findings_are_survived() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
        let mut count = 0;
        for folder in ["seeds", "regressions"] {
            let Ok(entries) = std::fs::read_dir(fuzz.join(folder).join("artifact_load")) else { continue };
            for entry in entries {
                artifact_load(&std::fs::read(entry.unwrap().path()).unwrap());
                count += 1;
            }
        }
        assert!(count >= 3, "the seeds are there");
        artifact_load(&[]);
    }

    /// The seeds are worth their place: each opens.
    #[test]
    fn wrapped_inputs_open() {
        let seed = |name: &str| {
            let path =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/artifact_load").join(name);
            std::fs::read(path).unwrap()[1..].to_vec()
        };
        let programs = seed("programs");
        let file = with_manifest(&programs, manifest_for(&programs).as_bytes());
        assert_eq!(
            Artifact::from_bytes(file, Verify::Full).unwrap().programs("cpu").map(<[_]>::len),
            Some(2)
        );
        Artifact::from_bytes(with_manifest(&[0; 4096], &seed("manifest")), Verify::None).unwrap();
        Artifact::from_bytes(seed("file"), Verify::Full).unwrap();
    }
}
