//! Tokenizers: `tokenizer.json` of a folder passed through, or the same file rebuilt from GGUF metadata.

mod bpe;
mod spm;

use crate::container::gguf::{Gguf, Value};
use crate::error::{Error, ErrorKind, Result};
use std::collections::BTreeSet;
use std::panic::catch_unwind;
use tokenizers::Tokenizer;

/// Reads a `tokenizer.json` and tries it, which proves that the runtime can.
///
/// # Errors
/// What the `tokenizers` crate finds wrong, by error or by panic: it indexes some tables by what the file says.
pub fn check(json: &str) -> Result<Tokenizer> {
    let attempt = || -> tokenizers::Result<Tokenizer> {
        let tokenizer = Tokenizer::from_bytes(json)?;
        for with_specials in [false, true] {
            let encoding = tokenizer.encode("A text, 12 times.", with_specials)?;
            tokenizer.decode(encoding.get_ids(), with_specials)?;
        }
        Ok(tokenizer)
    };
    match catch_unwind(attempt) {
        Ok(result) => result.map_err(|e| problem(format!("tokenizer.json: {e}"))),
        Err(_) => Err(problem("tokenizer.json: the tokenizers crate panics on it".to_owned())),
    }
}

/// Rebuilds a tokenizer from GGUF metadata. `None` when the file carries none (`no_vocab`, or no metadata at all).
///
/// # Errors
/// When the metadata is incomplete, contradicts itself, or needs a tokenizer that cannot be rebuilt.
pub fn from_gguf(gguf: &Gguf, bytes: &[u8]) -> Result<Option<Rebuilt>> {
    let vocab = match gguf.text("tokenizer.ggml.model")? {
        None | Some("no_vocab" | "none") => return Ok(None),
        Some("gpt2") => Vocab::read(gguf, bytes)?,
        Some("llama") => {
            let vocab = Vocab::read(gguf, bytes)?;
            let scores = numbers(gguf, bytes, "tokenizer.ggml.scores", vocab.tokens.len())?
                .ok_or_else(|| Error::config("tokenizer.ggml.scores", "one score per token", "nothing"))?;
            let prefix = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            let json = spm::json(&vocab, &scores, gguf.unsigned("tokenizer.ggml.unknown_token_id")?, prefix)?;
            return Rebuilt::new(&json, vocab, true).map(Some);
        }
        Some(other) => {
            let kind = ErrorKind::Unsupported {
                got: format!("tokenizer {other}"),
                supported: "gpt2 (byte-level BPE), llama (sentencepiece BPE)".to_owned(),
            };
            return Err(Error::new(kind).at_key("tokenizer.ggml.model"));
        }
    };
    let merges = gguf
        .array("tokenizer.ggml.merges")?
        .ok_or_else(|| Error::config("tokenizer.ggml.merges", "an array of texts", "nothing"))?
        .strings(bytes)
        .map_err(|e| e.at_key("tokenizer.ggml.merges"))?;
    let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let (json, add_bos) = bpe::json(&vocab, &merges, pre)?;
    Rebuilt::new(&json, vocab, add_bos).map(Some)
}

/// A tokenizer made from metadata.
#[derive(Debug)]
pub struct Rebuilt {
    /// As `tokenizer.json` would hold it.
    pub json: String,
    /// Texts by id.
    pub tokens: Vec<String>,
    /// Whether this kind of tokenizer begins a sequence with BOS when nothing says otherwise.
    pub add_bos: bool,
}

impl Rebuilt {
    fn new(json: &serde_json::Value, vocab: Vocab<'_>, add_bos: bool) -> Result<Rebuilt> {
        let json = json.to_string();
        check(&json)?;
        Ok(Rebuilt { json, tokens: vocab.tokens.iter().map(|t| (*t).to_owned()).collect(), add_bos })
    }
}

/// What GGUF says of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenKind {
    Normal,
    /// Matched whole in any text, never part of a merge; kept when decoding.
    UserDefined,
    /// Matched whole; left out when decoding.
    Special,
    Unused,
    Byte,
}

/// Tokens by id.
struct Vocab<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<TokenKind>,
}

impl<'a> Vocab<'a> {
    fn read(gguf: &Gguf, bytes: &'a [u8]) -> Result<Vocab<'a>> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        let tokens = gguf
            .array(TOKENS)?
            .ok_or_else(|| Error::config(TOKENS, "an array of texts", "nothing"))?
            .strings(bytes)
            .map_err(|e| e.at_key(TOKENS))?;
        if tokens.is_empty() {
            return Err(Error::config(TOKENS, "at least one token", "none"));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = tokens.iter().find(|t| !seen.insert(**t)) {
            return Err(Error::config(TOKENS, "tokens that differ", format!("{twice:?} twice")));
        }
        let kinds = match numbers(gguf, bytes, "tokenizer.ggml.token_type", tokens.len())? {
            None => vec![TokenKind::Normal; tokens.len()],
            Some(list) => list.into_iter().map(kind_of).collect::<Result<_>>()?,
        };
        Ok(Vocab { tokens, kinds })
    }

    /// `vocab` of `tokenizer.json`.
    fn ids(&self) -> serde_json::Map<String, serde_json::Value> {
        self.tokens.iter().enumerate().map(|(id, t)| ((*t).to_owned(), id.into())).collect()
    }

    /// `added_tokens` of `tokenizer.json`, in id order.
    fn added(&self) -> Vec<serde_json::Value> {
        let entry = |(id, (token, kind)): (usize, (&&str, &TokenKind))| {
            let special = *kind == TokenKind::Special;
            (special || *kind == TokenKind::UserDefined).then(|| {
                serde_json::json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special,
                })
            })
        };
        self.tokens.iter().zip(&self.kinds).enumerate().filter_map(entry).collect()
    }
}

fn kind_of(n: f64) -> Result<TokenKind> {
    // llama.cpp's undefined tokens (0) are plain vocabulary.
    const NAMES: [TokenKind; 7] = [
        TokenKind::Normal,
        TokenKind::Normal,
        TokenKind::Special,
        TokenKind::Special,
        TokenKind::UserDefined,
        TokenKind::Unused,
        TokenKind::Byte,
    ];
    NAMES
        .into_iter()
        .enumerate()
        .find(|(i, _)| *i as f64 == n)
        .map(|(_, k)| k)
        .ok_or_else(|| Error::config("tokenizer.ggml.token_type", "types from 0 to 6", n.to_string()))
}

/// An array of numbers with one entry per token.
fn numbers(gguf: &Gguf, bytes: &[u8], key: &str, count: usize) -> Result<Option<Vec<f64>>> {
    let Some(array) = gguf.array(key)? else { return Ok(None) };
    if array.count != count {
        return Err(Error::config(key, format!("{count} values, one per token"), array.count.to_string()));
    }
    let number = |v: Value| match v {
        Value::Unsigned(n) => Ok(n as f64),
        Value::Signed(n) => Ok(n as f64),
        Value::Float(x) => Ok(x),
        _ => Err(Error::config(key, "numbers", "something else")),
    };
    array.values(bytes)?.into_iter().map(number).collect::<Result<Vec<_>>>().map(Some)
}

fn problem(problem: String) -> Error {
    Error::new(ErrorKind::Tokenizer { problem })
}
