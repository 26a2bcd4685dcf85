//! Tokens of the text form. One pass, no recursion, nothing kept but the token looked ahead.

use crate::error::{Error, ErrorKind, Result};

/// Longest text that is read: far above any model's, and line numbers stay within 32 bits.
const MAX_BYTES: usize = 256 << 20;

/// Longest piece of the text that a message repeats, in characters.
const SHOWN: usize = 40;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token<'t> {
    Word(&'t str),
    /// `%name` and its `#slot`.
    Percent(&'t str, Option<u16>),
    At(&'t str),
    AtQuoted(String),
    Int(i64),
    Float(f64),
    Quoted(String),
    /// One of `( ) { } [ ] , : =`, or `>` for the arrow.
    Punct(char),
    End,
}

/// A byte offset in the text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place(usize);

pub(super) struct Lexer<'t> {
    text: &'t str,
    at: usize,
    /// The next token and where the text goes on behind it.
    ahead: Option<(Token<'t>, usize)>,
}

/// Whether a byte may stand in a name.
pub(super) fn is_name_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_' || b == b'.'
}

/// The text, or its beginning when it is long.
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl<'t> Lexer<'t> {
    pub(super) fn new(text: &'t str) -> Lexer<'t> {
        Lexer { text, at: 0, ahead: None }
    }

    /// Where the next token starts.
    pub(super) fn place(&mut self) -> Place {
        self.skip_blanks();
        Place(self.at)
    }

    /// Line and column of a place, from 1; columns count characters.
    pub(super) fn position(&self, place: Place) -> (u32, u32) {
        let before = &self.text[..place.0];
        let line = before.bytes().filter(|b| *b == b'\n').count();
        let start = before.rfind('\n').map_or(0, |at| at + 1);
        (line as u32 + 1, before[start..].chars().count() as u32 + 1)
    }

    pub(super) fn error(&self, place: Place, expected: &str, got: Token<'_>) -> Error {
        let got = match got {
            Token::Word(w) => shortened(w),
            Token::Percent(name, None) => format!("%{}", shortened(name)),
            Token::Percent(name, Some(slot)) => format!("%{}#{slot}", shortened(name)),
            Token::At(name) => format!("@{}", shortened(name)),
            Token::AtQuoted(name) => format!("@{:?}", shortened(&name)),
            Token::Int(v) => v.to_string(),
            Token::Float(v) => format!("{v:?}"),
            Token::Quoted(v) => format!("{:?}", shortened(&v)),
            Token::Punct('>') => "->".to_owned(),
            Token::Punct(c) => c.to_string(),
            Token::End => "the end of the text".to_owned(),
        };
        self.syntax(place, expected, got)
    }

    fn syntax(&self, place: Place, expected: &str, got: String) -> Error {
        let (line, column) = self.position(place);
        Error::new(ErrorKind::Syntax { expected: expected.to_owned(), got }).at_line(line, column)
    }

    pub(super) fn peek(&mut self) -> Result<&Token<'t>> {
        let read = match self.ahead.take() {
            Some(read) => read,
            None => {
                self.skip_blanks();
                let start = self.at;
                let token = self.read();
                let end = std::mem::replace(&mut self.at, start);
                (token?, end)
            }
        };
        Ok(&self.ahead.insert(read).0)
    }

    pub(super) fn next(&mut self) -> Result<Token<'t>> {
        if let Some((token, end)) = self.ahead.take() {
            self.at = end;
            return Ok(token);
        }
        self.skip_blanks();
        self.read()
    }

    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn skip_blanks(&mut self) {
        let bytes = self.text.as_bytes();
        while let Some(b) = bytes.get(self.at) {
            if *b == b';' {
                self.at = self.rest().find('\n').map_or(bytes.len(), |n| self.at + n);
            } else if b.is_ascii_whitespace() {
                self.at += 1;
            } else {
                return;
            }
        }
    }

    /// Takes the longest run of bytes that satisfy `of`, which must hold for ASCII only.
    fn run(&mut self, of: impl Fn(u8) -> bool) -> &'t str {
        let rest = self.rest();
        let len = rest.bytes().position(|b| !of(b)).unwrap_or(rest.len());
        self.at += len;
        &rest[..len]
    }

    fn read(&mut self) -> Result<Token<'t>> {
        let place = Place(self.at);
        if self.text.len() > MAX_BYTES {
            return Err(self.syntax(
                Place(0),
                "at most 256 MiB of text",
                format!("{} bytes", self.text.len()),
            ));
        }
        let Some(first) = self.rest().chars().next() else { return Ok(Token::End) };
        match first {
            '(' | ')' | '{' | '}' | '[' | ']' | ',' | ':' | '=' => {
                self.at += 1;
                Ok(Token::Punct(first))
            }
            '-' if self.rest().starts_with("->") => {
                self.at += 2;
                Ok(Token::Punct('>'))
            }
            '%' => {
                self.at += 1;
                let name = self.run(is_name_byte);
                if name.is_empty() {
                    return Err(self.syntax(place, "a name after %", shortened(self.rest())));
                }
                if !self.rest().starts_with('#') {
                    return Ok(Token::Percent(name, None));
                }
                self.at += 1;
                let digits = self.run(|b| b.is_ascii_digit());
                match digits.parse() {
                    Ok(slot) => Ok(Token::Percent(name, Some(slot))),
                    Err(_) => Err(self.syntax(place, "a small number after #", shortened(digits))),
                }
            }
            '@' => {
                self.at += 1;
                if self.rest().starts_with('"') {
                    return Ok(Token::AtQuoted(self.string(place)?));
                }
                let name = self.run(is_name_byte);
                if name.is_empty() {
                    return Err(self.syntax(place, "a name after @", shortened(self.rest())));
                }
                Ok(Token::At(name))
            }
            '"' => Ok(Token::Quoted(self.string(place)?)),
            '-' | '+' | '0'..='9' => self.number(place),
            c if c.is_ascii_alphabetic() || c == '_' => Ok(Token::Word(self.run(is_name_byte))),
            c => Err(self.syntax(place, "a token of the text form", format!("{c:?}"))),
        }
    }

    fn number(&mut self, place: Place) -> Result<Token<'t>> {
        let digits = self.run(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'+'));
        if let Ok(v) = digits.parse::<i64>() {
            return Ok(Token::Int(v));
        }
        let has_point = digits.bytes().any(|b| matches!(b, b'.' | b'e' | b'E'));
        match digits.parse::<f64>() {
            Ok(v) if v.is_finite() && has_point => Ok(Token::Float(v)),
            _ => Err(self.syntax(place, "a number that 64 bits can hold", shortened(digits))),
        }
    }

    /// A quoted string; the place is where to report that it does not end.
    fn string(&mut self, place: Place) -> Result<String> {
        let mut out = String::new();
        let mut chars = self.rest().char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.at += at + 1;
                    return Ok(out);
                }
                '\\' => {
                    let escaped = match chars.next().map(|(_, c)| c) {
                        Some(c @ ('"' | '\\')) => Some(c),
                        Some('n') => Some('\n'),
                        Some('u') => {
                            let braced = chars.by_ref().map(|(_, c)| c).take(10).skip_while(|c| *c == '{');
                            let hex: String = braced.take_while(|c| *c != '}').collect();
                            u32::from_str_radix(&hex, 16).ok().and_then(char::from_u32)
                        }
                        _ => None,
                    };
                    match escaped {
                        Some(c) => out.push(c),
                        None => {
                            let got = "another one".to_owned();
                            return Err(self.syntax(place, r#"an escape \", \\, \n or \u{…}"#, got));
                        }
                    }
                }
                '\n' => break,
                c => out.push(c),
            }
        }
        Err(self.syntax(place, "a string that ends on its line", "no closing quote".to_owned()))
    }
}
