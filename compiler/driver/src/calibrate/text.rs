//! Calibration text: files, chats and tokens, cut into windows.
//!
//! Plain text is tokenized as one piece. A `.jsonl` file has one JSON object per line, with a string `text` or a list
//! `messages` that goes through the model's chat template; their tokens stand one behind the other. Window `i` is
//! `tokens[C i .. C (i + 1)]`; when there are more than wanted, they are taken evenly from the whole text. Where the
//! tokenizer puts a beginning-of-sequence token in front, it replaces the first token of every window.

use attar_pass::{Error, ErrorKind, Result};
use attar_runtime::{ChatTemplate, Tokenizer};
use std::path::Path;

/// What of a model's checkpoint turns text into tokens.
#[derive(Debug)]
pub(crate) struct Language {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
}

/// Reads a file and cuts it into at most `most` windows of `context` tokens.
///
/// # Errors
/// [`ErrorKind::Calibration`] when the file cannot be read, is empty, is no text, or is shorter than one window.
pub(crate) fn windows_of_file(
    path: &Path,
    language: &Language,
    context: usize,
    most: usize,
) -> Result<Vec<Vec<u32>>> {
    let name = path.display();
    let bytes = std::fs::read(path).map_err(|e| problem(format!("{name}: cannot read it: {e}")))?;
    let text = text_of(&bytes).map_err(|e| problem(format!("{name}: {e}")))?;
    let is_jsonl = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
    let tokens = if is_jsonl {
        tokens_of_jsonl(text, language).map_err(|e| problem(format!("{name}: {e}")))?
    } else {
        encode(language, text.strip_suffix('\n').unwrap_or(text), true)?
    };
    let bos = encode(language, "", true)?.first().copied();
    cut(&tokens, bos, context, most).map_err(|e| problem(format!("{name}: {e}")))
}

/// Bytes as text with something in it.
fn text_of(bytes: &[u8]) -> std::result::Result<&str, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        format!("is no text: byte {} is not UTF-8; give plain text or JSONL", e.valid_up_to())
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some(at) = text.bytes().position(|b| b == 0) {
        return Err(format!("is no text: byte {at} is zero; give plain text or JSONL"));
    }
    if text.trim().is_empty() {
        return Err("is empty".to_owned());
    }
    Ok(text)
}

fn tokens_of_jsonl(text: &str, language: &Language) -> std::result::Result<Vec<u32>, String> {
    let mut tokens = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = |e: String| format!("line {}: {e}", number + 1);
        let value: serde_json::Value = serde_json::from_str(line).map_err(|e| at(e.to_string()))?;
        let more = match (value.get("text"), value.get("messages")) {
            (Some(serde_json::Value::String(text)), _) => encode(language, text, true),
            (None, Some(messages @ serde_json::Value::Array(_))) => {
                let Some(template) = &language.template else {
                    return Err(
                        at("`messages` need a chat template, and the checkpoint has none".to_owned()),
                    );
                };
                let text =
                    template.render_json(&messages.to_string(), false).map_err(|e| at(e.to_string()))?;
                encode(language, &text, false)
            }
            _ => return Err(at("expected a string `text` or a list `messages`".to_owned())),
        };
        tokens.extend(more.map_err(|e| at(e.to_string()))?);
    }
    Ok(tokens)
}

fn encode(language: &Language, text: &str, special: bool) -> Result<Vec<u32>> {
    language.tokenizer.encode(text, special).map_err(|e| problem(e.to_string()))
}

/// Cuts tokens into windows.
fn cut(
    tokens: &[u32],
    bos: Option<u32>,
    context: usize,
    most: usize,
) -> std::result::Result<Vec<Vec<u32>>, String> {
    let there = tokens.len() / context;
    if there == 0 {
        return Err(format!(
            "has {} tokens, and one window takes {context}; give more text or a smaller --calibration-context",
            tokens.len()
        ));
    }
    let count = there.min(most);
    let window = |i: usize| {
        let at = i * there / count * context;
        let mut window = tokens[at..at + context].to_vec();
        if let (Some(bos), Some(first)) = (bos, window.first_mut()) {
            *first = bos;
        }
        window
    };
    Ok((0..count).map(window).collect())
}

pub(crate) fn problem(problem: String) -> Error {
    Error::new(ErrorKind::Calibration { problem })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_taken_evenly() {
        let tokens: Vec<u32> = (0..50).collect();
        let starts = |most| -> Vec<u32> {
            cut(&tokens, None, 5, most).expect("windows").iter().map(|w| w[0]).collect()
        };
        assert_eq!(starts(3), [0, 15, 30]);
        assert_eq!(starts(100).len(), 10);
        assert_eq!(cut(&tokens, Some(7), 20, 2).expect("windows")[1][..2], [7, 21]);
        assert!(cut(&tokens, None, 51, 2).expect_err("too short").contains("has 50 tokens"));
    }

    #[test]
    fn what_is_no_text_is_refused() {
        for (bytes, said) in [
            (&b""[..], "empty"),
            (b" \n\t", "empty"),
            (b"\xef\xbb\xbf", "empty"),
            (b"ab\xff", "byte 2 is not UTF-8"),
            (b"a\0b", "byte 1 is zero"),
        ] {
            assert!(text_of(bytes).expect_err("no text").contains(said), "{bytes:?}");
        }
        assert_eq!(text_of(b"\xef\xbb\xbfabc"), Ok("abc"));
    }
}
