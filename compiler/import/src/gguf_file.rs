//! One `.gguf` file: metadata, tensors and tokenizer together.

use crate::arch;
use crate::config::{self, ModelConfig};
use crate::container::gguf::{self, Gguf};
use crate::container::{FileBytes, RowOrder, TensorReader};
use crate::error::{Error, ErrorKind, Problems, Result};
use crate::model::{Found, Imported, SourceFile, SourceInfo, Specials, Stored};
use crate::rope::RopeScaling;
use crate::tokenizer;
use attar_ir::WeightReader;
use std::collections::BTreeMap;
use std::sync::Arc;

/// llama.cpp's table of what Llama 3's rotation divides its frequencies by.
const ROPE_FACTORS: &str = "rope_freqs.weight";

pub(crate) fn open(file: FileBytes) -> Result<Imported> {
    let path = file.path.clone();
    read(Arc::new(file)).map_err(|e| e.at_file(&path))
}

fn read(file: Arc<FileBytes>) -> Result<Imported> {
    let gguf = gguf::parse(&file)?;
    let mut problems = Problems::new();
    let arch_name = gguf.text("general.architecture")?.unwrap_or_default();
    let Some(arch) = arch::by_gguf(arch_name) else {
        let supported = arch::ALL.iter().filter_map(|a| a.gguf).collect();
        let kind = ErrorKind::UnsupportedArchitecture { got: format!("{arch_name:?}"), supported };
        return Err(Error::new(kind).at_key("general.architecture"));
    };
    let split = gguf.unsigned("split.count")?.filter(|n| *n > 1);
    if let Some(n) = split {
        let kind = ErrorKind::Unsupported {
            got: format!("a model split over {n} files"),
            supported: "one file; join them with llama-gguf-split --merge".to_owned(),
        };
        return Err(Error::new(kind).at_key("split.count"));
    }
    let mut config = config::from_gguf(&gguf, arch_name, &mut problems);
    if let Some(config) = &mut config {
        let factors = rope_factors(&gguf, &file, config);
        if let Some(Some(factors)) = problems.keep(factors) {
            config.rope.scaling = RopeScaling::Factors(factors);
        }
    }
    let specials = problems.keep(specials(&gguf, &file));
    let (Some(config), Some(specials)) = (config, specials) else {
        return problems.finish(()).and_then(|()| Err(Error::malformed("a checkpoint", "none")));
    };
    let mut stored = Stored::default();
    for entry in gguf.tensors.iter().cloned() {
        let reader = TensorReader { file: file.clone(), entry, rows: RowOrder::AsStored };
        stored.tensors.insert(reader.entry.name.clone(), reader);
    }
    let interleaves = arch.gguf_interleaves;
    let found = Found {
        arch,
        config,
        stored,
        rows: if interleaves {
            |spec| spec.rotated_heads.map_or(RowOrder::AsStored, |heads| RowOrder::Interleaved { heads })
        } else {
            |_| RowOrder::AsStored
        },
        name_of: |spec| &spec.gguf,
        ignored: |name, _| name == ROPE_FACTORS,
        name: gguf.text("general.name").ok().flatten().map(str::to_owned),
        specials,
        source: SourceInfo {
            container: "gguf",
            files: vec![SourceFile { path: file.path.clone(), len: file.len() as u64 }],
        },
    };
    found.import(problems)
}

fn rope_factors(gguf: &Gguf, file: &Arc<FileBytes>, config: &ModelConfig) -> Result<Option<Vec<f64>>> {
    let Some(entry) = gguf.tensor(ROPE_FACTORS) else { return Ok(None) };
    let expected = vec![config.head_dim / 2];
    if entry.shape != expected {
        let kind = ErrorKind::Shape { expected, got: entry.shape.clone() };
        return Err(Error::new(kind).at_tensor(ROPE_FACTORS));
    }
    let reader = TensorReader { file: file.clone(), entry: entry.clone(), rows: RowOrder::AsStored };
    let factors: Vec<f64> = reader.read_f32()?.into_iter().map(f64::from).collect();
    match factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
        Some(f) => Err(Error::malformed("positive factors", f.to_string()).at_tensor(ROPE_FACTORS)),
        None => Ok(Some(factors)),
    }
}

fn specials(gguf: &Gguf, bytes: &[u8]) -> Result<Specials> {
    let rebuilt = tokenizer::from_gguf(gguf, bytes)?;
    let id = |key: &str| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{key}_token_id");
        let Some(id) = gguf.unsigned(&key)? else { return Ok(None) };
        let id = u32::try_from(id).map_err(|_| Error::config(&key, "the id of a token", id.to_string()))?;
        match &rebuilt {
            // llama.cpp marks absent tokens by the largest number.
            _ if id == u32::MAX => Ok(None),
            Some(r) if id as usize >= r.tokens.len() => {
                let expected = format!("an id below {}, the number of tokens", r.tokens.len());
                Err(Error::config(&key, expected, id.to_string()))
            }
            _ => Ok(Some(id)),
        }
    };
    let mut eos = Vec::new();
    for key in ["eos", "eot", "eom"] {
        if let Some(id) = id(key)?.filter(|id| !eos.contains(id)) {
            eos.push(id);
        }
    }
    let bos = id("bos")?;
    let mut texts = BTreeMap::new();
    for (name, key) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        let token = id(key)?.zip(rebuilt.as_ref()).and_then(|(id, r)| r.tokens.get(id as usize));
        if let Some(token) = token {
            texts.insert(name.to_owned(), token.clone());
        }
    }
    let usual = rebuilt.as_ref().is_some_and(|r| r.add_bos);
    let add_bos = gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(usual);
    Ok(Specials {
        eos,
        bos,
        add_bos: add_bos && bos.is_some(),
        texts,
        tokenizer_json: rebuilt.map(|r| r.json),
        chat_template: gguf.text("tokenizer.chat_template")?.map(str::to_owned),
    })
}
