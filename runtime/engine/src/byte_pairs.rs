//! Byte-pair encoding over the artifact's `vocabulary` section.
//!
//! The same algorithm as the `tokenizers` crate's `BPE`, which the tests compare it with, over tables that take a
//! millisecond to make and a megabyte and a half to hold: no string is a separate allocation, and tokens are found by
//! binary search. Everything around it (normalizers, pre-tokenizers, added tokens) stays that crate's, which takes any
//! [`tokenizers::Model`].
//!
//! Source: Sennrich, Haddow, Birch 2016, arXiv:1508.07909; `tokenizers` 0.22, `models/bpe`.

use attar_artifact::vocabulary::Vocabulary;
use serde::{Deserialize, Deserializer};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::path::{Path, PathBuf};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{Model, Token};

/// What turns words into tokens: the artifact's own tables, or whatever the `tokenizers` crate read.
#[derive(Debug)]
pub(crate) enum Words {
    Tables(BytePairs),
    Library(Box<ModelWrapper>),
}

/// Byte-pair tables.
#[derive(Debug)]
pub(crate) struct BytePairs {
    vocabulary: Vocabulary,
    /// Where the merges of each left id begin in `merges`; one more entry than ids.
    starts: Vec<u32>,
    /// By left id, then ascending by right id.
    merges: Vec<Merge>,
    options: ModelOptions,
    unk: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Merge {
    right: u32,
    rank: u32,
    result: u32,
}

/// The model's fields in the settings. What [`attar_artifact::vocabulary::encode`] refuses is not among them.
#[derive(Debug, Default, Deserialize)]
struct ModelOptions {
    unk_token: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// A piece of a word. Pieces of a word are linked, since merging takes out neighbours.
#[derive(Clone, Copy, Debug)]
struct Piece {
    id: u32,
    /// Bytes of the word; 0 once it was merged into its left neighbour.
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

type Fault = Box<dyn std::error::Error + Send + Sync>;

impl BytePairs {
    /// Tables of a vocabulary; `settings` is its model's object.
    ///
    /// # Errors
    /// When the settings are not such an object, or a pair is merged twice.
    pub(crate) fn new(
        mut vocabulary: Vocabulary,
        settings: &serde_json::value::RawValue,
    ) -> Result<BytePairs, Fault> {
        let options: ModelOptions = serde_json::from_str(settings.get())?;
        let mut starts = vec![0u32; vocabulary.len() + 2];
        // Counted two entries further on, so that filling below moves every start to its place.
        for [left, ..] in &vocabulary.merges {
            if let Some(count) = starts.get_mut(*left as usize + 2) {
                *count += 1;
            }
        }
        let mut sum = 0;
        for start in &mut starts {
            sum += *start;
            *start = sum;
        }
        let mut merges = vec![Merge { right: 0, rank: 0, result: 0 }; vocabulary.merges.len()];
        for (&[left, right, result], rank) in vocabulary.merges.iter().zip(0u32..) {
            if let Some(next) = starts.get_mut(left as usize + 1) {
                if let Some(slot) = merges.get_mut(*next as usize) {
                    *slot = Merge { right, rank, result };
                }
                *next += 1;
            }
        }
        starts.pop();
        for span in starts.windows(2) {
            if let [from, to] = *span
                && let Some(group) = merges.get_mut(from as usize..to as usize)
            {
                group.sort_unstable_by_key(|m| m.right);
                if group.windows(2).any(|w| matches!(w, [a, b] if a.right == b.right)) {
                    return Err("the vocabulary merges a pair twice".into());
                }
            }
        }
        vocabulary.merges = Vec::new();
        let unk = options.unk_token.as_deref().and_then(|t| vocabulary.id(t));
        Ok(BytePairs { vocabulary, starts, merges, options, unk })
    }

    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn merge(&self, left: u32, right: u32) -> Option<Merge> {
        let from = *self.starts.get(left as usize)? as usize;
        let to = *self.starts.get(left as usize + 1)? as usize;
        let group = self.merges.get(from..to)?;
        let found = group.binary_search_by_key(&right, |m| m.right).ok()?;
        group.get(found).copied()
    }

    fn encode(&self, word: &str) -> Result<Vec<Token>, Fault> {
        if self.options.ignore_merges
            && let Some(id) = self.vocabulary.id(word)
        {
            return Ok(vec![Token::new(id, word.to_owned(), (0, word.len()))]);
        }
        let mut pieces = self.characters(word)?;
        self.merge_all(&mut pieces);
        let mut at = 0;
        let whole = pieces.iter().filter(|p| p.len > 0);
        Ok(whole
            .map(|p| {
                let start = at;
                at += p.len;
                Token::new(p.id, self.vocabulary.token(p.id).unwrap_or_default().to_owned(), (start, at))
            })
            .collect())
    }

    /// The word's characters as tokens, by bytes or as unknown where the vocabulary lacks them.
    fn characters(&self, word: &str) -> Result<Vec<Piece>, Fault> {
        let mut pieces: Vec<Piece> = Vec::with_capacity(word.len());
        let mut add = |id: u32, len: usize| {
            let at = pieces.len();
            if let Some(before) = pieces.last_mut() {
                before.next = Some(at);
            }
            pieces.push(Piece { id, len, prev: at.checked_sub(1), next: None });
        };
        let mut unknown: Option<usize> = None;
        let missing = || "the unknown token is not in the vocabulary";
        let mut bytes = [0; 4];
        for c in word.chars() {
            let text = &*c.encode_utf8(&mut bytes);
            if let Some(id) = self.vocabulary.id(text) {
                if let Some(len) = unknown.take() {
                    add(self.unk.ok_or_else(missing)?, len);
                }
                add(id, text.len());
                continue;
            }
            if self.options.byte_fallback {
                let ids: Option<Vec<u32>> =
                    text.bytes().map(|b| self.vocabulary.id(&format!("<{b:#04X}>"))).collect();
                if let Some(ids) = ids {
                    ids.into_iter().for_each(|id| add(id, 1));
                    continue;
                }
            }
            if self.options.unk_token.is_some() {
                let unk = self.unk.ok_or_else(missing)?;
                unknown = match unknown {
                    Some(len) if self.options.fuse_unk => Some(len + text.len()),
                    Some(len) => {
                        add(unk, len);
                        Some(text.len())
                    }
                    None => Some(text.len()),
                };
            }
        }
        if let Some(len) = unknown {
            add(self.unk.ok_or_else(missing)?, len);
        }
        Ok(pieces)
    }

    /// Merges the pair of the lowest rank, the leftmost of equals, until none is left.
    fn merge_all(&self, pieces: &mut [Piece]) {
        // What must come first is the greatest: the lowest rank, then the leftmost.
        let mut queue: BinaryHeap<(Reverse<u32>, Reverse<usize>, u32)> =
            BinaryHeap::with_capacity(pieces.len());
        for (at, pair) in pieces.windows(2).enumerate() {
            if let [a, b] = pair
                && let Some(m) = self.merge(a.id, b.id)
            {
                queue.push((Reverse(m.rank), Reverse(at), m.result));
            }
        }
        while let Some((_, Reverse(at), result)) = queue.pop() {
            let Some(left) = pieces.get(at).copied().filter(|p| p.len > 0) else { continue };
            let Some((next, right)) = left.next.and_then(|n| Some((n, *pieces.get(n)?))) else { continue };
            // The entry is out of date when either side has been merged since.
            if self.merge(left.id, right.id).is_none_or(|m| m.result != result) {
                continue;
            }
            let merged = Piece { id: result, len: left.len + right.len, prev: left.prev, next: right.next };
            if let Some(slot) = pieces.get_mut(at) {
                *slot = merged;
            }
            if let Some(slot) = pieces.get_mut(next) {
                slot.len = 0;
            }
            if let Some(after) = right.next.and_then(|n| pieces.get_mut(n)) {
                after.prev = Some(at);
            }
            if let Some((prev, before)) = merged.prev.and_then(|p| Some((p, pieces.get(p)?)))
                && let Some(m) = self.merge(before.id, result)
            {
                queue.push((Reverse(m.rank), Reverse(prev), m.result));
            }
            if let Some(after) = merged.next.and_then(|n| pieces.get(n))
                && let Some(m) = self.merge(result, after.id)
            {
                queue.push((Reverse(m.rank), Reverse(at), m.result));
            }
        }
    }
}

impl Model for Words {
    type Trainer = BpeTrainer;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        match self {
            Words::Tables(_) if sequence.is_empty() => Ok(Vec::new()),
            Words::Tables(tables) => tables.encode(sequence),
            Words::Library(model) => model.tokenize(sequence),
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Words::Tables(tables) => tables.vocabulary.id(token),
            Words::Library(model) => model.token_to_id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Words::Tables(tables) => tables.vocabulary.token(id).map(str::to_owned),
            Words::Library(model) => model.id_to_token(id),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Words::Tables(tables) => {
                let ids = 0..tables.vocabulary.len() as u32;
                ids.filter_map(|id| Some((tables.vocabulary.token(id)?.to_owned(), id))).collect()
            }
            Words::Library(model) => model.get_vocab(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Words::Tables(tables) => tables.vocabulary.len(),
            Words::Library(model) => model.get_vocab_size(),
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        match self {
            Words::Tables(_) => Err("tables of an artifact are not saved as files".into()),
            Words::Library(model) => model.save(folder, prefix),
        }
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

/// As the `tokenizers` crate reads the `model` of a `tokenizer.json`.
impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Words, D::Error> {
        ModelWrapper::deserialize(deserializer).map(|m| Words::Library(Box::new(m)))
    }
}

#[cfg(test)]
mod tests {
    use crate::text::Tokenizer;
    use attar_artifact::vocabulary::{self, Vocabulary};
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;

    /// The same tokenizer twice: as the library reads it, and over our tables.
    fn both(json: &str) -> (Tokenizer, Tokenizer) {
        let tables = Vocabulary::parse(&vocabulary::encode(json).expect("fits the form")).unwrap();
        (Tokenizer::from_json(json).unwrap(), Tokenizer::from_vocabulary(tables).unwrap())
    }

    fn assert_same(both: &(Tokenizer, Tokenizer), text: &str) {
        for special in [false, true] {
            let ids = both.0.encode(text, special).unwrap();
            assert_eq!(both.1.encode(text, special).unwrap(), ids, "{text:?}");
            assert_eq!(both.1.decode(&ids), both.0.decode(&ids), "{text:?}");
        }
    }

    /// Tokenizers of every small checkpoint.
    fn checkpoints() -> Vec<(Tokenizer, Tokenizer)> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/tiny");
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let json = std::fs::read_to_string(entry.path().join("tokenizer.json")).unwrap_or_default();
            if vocabulary::encode(&json).is_some() {
                found.push(both(&json));
            }
        }
        assert!(found.len() >= 3, "only {}", found.len());
        found
    }

    #[test]
    fn names_and_ids_are_the_library_s() {
        for (library, tables) in checkpoints() {
            assert_eq!(tables.longest_token(), library.longest_token());
            for id in 0..1000 {
                assert_eq!(tables.token(id), library.token(id));
                let name = library.token(id).unwrap_or_default();
                assert_eq!(tables.id(&name), library.id(&name));
            }
        }
    }

    /// A vocabulary grown by random merges from an alphabet, with whatever options.
    fn grown(pairs: &[(u8, u8)], options: &Value, byte_tokens: bool) -> String {
        let mut tokens: Vec<String> = ["<unk>", "a", "b", "c", "é", "▁"].map(str::to_owned).to_vec();
        if byte_tokens {
            tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
        }
        let mut merges: Vec<(String, String)> = Vec::new();
        for (a, b) in pairs {
            // The bytes' own names take no part.
            let plain: Vec<&String> = tokens.iter().filter(|t| !t.starts_with('<')).collect();
            let (a, b) = (plain[*a as usize % plain.len()].clone(), plain[*b as usize % plain.len()].clone());
            if a.len() + b.len() > 24 || merges.contains(&(a.clone(), b.clone())) {
                continue;
            }
            let result = format!("{a}{b}");
            if !tokens.contains(&result) {
                tokens.push(result);
            }
            merges.push((a, b));
        }
        let vocab: BTreeMap<&String, usize> = tokens.iter().zip(0..).collect();
        let mut model = json!({"type": "BPE", "vocab": vocab, "merges": merges});
        for (key, value) in options.as_object().unwrap() {
            model[key] = value.clone();
        }
        json!({"version": "1.0", "added_tokens": [], "model": model}).to_string()
    }

    proptest! {
        #[test]
        fn random_merges_give_the_library_s_tokens(
            pairs in proptest::collection::vec(any::<(u8, u8)>(), 0..60),
            text in "[abcé▁xÿ]{0,40}",
            (unk, fuse_unk, byte_fallback, ignore_merges) in any::<(bool, bool, bool, bool)>(),
        ) {
            let options = json!({"unk_token": unk.then_some("<unk>"), "fuse_unk": fuse_unk,
                                 "byte_fallback": byte_fallback, "ignore_merges": ignore_merges});
            assert_same(&both(&grown(&pairs, &options, byte_fallback)), &text);
        }

        #[test]
        fn random_text_gives_the_library_s_tokens(text in ".{0,60}|[ a-z.,<|_>\\n0-9é漢]{0,200}") {
            thread_local! { static ALL: Vec<(Tokenizer, Tokenizer)> = checkpoints(); }
            ALL.with(|all| all.iter().for_each(|both| assert_same(both, &text)));
        }
    }

    #[test]
    fn faults_are_errors() {
        let json = grown(&[(0, 1)], &json!({"unk_token": "nowhere"}), false);
        let (library, tables) = both(&json);
        assert!(library.encode("x", false).is_err() && tables.encode("x", false).is_err());
        let mut twice = Vocabulary::parse(&vocabulary::encode(&json).unwrap()).unwrap();
        twice.merges.push(twice.merges[0]);
        assert!(Tokenizer::from_vocabulary(twice).unwrap_err().to_string().contains("twice"));
        let mut unreadable = Vocabulary::parse(&vocabulary::encode(&json).unwrap()).unwrap();
        unreadable.settings = "{}".to_owned();
        assert!(Tokenizer::from_vocabulary(unreadable).is_err());
    }
}
