//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`): tokens and merges stand in the metadata, the pattern that cuts text
//! into words is named by `tokenizer.ggml.pre`.
//!
//! Patterns are those of the families' `tokenizer.json`; llama.cpp's own spellings of them, in `llama-vocab.cpp`, mean
//! the same. A GGUF does not say how text is normalized: Qwen's NFC is known from its name.

use super::Vocab;
use crate::error::{Error, ErrorKind, Result};
use serde_json::{Value, json};

/// How text of one family is cut before merging.
struct Pre {
    names: &'static [&'static str],
    nfc: bool,
    steps: &'static [Step],
    /// Whether GPT-2's own pattern is applied last.
    gpt2: bool,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    ignore_merges: bool,
    /// Whether BOS comes first unless the file says otherwise.
    add_bos: bool,
}

enum Step {
    /// Each digit alone.
    Digits,
    /// Matches alone, and what is between them.
    Split(&'static str),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

const PRES: [Pre; 8] = [
    Pre {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        nfc: false,
        steps: &[Step::Digits],
        gpt2: true,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"],
        nfc: false,
        steps: &[],
        gpt2: true,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        nfc: false,
        steps: &[Step::Split(LLAMA3)],
        gpt2: false,
        ignore_merges: true,
        add_bos: true,
    },
    Pre {
        names: &["dbrx", "smaug-bpe"],
        nfc: false,
        steps: &[Step::Split(LLAMA3)],
        gpt2: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["qwen2"],
        nfc: true,
        steps: &[Step::Split(QWEN2)],
        gpt2: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["deepseek-r1-qwen", "megrez", "stablelm2"],
        nfc: false,
        steps: &[Step::Split(QWEN2)],
        gpt2: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["tekken"],
        nfc: false,
        steps: &[Step::Split(TEKKEN)],
        gpt2: false,
        ignore_merges: true,
        add_bos: true,
    },
    // What llama.cpp falls back to.
    Pre {
        names: &["default"],
        nfc: false,
        steps: &[
            Step::Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Split(GPT2),
            Step::Split(r"\p{N}+"),
            Step::Split("[0-9][0-9][0-9]"),
        ],
        gpt2: false,
        ignore_merges: false,
        add_bos: false,
    },
];

/// The file, and whether sequences of this family begin with BOS.
pub(super) fn json(vocab: &Vocab<'_>, merges: &[&str], pre: &str) -> Result<(Value, bool)> {
    let Some(pre) = PRES.iter().find(|p| p.names.contains(&pre)) else {
        let names: Vec<&str> = PRES.iter().flat_map(|p| p.names.iter().copied()).collect();
        let kind =
            ErrorKind::Unsupported { got: format!("pre-tokenizer {pre}"), supported: names.join(", ") };
        return Err(Error::new(kind).at_key("tokenizer.ggml.pre"));
    };
    let mut pairs = Vec::with_capacity(merges.len());
    for (i, merge) in merges.iter().enumerate() {
        // The first symbol is never empty, so a space at the start belongs to it.
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let Some((left, right)) = at.map(|at| (&merge[..at], &merge[at + 1..])) else {
            let got = format!("{merge:?} as entry {i}");
            return Err(Error::config("tokenizer.ggml.merges", "two texts with a space between", got));
        };
        pairs.push([left, right]);
    }
    let mut steps: Vec<Value> = pre
        .steps
        .iter()
        .map(|s| match s {
            Step::Digits => json!({"type": "Digits", "individual_digits": true}),
            Step::Split(p) => {
                json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false})
            }
        })
        .collect();
    steps.push(byte_level(pre.gpt2));
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocab.added(),
        "normalizer": if pre.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocab.ids(),
            "merges": pairs,
        },
    });
    Ok((file, pre.add_bos))
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}
