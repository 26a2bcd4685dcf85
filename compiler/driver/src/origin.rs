//! What an artifact was made from and how, beside its passes: the `[made]` table of its recipe. With it and the checkpoint the
//! same bytes can be made again.

use crate::calibrate::CalibrationSource;
use crate::certify::Certify;
use crate::error::{Error, ErrorKind, Result};
use crate::inputs::InputFile;
use crate::session::{CompileOptions, registry_with};
use attar_artifact::Artifact;
use attar_artifact::manifest::{KvType, SectionKind};
use attar_codegen_cpu::Target;
use attar_codegen_cuda::CudaTarget;
use attar_pass::{Phase, Recipe};
use attar_plugin_host::Plugin;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How an artifact was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// `attar 0.1.0`.
    pub by: String,
    /// In the order of the code sections.
    pub targets: Vec<String>,
    /// Version of the compiler of code for GPUs, where there is any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvrtc: Option<String>,
    pub kv: KvType,
    pub context: u32,
    /// The passes that always run.
    pub default_passes: Vec<String>,
    /// Present when a pass asked for it.
    pub calibration: Option<CalibrationOrigin>,
    /// Present when there was to be a certificate.
    pub certificate: Option<CertificateOrigin>,
    /// Plugins whose passes ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plugins: Vec<PluginOrigin>,
    /// Files of the checkpoint.
    pub inputs: Vec<InputFile>,
}

/// A plugin whose passes ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginOrigin {
    pub name: String,
    pub version: String,
    /// Of the library, hexadecimal.
    pub blake3: String,
}

impl PluginOrigin {
    pub(crate) fn of(plugin: &Plugin) -> PluginOrigin {
        let (name, version) = (plugin.name.clone(), plugin.version.clone());
        PluginOrigin { name, version, blake3: plugin.blake3.clone() }
    }
}

/// The text that errors were weighed by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationOrigin {
    pub source: CalibrationKind,
    pub windows: usize,
    pub context: usize,
    /// Of the text's tokens, hexadecimal.
    pub blake3: String,
}

/// [`CalibrationSource`] without its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CalibrationKind {
    Sampled,
    File,
    Saved,
}

/// The text that quality was measured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateOrigin {
    /// `None` for the built-in text.
    pub text: Option<String>,
    pub windows: usize,
}

#[derive(Serialize, Deserialize)]
struct Document {
    made: Origin,
}

impl Origin {
    /// The table, for the beginning of a recipe.
    pub(crate) fn to_toml(&self) -> Result<String> {
        let document = Document { made: self.clone() };
        toml::to_string(&document).map_err(|e| {
            Error::new(Phase::Package, ErrorKind::Bug { problem: format!("origin of the artifact: {e}") })
        })
    }
}

/// What the user gives again to have an artifact made again: texts are not kept in artifacts.
#[derive(Clone, Debug, Default)]
pub struct Again {
    /// Calibration text, or saved statistics.
    pub calibration: Option<PathBuf>,
    /// Name and contents of the text of the certificate.
    pub certify: Option<(String, String)>,
    /// Plugins the recipe needs.
    pub plugins: Vec<Plugin>,
}

/// Options that make an artifact again.
#[derive(Clone, Debug)]
pub struct Remake {
    pub options: CompileOptions,
    pub origin: Origin,
}

/// How an artifact was made, as options of a compile of `source` to `out`.
///
/// # Errors
/// When the artifact does not say how it was made, or a text is needed that `again` has not.
pub fn remake(artifact: &Artifact, source: PathBuf, out: PathBuf, again: Again) -> Result<Remake> {
    let refuse = |problem: String| Error::option("--from", problem);
    let read = artifact.text(&SectionKind::Recipe);
    let text = read.map_err(|e| Error::new(Phase::Import, ErrorKind::Artifact(e)))?;
    let text = text.ok_or_else(|| refuse("the artifact holds no recipe".to_owned()))?;
    let document: std::result::Result<Document, _> = toml::from_str(&text);
    let Document { made: origin } = document.map_err(|e| {
        let problem = e.message();
        refuse(format!(
            "the artifact does not say how it was made ({problem}); compile it again from its recipe"
        ))
    })?;
    if let Some(lost) = origin.plugins.iter().find(|o| !again.plugins.iter().any(|p| p.blake3 == o.blake3)) {
        return Err(refuse(format!(
            "it was made with plugin {} {}, whose library has the hash {}; give that with --plugin",
            lost.name, lost.version, lost.blake3
        )));
    }
    let recipe = Recipe::parse(&text, "the artifact's recipe", &registry_with(&again.plugins)?)?;
    let (mut targets, mut cuda) = (Vec::new(), Vec::new());
    for name in &origin.targets {
        match (Target::by_name(name), CudaTarget::by_name(name)) {
            (Some(cpu), _) => targets.push(cpu),
            (None, Some(gpu)) => cuda.push(gpu),
            (None, None) => return Err(refuse(format!("this version makes no code for {name}"))),
        }
    }
    let mut options = CompileOptions::new(source, recipe, targets, out);
    options.cuda = cuda;
    options.plugins = again.plugins;
    options.kv = Some(origin.kv);
    options.context_length = Some(origin.context);
    if let Some(c) = &origin.calibration {
        let file = || {
            again.calibration.clone().ok_or_else(|| {
                refuse(match c.source {
                    CalibrationKind::Saved => {
                        "its calibration was read from a file; give it with --calibration".to_owned()
                    }
                    _ => "its calibration text was a file; give it with --calibrate".to_owned(),
                })
            })
        };
        options.calibration.source = match c.source {
            CalibrationKind::Sampled => CalibrationSource::Sampled,
            CalibrationKind::File => CalibrationSource::File(file()?),
            CalibrationKind::Saved => CalibrationSource::Saved(file()?),
        };
        options.calibration.windows = c.windows;
        options.calibration.context = c.context;
    }
    if let Some(c) = &origin.certificate {
        options.certify_windows = c.windows;
        options.certify = match (&c.text, again.certify) {
            (None, _) => Certify::BuiltIn,
            (Some(_), Some((name, text))) => Certify::Text { name, text },
            (Some(name), None) => {
                return Err(refuse(format!(
                    "its certificate was measured on {name}; give it with --certify"
                )));
            }
        };
    }
    Ok(Remake { options, origin })
}

impl Origin {
    /// The first file of the checkpoint that is not as it was, if there is one.
    pub fn changed_input(&self, inputs: &[InputFile]) -> Option<String> {
        let lost = self.inputs.iter().find(|i| !inputs.contains(i));
        let new = inputs.iter().find(|i| !self.inputs.contains(i));
        match (lost, new) {
            (Some(was), _) => Some(match inputs.iter().find(|i| i.name == was.name) {
                Some(_) => format!("{} is another file than the artifact was made from", was.name),
                None => format!("{}, which the artifact was made from, is not there", was.name),
            }),
            (None, Some(new)) => Some(format!("{} is no file that the artifact was made from", new.name)),
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::registry;

    #[test]
    fn an_origin_survives_its_text() {
        let input = |name: &str| InputFile { name: name.to_owned(), bytes: 3, blake3: "ab".to_owned() };
        let mut origin = Origin {
            by: "attar 0".to_owned(),
            targets: vec!["x86-64-v3".to_owned(), "cuda:sm_80".to_owned()],
            nvrtc: Some("13.0".to_owned()),
            kv: KvType::Int8,
            context: 64,
            default_passes: vec!["fuse-qkv".to_owned()],
            calibration: Some(CalibrationOrigin {
                source: CalibrationKind::File,
                windows: 8,
                context: 32,
                blake3: "cd".to_owned(),
            }),
            certificate: Some(CertificateOrigin { text: None, windows: 4 }),
            plugins: vec![PluginOrigin {
                name: "mine".to_owned(),
                version: "0.1.0".to_owned(),
                blake3: "ef".to_owned(),
            }],
            inputs: vec![input("a \"b\"\\c"), input("d")],
        };
        for _ in 0..2 {
            let text = origin.to_toml().unwrap() + "\n[[pass]]\nname = \"quantize-rtn\"\nformat = \"n4\"\n";
            let read: Document = toml::from_str(&text).unwrap();
            assert_eq!(read.made, origin);
            let recipe = Recipe::parse(&text, "t", &registry().unwrap()).unwrap();
            assert_eq!(recipe.steps.len(), 1);
            (origin.calibration, origin.certificate) = (None, None);
        }
        assert_eq!(origin.changed_input(&origin.inputs), None);
        let other = InputFile { bytes: 4, ..input("d") };
        let said = origin.changed_input(&[origin.inputs[0].clone(), other]).unwrap();
        assert!(said.contains("d is another file"), "{said}");
        assert!(origin.changed_input(&origin.inputs[..1]).unwrap().contains("not there"));
        let more = [origin.inputs.clone(), vec![input("e")]].concat();
        assert!(origin.changed_input(&more).unwrap().contains("e is no file"));
    }
}
