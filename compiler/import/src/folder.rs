//! A folder in the layout of the Hugging Face hub: `config.json`, safetensors, tokenizer, generation settings.

use crate::arch::{self, Architecture};
use crate::config;
use crate::container::{FileBytes, RowOrder, TensorEntry, TensorReader, safetensors};
use crate::error::{Error, ErrorKind, Problems, Result};
use crate::model::{Found, Imported, SourceFile, SourceInfo, Specials, Stored};
use crate::tokenizer;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bounds of the files that are read whole.
const MAX_CONFIG: u64 = 16 << 20;
const MAX_TOKENIZER: u64 = 512 << 20;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

pub(crate) fn open(folder: &Path) -> Result<Imported> {
    let mut problems = Problems::new();
    let mut files = Vec::new();
    let config = problems.keep(read_object(&folder.join("config.json"), &mut files));
    let arch = config
        .as_ref()
        .and_then(|c| problems.keep(architecture(c).map_err(|e| e.at_file(&folder.join("config.json")))));
    let model_config = config.as_ref().zip(arch).and_then(|(c, _)| {
        let mut found = Problems::new();
        let read = config::from_hf(c, &mut found);
        problems.extend(found.at_file(&folder.join("config.json")));
        read
    });
    let stored = problems.keep(tensors(folder, &mut files));
    let specials = problems.keep(specials(folder, config.as_ref(), &mut files));

    let (Some(arch), Some(config), Some(stored), Some(specials)) = (arch, model_config, stored, specials)
    else {
        return problems.finish(()).and_then(|()| Err(Error::malformed("a checkpoint", "none")));
    };
    let found = Found {
        arch,
        config,
        stored,
        rows: |_| RowOrder::AsStored,
        name_of: |spec| &spec.name,
        ignored: |name, tied| name.ends_with(".rotary_emb.inv_freq") || (tied && name == "lm_head.weight"),
        name: None,
        specials,
        source: SourceInfo { container: "safetensors", files },
    };
    found.import(problems)
}

fn architecture(config: &Map<String, Value>) -> Result<&'static Architecture> {
    let model_type = config.get("model_type").and_then(Value::as_str);
    let class = config.get("architectures").and_then(|v| v.get(0)).and_then(Value::as_str);
    let found = match (model_type, class) {
        (Some(t), class) => arch::by_model_type(t, class),
        (None, Some(class)) => arch::by_class(class),
        (None, None) => return Err(Error::config("model_type", "the name of an architecture", "nothing")),
    };
    found.ok_or_else(|| {
        let got = match (model_type, class) {
            (Some(t), Some(c)) => format!("{t} ({c})"),
            (t, c) => t.or(c).unwrap_or_default().to_owned(),
        };
        Error::new(ErrorKind::UnsupportedArchitecture { got, supported: arch::names() })
    })
}

/// Reads a JSON object and notes the file.
fn read_object(path: &Path, files: &mut Vec<SourceFile>) -> Result<Map<String, Value>> {
    let text = read_text(path, MAX_CONFIG, files)?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::malformed("a JSON object", "another JSON value").at_file(path)),
        Err(e) => Err(Error::malformed("JSON", e.to_string()).at_file(path)),
    }
}

fn read_text(path: &Path, limit: u64, files: &mut Vec<SourceFile>) -> Result<String> {
    let text = crate::container::read_text(path, limit)?;
    files.push(SourceFile { path: path.to_owned(), len: text.len() as u64 });
    Ok(text)
}

/// As [`read_text`], `None` when there is no such file.
fn read_optional(path: &Path, limit: u64, files: &mut Vec<SourceFile>) -> Result<Option<String>> {
    if path.exists() { read_text(path, limit, files).map(Some) } else { Ok(None) }
}

fn read_optional_object(path: &Path, files: &mut Vec<SourceFile>) -> Result<Map<String, Value>> {
    if path.exists() { read_object(path, files) } else { Ok(Map::new()) }
}

/// Tensors of all shards, by name.
fn tensors(folder: &Path, files: &mut Vec<SourceFile>) -> Result<Stored> {
    let index = folder.join(INDEX);
    let mut problems = Problems::new();
    // What the index says each shard holds; none for a single file.
    let mut shards: BTreeMap<PathBuf, Option<BTreeSet<String>>> = BTreeMap::new();
    if folder.join(SINGLE).exists() {
        // Where both exist, transformers reads the single file too.
        shards.insert(folder.join(SINGLE), None);
    } else if index.exists() {
        let object = read_object(&index, files)?;
        let Some(Value::Object(map)) = object.get("weight_map") else {
            return Err(Error::malformed("an object weight_map", "none").at_file(&index));
        };
        for (tensor, shard) in map {
            match shard.as_str().filter(|s| is_plain_name(s)) {
                Some(shard) => {
                    let held = shards.entry(folder.join(shard)).or_insert_with(|| Some(BTreeSet::new()));
                    held.get_or_insert_default().insert(tensor.clone());
                }
                None => {
                    let e = Error::malformed("the name of a file in the same folder", shard.to_string());
                    problems.push(e.at_file(&index).at_tensor(tensor));
                }
            }
        }
    } else {
        let mut found = list(folder, "safetensors")?;
        if found.len() != 1 {
            let kind = ErrorKind::NoCheckpoint {
                expected: "model.safetensors, model.safetensors.index.json or one other .safetensors file",
                got: format!("{} .safetensors files", found.len()),
            };
            return Err(Error::new(kind).at_file(folder));
        }
        shards.extend(found.pop().map(|path| (path, None)));
    }

    let mut stored = Stored::default();
    for (path, expected) in shards {
        if expected.is_some() && !path.exists() {
            problems.push(Error::new(ErrorKind::MissingShard { index: INDEX.to_owned() }).at_file(&path));
            stored.incomplete = true;
            continue;
        }
        let Some(file) = problems.keep(FileBytes::map(&path)).map(Arc::new) else {
            stored.incomplete = true;
            continue;
        };
        files.push(SourceFile { path: path.clone(), len: file.len() as u64 });
        let Some(entries) = problems.keep(safetensors::parse(&file).map_err(|e| e.at_file(&path))) else {
            stored.incomplete = true;
            continue;
        };
        let held: BTreeSet<&str> = entries.iter().map(|t| t.name.as_str()).collect();
        for tensor in expected.iter().flatten().filter(|t| !held.contains(t.as_str())) {
            let e = Error::malformed("the tensor, as the index says", "a file without it");
            problems.push(e.at_file(&path).at_tensor(tensor));
        }
        for entry in entries {
            add(&mut stored, &file, entry, &mut problems);
        }
    }
    stored.problems = problems;
    Ok(stored)
}

fn add(stored: &mut Stored, file: &Arc<FileBytes>, entry: TensorEntry, problems: &mut Problems) {
    let name = entry.name.clone();
    let reader = TensorReader { file: file.clone(), entry, rows: RowOrder::AsStored };
    if let Some(other) = stored.tensors.insert(name.clone(), reader) {
        let got = format!("another in {}", other.file.path.display());
        problems.push(Error::malformed("one tensor of each name", got).at_file(&file.path).at_tensor(name));
    }
}

/// Whether a shard's name stays inside the folder.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None))
}

/// Files of a folder with that extension, by name.
pub(crate) fn list(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("list", folder, &e))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("list", folder, &e))?.path();
        if path.extension().is_some_and(|x| x == extension) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Tokenizer, chat template, and the tokens with a meaning.
fn specials(
    folder: &Path,
    config: Option<&Map<String, Value>>,
    files: &mut Vec<SourceFile>,
) -> Result<Specials> {
    let mut problems = Problems::new();
    let settings = problems.keep(read_optional_object(&folder.join("tokenizer_config.json"), files));
    let settings = settings.unwrap_or_default();
    let generation = problems.keep(read_optional_object(&folder.join("generation_config.json"), files));
    let generation = generation.unwrap_or_default();
    let path = folder.join("tokenizer.json");
    let json = problems.keep(read_optional(&path, MAX_TOKENIZER, files)).flatten();
    let tokenizer =
        json.as_deref().and_then(|json| problems.keep(tokenizer::check(json).map_err(|e| e.at_file(&path))));
    let template =
        problems.keep(read_optional(&folder.join("chat_template.jinja"), MAX_CONFIG, files)).flatten();
    let template = template.or_else(|| match settings.get("chat_template") {
        Some(Value::String(s)) => Some(s.clone()),
        Some(Value::Array(list)) => list
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template")?.as_str())
            .map(str::to_owned),
        _ => None,
    });

    let ids = |object: Option<&Map<String, Value>>, key: &str| -> Vec<u32> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        match object.and_then(|o| o.get(key)) {
            Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
            Some(v) => one(v).into_iter().collect(),
            None => Vec::new(),
        }
    };
    let mut eos = ids(Some(&generation), "eos_token_id");
    for id in ids(config, "eos_token_id") {
        if !eos.contains(&id) {
            eos.push(id);
        }
    }
    let mut texts = BTreeMap::new();
    for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        let text = match settings.get(key) {
            Some(Value::String(s)) => Some(s.as_str()),
            Some(Value::Object(token)) => token.get("content").and_then(Value::as_str),
            _ => None,
        };
        if let Some(text) = text {
            texts.insert(key.to_owned(), text.to_owned());
        }
    }
    let id_of = |text: Option<&String>| tokenizer.as_ref().and_then(|t| t.token_to_id(text?));
    if let Some(id) = id_of(texts.get("eos_token")).filter(|_| eos.is_empty()) {
        eos.push(id);
    }
    let bos = id_of(texts.get("bos_token"))
        .or_else(|| ids(config, "bos_token_id").first().copied())
        .or_else(|| ids(Some(&generation), "bos_token_id").first().copied());
    let add_bos = settings.get("add_bos_token").and_then(Value::as_bool).unwrap_or_else(|| {
        // Nothing said: the tokenizer's own post-processor decides.
        let first = tokenizer.as_ref().and_then(|t| t.encode("", true).ok());
        bos.is_some() && first.and_then(|e| e.get_ids().first().copied()) == bos
    });
    problems.finish(Specials {
        eos,
        bos,
        add_bos: add_bos && bos.is_some(),
        texts,
        tokenizer_json: json,
        chat_template: template,
    })
}
