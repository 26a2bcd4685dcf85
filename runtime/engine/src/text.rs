//! Text to tokens and back.
//!
//! Encoding is the `tokenizers` crate's, over the tables of [`crate::byte_pairs`] where an artifact has them. Decoding goes token by token through a table of each token's bytes, so that a
//! stream costs nothing per token that grows, and never splits a character. The table exists for the decoders that
//! language models use (byte level; SentencePiece with byte fallback; metaspace); other decoders decode the whole
//! stream again for each token.

use crate::byte_pairs::{BytePairs, Words};
use crate::error::{ErrorKind, Result, TokenizerFault};
use attar_artifact::vocabulary::Vocabulary;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::sync::Arc;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PaddingParams, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerBuilder, TokenizerImpl, TruncationParams,
};

/// The `tokenizers` crate's tokenizer, over any source of words.
type Encoder =
    TokenizerImpl<Words, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Encoder,
    table: Option<Table>,
}

/// The bytes of every token.
#[derive(Debug)]
struct Table {
    bytes: Vec<u8>,
    /// Where token i ends.
    ends: Vec<u32>,
    /// Special tokens: they are no text.
    special: Vec<bool>,
    start: Start,
    longest: usize,
}

/// What happens to the first text of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Nothing,
    /// Up to that many leading spaces are dropped.
    Strip(usize),
    /// The first token loses all its spaces.
    Metaspace,
}

/// Calls the `tokenizers` crate, which trusts its files: one that was made to harm may make it panic.
fn guarded<T>(
    call: impl FnOnce() -> std::result::Result<T, TokenizerFault>,
) -> std::result::Result<T, TokenizerFault> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err("the tokenizer's file is damaged: reading it failed half-way".into()))
}

/// A `tokenizer.json` whose model is elsewhere.
#[derive(Deserialize)]
struct Settings {
    version: String,
    truncation: Option<TruncationParams>,
    padding: Option<PaddingParams>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    model: Box<RawValue>,
}

/// Puts a tokenizer together as the library does when it reads the JSON.
fn encoder(vocabulary: Vocabulary) -> std::result::Result<Encoder, TokenizerFault> {
    let settings: Settings = serde_json::from_str(&vocabulary.settings)?;
    if settings.version != "1.0" {
        return Err(format!("unknown tokenizer version {}", settings.version).into());
    }
    let mut out = TokenizerBuilder::new()
        .with_model(Words::Tables(BytePairs::new(vocabulary, &settings.model)?))
        .with_truncation(settings.truncation)
        .with_padding(settings.padding)
        .with_normalizer(settings.normalizer)
        .with_pre_tokenizer(settings.pre_tokenizer)
        .with_post_processor(settings.post_processor)
        .with_decoder(settings.decoder)
        .build()?;
    out.add_tokens(&settings.added_tokens);
    Ok(out)
}

impl Tokenizer {
    /// Reads the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] when it is no such text.
    pub fn from_json(json: &str) -> Result<Tokenizer> {
        let fail = |source: TokenizerFault| ErrorKind::Tokenizer { action: "be read", source };
        let inner = guarded(|| Ok(serde_json::from_str::<Encoder>(json)?)).map_err(fail)?;
        let table = Table::of(&inner);
        Ok(Tokenizer { shared: Arc::new(Shared { inner, table }) })
    }

    /// The tokenizer of an artifact's `vocabulary` section: the same as of its `tokenizer.json`.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] when the section's settings are not such a file's.
    pub fn from_vocabulary(vocabulary: Vocabulary) -> Result<Tokenizer> {
        let fail = |source: TokenizerFault| ErrorKind::Tokenizer { action: "be read", source };
        let inner = guarded(|| encoder(vocabulary)).map_err(fail)?;
        let table = Table::of(&inner);
        Ok(Tokenizer { shared: Arc::new(Shared { inner, table }) })
    }

    /// Tokens of a text. With `special`, the tokenizer adds what it puts around a text (a beginning-of-sequence token,
    /// if it has one); leave it out for text that a chat template made.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`].
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let fail = |source: TokenizerFault| ErrorKind::Tokenizer { action: "encode the text", source };
        let encoding = guarded(|| self.shared.inner.encode_fast(text, special)).map_err(fail)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens; special tokens are left out, and bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut out = String::new();
        let mut stream = self.stream();
        for &t in tokens {
            stream.push(t, &mut out);
        }
        stream.finish(&mut out);
        out
    }

    /// A decoder for tokens that come one at a time.
    pub fn stream(&self) -> Detokenizer {
        Detokenizer {
            shared: Arc::clone(&self.shared),
            pending: Vec::with_capacity(16 + self.shared.table.as_ref().map_or(0, |t| t.longest)),
            started: false,
            stripped: 0,
            ids: Vec::new(),
            emitted: 0,
        }
    }

    /// A token's name in the vocabulary, e.g. `<|im_end|>`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.shared.inner.id_to_token(id)
    }

    /// Number of a token, by its name in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// Most bytes of text that one token stands for, as far as that is known.
    pub(crate) fn longest_token(&self) -> usize {
        self.shared.table.as_ref().map_or(0, |t| t.longest)
    }
}

/// Decodes a stream of tokens: what is appended adds up to what [`Tokenizer::decode`] gives for all of them.
#[derive(Debug)]
pub struct Detokenizer {
    shared: Arc<Shared>,
    /// Bytes that do not make a whole character yet.
    pending: Vec<u8>,
    started: bool,
    /// Leading spaces dropped so far.
    stripped: usize,
    /// Without a table: all tokens, and the bytes of their text appended so far.
    ids: Vec<u32>,
    emitted: usize,
}

impl Detokenizer {
    /// Appends to `out` the characters that `token` completes.
    pub fn push(&mut self, token: u32, out: &mut String) {
        let Some(table) = &self.shared.table else {
            self.ids.push(token);
            self.decode_all(false, out);
            return;
        };
        let id = token as usize;
        if table.special.get(id).copied().unwrap_or(true) {
            return;
        }
        let begin = id.checked_sub(1).and_then(|i| table.ends.get(i)).copied().unwrap_or(0) as usize;
        let end = table.ends.get(id).copied().unwrap_or(0) as usize;
        let mut bytes = table.bytes.get(begin..end).unwrap_or_default();
        match table.start {
            Start::Metaspace if !self.started => {
                self.pending.extend(bytes.iter().filter(|b| **b != b' '));
                bytes = &[];
            }
            Start::Strip(most) => {
                while !self.started && self.stripped < most {
                    let Some((b' ', rest)) = bytes.split_first() else { break };
                    self.stripped += 1;
                    bytes = rest;
                }
                self.started |= self.stripped == most || !bytes.is_empty();
            }
            _ => {}
        }
        if table.start != Start::Nothing && !matches!(table.start, Start::Strip(_)) {
            self.started = true;
        }
        self.pending.extend_from_slice(bytes);
        self.release(false, out);
    }

    /// Appends what is left: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if self.shared.table.is_none() {
            self.decode_all(true, out);
        }
        self.release(true, out);
    }

    fn release(&mut self, end: bool, out: &mut String) {
        let mut done = 0;
        loop {
            let rest = self.pending.get(done..).unwrap_or_default();
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    done += rest.len();
                    break;
                }
                Err(e) => {
                    let (good, bad) = rest.split_at(e.valid_up_to());
                    out.push_str(std::str::from_utf8(good).unwrap_or_default());
                    done += good.len();
                    match e.error_len() {
                        Some(n) => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            done += n;
                        }
                        None if end => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            done += bad.len();
                            break;
                        }
                        None => break,
                    }
                }
            }
        }
        self.pending.drain(..done);
    }

    /// The slow way: all tokens again, and what came after the text appended so far.
    fn decode_all(&mut self, end: bool, out: &mut String) {
        let Ok(text) = guarded(|| self.shared.inner.decode(&self.ids, true)) else { return };
        if (end || !text.ends_with(char::REPLACEMENT_CHARACTER))
            && let Some(new) = text.get(self.emitted..)
        {
            out.push_str(new);
            self.emitted = text.len();
        }
    }
}

impl Table {
    /// The table, when the tokenizer's decoder works token by token.
    fn of(inner: &Encoder) -> Option<Table> {
        let decoder = serde_json::to_value(inner.get_decoder()?).ok()?;
        let rules = Rules::of(&decoder)?;
        let added = inner.get_added_tokens_decoder();
        // The library counts a vocabulary with its added tokens by listing all of it; ids of added ones say as much.
        let size = inner.get_vocab_size(false).max(added.keys().max().map_or(0, |m| *m as usize + 1));
        let mut table = Table {
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            start: rules.start,
            longest: 0,
        };
        for id in 0..u32::try_from(size).ok()? {
            let special = added.get(&id).is_some_and(|t| t.special);
            let begin = table.bytes.len();
            let plain = match inner.get_model() {
                Words::Tables(tables) if !added.contains_key(&id) => tables.vocabulary().token(id),
                _ => None,
            };
            match plain {
                Some(token) => rules.append(token, &mut table.bytes),
                None if special => {}
                None => {
                    if let Some(token) = inner.id_to_token(id) {
                        rules.append(&token, &mut table.bytes);
                    }
                }
            }
            table.special.push(special);
            table.longest = table.longest.max(table.bytes.len() - begin);
            table.ends.push(u32::try_from(table.bytes.len()).ok()?);
        }
        Some(table)
    }
}

/// How a decoder turns a token's name into bytes.
#[derive(Debug)]
struct Rules {
    byte_level: bool,
    byte_fallback: bool,
    replace: Vec<(String, String)>,
    start: Start,
}

impl Rules {
    fn of(decoder: &Value) -> Option<Rules> {
        let mut rules =
            Rules { byte_level: false, byte_fallback: false, replace: Vec::new(), start: Start::Nothing };
        let one = [decoder.clone()];
        let steps = match decoder["type"].as_str()? {
            "Sequence" => decoder["decoders"].as_array()?.as_slice(),
            _ => one.as_slice(),
        };
        let mut fused = false;
        for step in steps {
            match step["type"].as_str()? {
                // Byte level joins all tokens; whatever came after would see one text.
                "ByteLevel" if steps.len() == 1 => rules.byte_level = true,
                "Replace" if !fused => {
                    let pattern = step["pattern"]["String"].as_str()?;
                    rules.replace.push((pattern.to_owned(), step["content"].as_str()?.to_owned()));
                }
                "ByteFallback" if !fused => rules.byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused && step["stop"] == 0 && step["content"] == " " => {
                    rules.start = Start::Strip(usize::try_from(step["start"].as_u64()?).ok()?);
                }
                "Metaspace" if steps.len() == 1 => {
                    rules.replace.push((step["replacement"].as_str()?.to_owned(), " ".to_owned()));
                    if step["prepend_scheme"] != "never" {
                        rules.start = Start::Metaspace;
                    }
                }
                _ => return None,
            }
        }
        Some(rules)
    }

    fn append(&self, token: &str, out: &mut Vec<u8>) {
        if self.byte_level {
            let begin = out.len();
            for c in token.chars() {
                match byte_of(c) {
                    Some(b) => out.push(b),
                    None => {
                        // An added token outside of the byte alphabet stands for itself.
                        out.truncate(begin);
                        out.extend_from_slice(token.as_bytes());
                        return;
                    }
                }
            }
            return;
        }
        let mut text = token.to_owned();
        for (from, to) in &self.replace {
            text = text.replace(from.as_str(), to);
        }
        let byte = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|t| t.len() == 2);
        match byte.filter(|_| self.byte_fallback).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(text.as_bytes()),
        }
    }
}

/// The byte that a character of GPT-2's byte alphabet stands for: printable Latin-1 stands for itself, the other 68
/// bytes in ascending order for U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    const fn printable(b: u32) -> bool {
        matches!(b, 33..=126 | 161..=172 | 174..=255)
    }
    const OTHERS: [u8; 68] = {
        let mut out = [0; 68];
        let (mut b, mut n) = (0, 0);
        while b < 256 {
            if !printable(b) {
                out[n] = b as u8;
                n += 1;
            }
            b += 1;
        }
        out
    };
    let code = u32::from(c);
    if printable(code) {
        return u8::try_from(code).ok();
    }
    OTHERS.get(code.checked_sub(256)? as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;

    fn byte_level() -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/tiny/smollm2/tokenizer.json");
        Tokenizer::from_json(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn a_panic_in_the_library_is_an_error() {
        let fault = guarded::<()>(|| panic!("as the library would")).unwrap_err();
        assert!(fault.to_string().contains("damaged"), "{fault}");
        assert_eq!(guarded(|| Ok(1)).unwrap(), 1);
    }

    fn sentencepiece(decoder: &str) -> Tokenizer {
        let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        vocab.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
        vocab.extend(["▁", "▁Hello", "▁world", "wor", "ld", "é", "▁▁▁", "!"].map(str::to_owned));
        let vocab: serde_json::Map<String, Value> =
            vocab.into_iter().enumerate().map(|(i, t)| (t, i.into())).collect();
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [
                {"id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false},
                {"id": 2, "content": "</s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false}],
            "decoder": serde_json::from_str::<Value>(decoder).unwrap(),
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true, "unk_token": "<unk>"},
        });
        Tokenizer::from_json(&json.to_string()).unwrap()
    }

    const LLAMA: &str = r#"{"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;
    const METASPACE: &str =
        r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}"#;

    fn deltas(t: &Tokenizer, tokens: &[u32]) -> Vec<String> {
        let mut stream = t.stream();
        let mut out = Vec::new();
        for &token in tokens {
            let mut delta = String::new();
            stream.push(token, &mut delta);
            out.push(delta);
        }
        let mut delta = String::new();
        stream.finish(&mut delta);
        out.push(delta);
        out
    }

    #[test]
    fn characters_are_not_split() {
        let t = byte_level();
        let text = "naïve 😀 日本語\n";
        let tokens = t.encode(text, true).unwrap();
        let deltas = deltas(&t, &tokens);
        assert_eq!(deltas.concat(), text);
        assert!(deltas.iter().all(|d| !d.contains('\u{fffd}')));
        assert!(deltas.iter().any(String::is_empty), "some token is part of a character");
    }

    #[test]
    fn special_tokens_are_no_text() {
        let t = byte_level();
        let tokens = t.encode("<|im_start|>a<|im_end|>", true).unwrap();
        assert_eq!(t.decode(&tokens), "a");
        assert_eq!(t.token(2).as_deref(), Some("<|im_end|>"));
        assert_eq!(t.decode(&[u32::MAX, 9_999_999]), "");
    }

    #[test]
    fn an_unfinished_character_is_shown_at_the_end() {
        let t = sentencepiece(LLAMA);
        let euro = [3 + 0xe2, 3 + 0x82, 3 + 0xac];
        assert_eq!(deltas(&t, &euro), ["", "", "€", ""]);
        assert_eq!(deltas(&t, &euro[..2]), ["", "", "\u{fffd}"]);
    }

    #[test]
    fn table_and_library_agree() {
        for (t, valid_only) in
            [(byte_level(), false), (sentencepiece(LLAMA), true), (sentencepiece(METASPACE), true)]
        {
            let table = t.shared.table.as_ref().expect("a table");
            let n = table.ends.len() as u32;
            let mut runner = proptest::test_runner::TestRunner::deterministic();
            for _ in 0..300 {
                let strategy = proptest::collection::vec(0..n, 0..30);
                let tree = strategy.new_tree(&mut runner).unwrap();
                let mut tokens = tree.current();
                if valid_only {
                    // In invalid runs of byte tokens the library writes one U+FFFD per byte of the whole run, which a
                    // stream cannot know; Metaspace has no byte tokens at all.
                    tokens.retain(|t| *t < 3 || *t >= 3 + 256);
                }
                let whole = t.shared.inner.decode(&tokens, true).unwrap();
                assert_eq!(t.decode(&tokens), whole, "{tokens:?}");
                assert_eq!(deltas(&t, &tokens).concat(), whole, "{tokens:?}");
            }
        }
    }

    #[test]
    fn other_decoders_take_the_slow_way() {
        let t = sentencepiece(r#"{"type": "WordPiece", "prefix": "wor", "cleanup": false}"#);
        assert!(t.shared.table.is_none());
        let tokens = [3 + 256 + 5, 3 + 256 + 4, 3 + 256 + 7];
        assert_eq!(deltas(&t, &tokens).concat(), t.shared.inner.decode(&tokens, true).unwrap());
    }

    #[test]
    fn damaged_tokenizers_are_errors() {
        for json in ["", "{}", "[1]", "{\"model\": 3}"] {
            let e = Tokenizer::from_json(json).unwrap_err().to_string();
            assert!(e.contains("the tokenizer cannot be read"), "{e}");
        }
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text in "\\PC{0,40}") {
            let t = byte_level();
            let tokens = t.encode(&text, true).unwrap();
            prop_assert_eq!(t.decode(&tokens), text);
        }
    }
}
