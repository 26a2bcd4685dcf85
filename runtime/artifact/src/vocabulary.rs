//! The `vocabulary` section: a byte-pair tokenizer laid out so that opening it parses no JSON.
//!
//! It says what the `tokenizer` section says, which stays for readers without it and for tokenizers that do not fit:
//! [`encode`] makes a section only of what this form holds exactly. `docs/artifact.md` specifies the bytes.
//!
//! Invariant: every byte is hostile; [`Vocabulary::parse`] gives an error or checked ids and texts, never a panic.

use serde_json::Value;
use std::collections::BTreeSet;

/// Layout of the section; a reader that finds another one uses the `tokenizer` section.
pub const VERSION: u32 = 1;
const HEAD: usize = 16;
/// With more tokens, ids take four bytes instead of two.
const MOST_NARROW: usize = 1 << 16;

/// A vocabulary section, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// All tokens, one after the other.
    text: String,
    /// Where token i ends in `text`.
    ends: Vec<u32>,
    /// Ids by ascending bytes of their tokens.
    order: Vec<u32>,
    /// Left, right and resulting id of each merge, the first one first to be applied.
    pub merges: Vec<[u32; 3]>,
    /// `tokenizer.json` without the model's `vocab` and `merges`.
    pub settings: String,
}

/// Why a vocabulary section cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VocabularyFault {
    #[error("layout {0} is newer than this version knows")]
    Version(u32),
    #[error("its length does not fit its counts")]
    Length,
    #[error("a text is not UTF-8, or is cut within a character")]
    Text,
    #[error("an id is outside of the vocabulary")]
    Id,
    #[error("tokens are not in ascending order, or one appears twice")]
    Order,
}

impl Vocabulary {
    /// Reads a section.
    ///
    /// # Errors
    /// [`VocabularyFault`].
    pub fn parse(bytes: &[u8]) -> Result<Vocabulary, VocabularyFault> {
        use VocabularyFault::{Id, Length, Order, Text};
        let (head, rest) = bytes.split_at_checked(HEAD).ok_or(Length)?;
        let mut head = head.chunks_exact(4).map(word);
        let mut next = || head.next().unwrap_or(0);
        let (version, tokens, merges, settings) = (next(), next(), next(), next());
        if version != VERSION {
            return Err(VocabularyFault::Version(version));
        }
        let [tokens, merges, settings] = [tokens, merges, settings].map(|n| n as usize);
        let width = if tokens <= MOST_NARROW { 2 } else { 4 };
        let mut rest = rest;
        let mut part = |len: Option<usize>| -> Result<&[u8], VocabularyFault> {
            let (part, after) = len.and_then(|n| rest.split_at_checked(n)).ok_or(Length)?;
            rest = after;
            Ok(part)
        };
        let lens = part(tokens.checked_mul(2))?;
        let order = part(tokens.checked_mul(width))?;
        let merges = part(merges.checked_mul(3 * width))?;
        let (text, settings) =
            rest.len().checked_sub(settings).and_then(|n| rest.split_at_checked(n)).ok_or(Length)?;
        let string = |b: &[u8]| std::str::from_utf8(b).map(str::to_owned).map_err(|_| Text);
        let (text, settings) = (string(text)?, string(settings)?);

        let mut end = 0u32;
        let mut ends = Vec::with_capacity(tokens);
        for len in lens.chunks_exact(2).map(half) {
            end = end.checked_add(len).ok_or(Length)?;
            ends.push(end);
        }
        if end as usize != text.len() {
            return Err(Length);
        }
        if ends.iter().any(|e| !text.is_char_boundary(*e as usize)) {
            return Err(Text);
        }
        let ids = |bytes: &[u8]| -> Result<Vec<u32>, VocabularyFault> {
            let ids: Vec<u32> = match width {
                2 => bytes.chunks_exact(2).map(half).collect(),
                _ => bytes.chunks_exact(4).map(word).collect(),
            };
            if ids.iter().any(|id| *id as usize >= tokens) { Err(Id) } else { Ok(ids) }
        };
        let order = ids(order)?;
        let merges = ids(merges)?;
        let merges = merges.chunks_exact(3).filter_map(|m| <[u32; 3]>::try_from(m).ok()).collect();
        let out = Vocabulary { text, ends, order, merges, settings };
        // Strictly ascending texts of as many ids as there are tokens: each id once, each token once.
        let ascending = out.order.windows(2).all(|w| matches!(w, [a, b] if out.token(*a) < out.token(*b)));
        if ascending { Ok(out) } else { Err(Order) }
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// A token; `None` for an id outside of the vocabulary.
    pub fn token(&self, id: u32) -> Option<&str> {
        let end = *self.ends.get(id as usize)?;
        let start = id.checked_sub(1).and_then(|i| self.ends.get(i as usize)).copied().unwrap_or(0);
        self.text.get(start as usize..end as usize)
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        let found = self.order.binary_search_by(|id| self.token(*id).cmp(&Some(token))).ok()?;
        self.order.get(found).copied()
    }
}

fn half(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u16::from_le_bytes).into()
}

fn word(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_le_bytes)
}

/// The section for a `tokenizer.json`; `None` when that is no byte-pair tokenizer which this form holds exactly: ids
/// from 0 without gap, no dropout, no affixes of subwords, no pair that is merged twice.
pub fn encode(tokenizer_json: &str) -> Option<Vec<u8>> {
    let mut json: Value = serde_json::from_str(tokenizer_json).ok()?;
    let model = json.get_mut("model")?.as_object_mut()?;
    let unset = |v: Option<&Value>| v.is_none_or(|v| v.is_null() || v == 0.0 || v == 0 || v == "");
    let plain = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"];
    if model.get("type")? != "BPE" || !plain.iter().all(|f| unset(model.get(*f))) {
        return None;
    }
    let (vocab, merges) = (model.remove("vocab")?, model.remove("merges")?);
    let vocab = vocab.as_object()?;
    let mut tokens: Vec<Option<&str>> = vec![None; vocab.len()];
    for (token, id) in vocab {
        let slot = tokens.get_mut(usize::try_from(id.as_u64()?).ok()?)?;
        if slot.replace(token).is_some() {
            return None;
        }
    }
    let tokens: Vec<&str> = tokens.into_iter().collect::<Option<_>>()?;
    let mut order: Vec<u32> = (0..u32::try_from(tokens.len()).ok()?).collect();
    order.sort_by_key(|id| tokens.get(*id as usize));
    let id = |token: &str| vocab.get(token)?.as_u64().and_then(|id| u32::try_from(id).ok());
    let mut ids = order;
    let mut pairs = BTreeSet::new();
    let merges = merges.as_array()?;
    for merge in merges {
        let (left, right) = match merge {
            Value::String(text) => text.split_once(' ').filter(|(_, right)| !right.contains(' '))?,
            _ => merge
                .as_array()
                .filter(|m| m.len() == 2)
                .and_then(|m| m.first()?.as_str().zip(m.get(1)?.as_str()))?,
        };
        let merged = [id(left)?, id(right)?, id(&format!("{left}{right}"))?];
        if !pairs.insert((merged[0], merged[1])) {
            return None;
        }
        ids.extend(merged);
    }
    let settings = serde_json::to_string(&json).ok()?;
    let mut out = Vec::new();
    for n in [VERSION as usize, tokens.len(), merges.len(), settings.len()] {
        out.extend_from_slice(&u32::try_from(n).ok()?.to_le_bytes());
    }
    for token in &tokens {
        out.extend_from_slice(&u16::try_from(token.len()).ok()?.to_le_bytes());
    }
    for id in ids {
        match u16::try_from(id) {
            Ok(id) if tokens.len() <= MOST_NARROW => out.extend_from_slice(&id.to_le_bytes()),
            _ => out.extend_from_slice(&id.to_le_bytes()),
        }
    }
    tokens.iter().for_each(|t| out.extend_from_slice(t.as_bytes()));
    out.extend_from_slice(settings.as_bytes());
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const JSON: &str = r#"{"version": "1.0", "normalizer": null, "model": {"type": "BPE", "dropout": null,
        "vocab": {"é": 0, "a": 1, "b": 2, "éa": 3, "éab": 4}, "merges": [["é", "a"], ["éa", "b"]]}}"#;

    #[test]
    fn what_goes_in_comes_out() {
        let v = Vocabulary::parse(&encode(JSON).unwrap()).unwrap();
        assert_eq!(v.len(), 5);
        assert_eq!((v.token(3), v.token(5), v.id("éab"), v.id("c")), (Some("éa"), None, Some(4), None));
        assert_eq!(v.merges, [[0, 1, 3], [3, 2, 4]]);
        assert!(v.settings.contains("normalizer") && !v.settings.contains("éa"), "{}", v.settings);
        let legacy = JSON.replace(r#"["é", "a"], ["éa", "b"]"#, r#""é a", "éa b""#);
        assert_eq!(encode(&legacy), encode(JSON));
    }

    #[test]
    fn more_than_65536_tokens_take_wide_ids() {
        let vocab: serde_json::Map<String, Value> =
            (0..70_000u32).map(|i| (format!("t{i}"), i.into())).collect();
        let json = serde_json::json!({"model": {"type": "BPE", "vocab": vocab, "merges": []}}).to_string();
        let v = Vocabulary::parse(&encode(&json).unwrap()).unwrap();
        assert_eq!((v.id("t69999"), v.token(69_999)), (Some(69_999), Some("t69999")));
    }

    #[test]
    fn other_tokenizers_keep_their_json() {
        for (from, to) in [
            ("BPE", "Unigram"),
            (r#""dropout": null"#, r#""dropout": 0.1"#),
            (r#""dropout": null"#, r###""continuing_subword_prefix": "##""###),
            (r#""éab": 4"#, r#""éab": 7"#),
            (r#""éab": 4"#, r#""éab": 3"#),
            (r#"["éa", "b"]"#, r#"["é", "a"]"#),
            (r#"["éa", "b"]"#, r#"["b", "b"]"#),
        ] {
            assert!(JSON.contains(from));
            assert_eq!(encode(&JSON.replace(from, to)), None, "{to}");
        }
    }

    #[test]
    fn faults_are_told_apart() {
        let good = encode(JSON).unwrap();
        let fault = |at: usize, value: u8| {
            let mut bad = good.clone();
            bad[at] = value;
            Vocabulary::parse(&bad).unwrap_err()
        };
        assert_eq!(fault(0, 2), VocabularyFault::Version(2));
        assert_eq!(fault(7, 0xff), VocabularyFault::Length);
        assert_eq!(fault(HEAD, 1), VocabularyFault::Length);
        assert_eq!(fault(HEAD + 10, 9), VocabularyFault::Id);
        assert_eq!(fault(HEAD + 10, good[HEAD + 12]), VocabularyFault::Order);
        assert_eq!(fault(HEAD + 10 + 10 + 12, 0xff), VocabularyFault::Text);
        assert_eq!(Vocabulary::parse(&[]), Err(VocabularyFault::Length));
    }

    proptest! {
        /// Any damage gives an error or something whose every access is in range.
        #[test]
        fn damage_never_panics(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
                               cut in any::<prop::sample::Index>(), whole in any::<bool>()) {
            let mut bytes = encode(JSON).unwrap();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if !whole { bytes.truncate(cut.index(bytes.len())) }
            if let Ok(v) = Vocabulary::parse(&bytes) {
                for id in 0..v.len() as u32 {
                    prop_assert_eq!(v.token(id).and_then(|t| v.id(t)), Some(id));
                }
                prop_assert!(v.merges.iter().flatten().all(|id| (*id as usize) < v.len()));
            }
        }
    }
}
