//! sentencepiece BPE (`tokenizer.ggml.model` = `llama`): pieces with scores, spaces written as `▁`, bytes as a fallback.
//!
//! Merges are every way to put a piece together from two others, best score first, as transformers derives them for its
//! fast Llama tokenizer. As there, and as in llama.cpp, text after a special token gets a space of its own.

use super::{TokenKind, Vocab, problem};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Bytes of a piece, at most: sentencepiece's trainers stop far below, and the work grows with the square.
const MAX_PIECE: usize = 512;
const SPACE: &str = "\u{2581}";

pub(super) fn json(vocab: &Vocab<'_>, scores: &[f64], unk: Option<u64>, prefix: bool) -> Result<Value> {
    let unk = match unk {
        None => None,
        Some(id) => {
            let token = usize::try_from(id).ok().and_then(|id| vocab.tokens.get(id).copied());
            let missing =
                || Error::config("tokenizer.ggml.unknown_token_id", "the id of a token", id.to_string());
            Some(token.ok_or_else(missing)?)
        }
    };
    let has_bytes = vocab.kinds.contains(&TokenKind::Byte);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocab.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unk,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": has_bytes,
            "ignore_merges": false,
            "vocab": vocab.ids(),
            "merges": merges(vocab, scores)?,
        },
    }))
}

/// Pairs in the order they are to be merged.
fn merges<'a>(vocab: &Vocab<'a>, scores: &[f64]) -> Result<Vec<[&'a str; 2]>> {
    struct Merge<'a> {
        score: f64,
        parts: [&'a str; 2],
        /// Characters of the parts.
        lens: [usize; 2],
    }
    let normal: BTreeMap<&str, usize> = vocab
        .tokens
        .iter()
        .zip(&vocab.kinds)
        .enumerate()
        .filter(|(_, (_, kind))| **kind == TokenKind::Normal)
        .map(|(id, (token, _))| (*token, id))
        .collect();
    let mut all: Vec<Merge<'a>> = Vec::new();
    for ((piece, kind), score) in vocab.tokens.iter().zip(&vocab.kinds).zip(scores) {
        if *kind != TokenKind::Normal {
            continue;
        }
        if piece.len() > MAX_PIECE {
            return Err(problem(format!(
                "pieces of at most {MAX_PIECE} bytes expected, got one of {}",
                piece.len()
            )));
        }
        let n_chars = piece.chars().count();
        let mut ways = Vec::new();
        for (chars, (at, _)) in piece.char_indices().enumerate().skip(1) {
            let parts = [&piece[..at], &piece[at..]];
            if let (Some(left), Some(right)) = (normal.get(parts[0]), normal.get(parts[1])) {
                ways.push((*left, *right, Merge { score: *score, parts, lens: [chars, n_chars - chars] }));
            }
        }
        ways.sort_by_key(|(left, right, _)| (*left, *right));
        all.extend(ways.into_iter().map(|(_, _, m)| m));
    }
    all.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| b.lens.cmp(&a.lens)));
    Ok(all.into_iter().map(|m| m.parts).collect())
}
