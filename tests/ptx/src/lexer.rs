//! Words, numbers and punctuation of PTX text, each with its line.

use crate::error::{Error, ErrorKind, Result};

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Token {
    /// An identifier, opcode root, or register with its `%`.
    Word(String),
    /// A word behind a dot: a directive, modifier, type, or component. `::` belongs to it.
    Dot(String),
    Int(u64),
    /// `0f` and eight hex digits: bits of a single.
    F32(u32),
    /// `0d` and sixteen hex digits, or a decimal fraction: bits of a double.
    F64(u64),
    Text(String),
    Punct(char),
}

impl Token {
    pub(crate) fn show(&self) -> String {
        match self {
            Token::Word(w) => w.clone(),
            Token::Dot(w) => format!(".{w}"),
            Token::Int(i) => i.to_string(),
            Token::F32(bits) => format!("0f{bits:08X}"),
            Token::F64(bits) => format!("0d{bits:016X}"),
            Token::Text(t) => format!("{t:?}"),
            Token::Punct(c) => c.to_string(),
        }
    }
}

/// A token and its line, from 1.
pub(crate) type Spanned = (Token, u32);

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_' || c == b'$'
}

/// # Errors
/// A character that PTX does not have, a number that is none, an unclosed comment or text.
pub(crate) fn tokens(source: &str) -> Result<Vec<Spanned>> {
    let bytes = source.as_bytes();
    let mut out = Vec::new();
    let (mut at, mut line) = (0, 1u32);
    let fail = |expected: &str, found: String, line| {
        Err(Error::at_line(ErrorKind::Syntax { expected: expected.to_owned(), found }, line))
    };
    while let Some(&c) = bytes.get(at) {
        let next = bytes.get(at + 1).copied().unwrap_or(0);
        match c {
            b'\n' => {
                line += 1;
                at += 1;
            }
            b' ' | b'\t' | b'\r' => at += 1,
            b'/' if next == b'/' => {
                while bytes.get(at).is_some_and(|c| *c != b'\n') {
                    at += 1;
                }
            }
            b'/' if next == b'*' => {
                let start = line;
                at += 2;
                loop {
                    match bytes.get(at) {
                        None => return fail("the end of a comment", "end of text".to_owned(), start),
                        Some(b'*') if bytes.get(at + 1) == Some(&b'/') => break,
                        Some(b'\n') => line += 1,
                        Some(_) => {}
                    }
                    at += 1;
                }
                at += 2;
            }
            b'"' => {
                let start = at + 1;
                at = start;
                while bytes.get(at).is_some_and(|c| *c != b'"' && *c != b'\n') {
                    at += 1;
                }
                if bytes.get(at) != Some(&b'"') {
                    return fail("a closing quote", "end of line".to_owned(), line);
                }
                out.push((Token::Text(source[start..at].to_owned()), line));
                at += 1;
            }
            b'.' if is_word(next) => {
                let start = at + 1;
                at = start;
                while let Some(&c) = bytes.get(at) {
                    let colons = c == b':' && bytes.get(at + 1) == Some(&b':');
                    if colons {
                        at += 2;
                    } else if is_word(c) {
                        at += 1;
                    } else {
                        break;
                    }
                }
                out.push((Token::Dot(source[start..at].to_owned()), line));
            }
            b'0'..=b'9' => {
                let start = at;
                while bytes.get(at).is_some_and(|c| is_word(*c)) {
                    at += 1;
                }
                // A decimal fraction; NVRTC writes none, inline assembly may.
                let fraction = bytes.get(at) == Some(&b'.')
                    && bytes.get(at + 1).is_some_and(u8::is_ascii_digit)
                    && source[start..at].bytes().all(|c| c.is_ascii_digit());
                if fraction {
                    at += 1;
                    while bytes.get(at).is_some_and(|c| is_word(*c)) {
                        at += 1;
                    }
                }
                let text = &source[start..at];
                let Some(token) = number(text) else { return fail("a number", text.to_owned(), line) };
                out.push((token, line));
            }
            b'%' | b'_' | b'$' | b'a'..=b'z' | b'A'..=b'Z' => {
                let start = at;
                at += 1;
                while bytes.get(at).is_some_and(|c| is_word(*c)) {
                    at += 1;
                }
                out.push((Token::Word(source[start..at].to_owned()), line));
            }
            b'{' | b'}' | b'[' | b']' | b'(' | b')' | b'<' | b'>' | b',' | b';' | b':' | b'=' | b'+'
            | b'-' | b'@' | b'!' | b'|' => {
                out.push((Token::Punct(c as char), line));
                at += 1;
            }
            _ => {
                let found = source[at..].chars().next().map(|c| format!("{c:?}")).unwrap_or_default();
                return fail("PTX", found, line);
            }
        }
    }
    Ok(out)
}

fn number(text: &str) -> Option<Token> {
    if text.contains('.') {
        return text.parse::<f64>().ok().map(|x| Token::F64(x.to_bits()));
    }
    let radix = |digits: &str, radix| u64::from_str_radix(digits, radix).ok();
    if let Some(digits) = text.strip_prefix("0f").or(text.strip_prefix("0F")) {
        return (digits.len() == 8).then(|| radix(digits, 16)).flatten().map(|b| Token::F32(b as u32));
    }
    if let Some(digits) = text.strip_prefix("0d").or(text.strip_prefix("0D")) {
        return (digits.len() == 16).then(|| radix(digits, 16)).flatten().map(Token::F64);
    }
    let text = text.strip_suffix('U').unwrap_or(text);
    let value = if let Some(digits) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        radix(digits, 16)
    } else if let Some(digits) = text.strip_prefix("0b").or(text.strip_prefix("0B")) {
        radix(digits, 2)
    } else if text.len() > 1 && text.starts_with('0') {
        radix(&text[1..], 8)
    } else {
        text.parse().ok()
    };
    value.map(Token::Int)
}
