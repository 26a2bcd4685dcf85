//! Weight formats that are not built in: described by a plugin, or by an artifact that holds weights in them.
//!
//! A description is all there is to know of a format: from the [`Format`] it makes follow packed layout, encoder, decoder and
//! kernels as they do for the built-in ones. Descriptions are few and small, and live as long as the process.

use crate::formats::{Format, FormatRef, MOST_ENTRIES, Scale, Table, Value};
use crate::{ALL_FORMATS, DType};
use std::sync::{Mutex, PoisonError};

/// The group that every kernel of compressed formats works on.
pub const GROUP: usize = 32;
/// Low bits of a field byte that every kernel takes for the choice.
const CHOICE_BITS: u32 = 2;
/// Longest name of a described format, in bytes.
const MOST_NAME: usize = 32;
/// Most descriptions of a process, so that hostile files cannot fill memory with them.
const MOST_FORMATS: usize = 1024;

/// A format in plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Lower-case letters, digits and `_`, a letter first.
    pub name: String,
    /// Where the idea comes from.
    pub source: String,
    pub codes: Codes,
    /// Weights along K that share a scale field.
    pub group: usize,
    pub scale: Scale,
}

/// What codes stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Codes {
    /// Signed bytes in -127..=127.
    Int8,
    /// Indices of `bits` bits into a table.
    Table { bits: usize, entries: Vec<i8>, shift: i8 },
}

/// Formats described by now. The description is kept beside what was made of it, to tell equal ones from others of that name.
static KNOWN: Mutex<Vec<(FormatRef, Description)>> = Mutex::new(Vec::new());

impl Description {
    /// What is wrong with the description, if anything.
    ///
    /// # Errors
    /// In words, with the field.
    pub fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        let starts = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        if !starts || name.len() > MOST_NAME || !name.bytes().all(plain) {
            return Err(format!(
                "name {name:?}: expected up to {MOST_NAME} lower-case letters, digits and _, a letter first"
            ));
        }
        if ALL_FORMATS.iter().any(|f| f.name == name) || DType::ALL.iter().any(|d| d.name() == name) {
            return Err(format!("name {name}: a built-in format or element is called so"));
        }
        if self.group != GROUP {
            return Err(format!("group {}: kernels work on groups of {GROUP}", self.group));
        }
        let choice_bits = match self.scale {
            Scale::None => return Err("scale: only uncompressed formats have none".to_owned()),
            Scale::Bf16 => 0,
            Scale::RowF32Field8 { bias, choice_bits } => {
                if choice_bits != CHOICE_BITS {
                    return Err(format!("choice_bits {choice_bits}: kernels read {CHOICE_BITS}"));
                }
                if !(0..1 << (8 - CHOICE_BITS)).contains(&bias) {
                    let most = (1 << (8 - CHOICE_BITS)) - 1;
                    return Err(format!("bias {bias}: expected 0 to {most}"));
                }
                choice_bits
            }
        };
        match &self.codes {
            // Field bytes have been measured with tables alone, and no kernel reads them with bytes.
            Codes::Int8 if self.scale != Scale::Bf16 => Err("codes of 8 bits have bf16 scales".to_owned()),
            Codes::Int8 => Ok(()),
            Codes::Table { bits, entries, shift } => {
                if !(2..=6).contains(bits) || entries.len() != 1 << bits || entries.len() > MOST_ENTRIES {
                    let expected = "2 to 6 bits, and an entry for every code";
                    return Err(format!(
                        "table of {bits} bits with {} entries: expected {expected}",
                        entries.len()
                    ));
                }
                if choice_bits == 0 && *shift != 0 {
                    return Err(format!("shift {shift}: without a choice there is nothing to shift"));
                }
                if *shift < 0 || !table(entries, *bits, *shift).is_sound(choice_bits) {
                    return Err(
                        "entries: expected in ascending order, on both sides of zero, and within -127..=127 wherever \
                         choices move them"
                            .to_owned(),
                    );
                }
                Ok(())
            }
        }
    }

    /// The format of that description, which [`by_name`](crate::by_name) finds from now on.
    ///
    /// # Errors
    /// Those of [`Description::check`]; when another format has the name.
    pub fn register(&self) -> Result<FormatRef, String> {
        self.check()?;
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((format, description)) = known.iter().find(|(f, _)| f.name == self.name) {
            let same = Description { source: self.source.clone(), ..description.clone() } == *self;
            let problem = || format!("another format is called {}; rename one of them", self.name);
            return if same { Ok(format) } else { Err(problem()) };
        }
        if known.len() >= MOST_FORMATS {
            return Err(format!("more than {MOST_FORMATS} formats are described"));
        }
        let format = self.leaked();
        known.push((format, self.clone()));
        Ok(format)
    }

    /// Bytes of a packed matrix, without making the format known.
    pub fn packed_bytes(&self, n: usize, k: usize) -> Option<usize> {
        self.check().ok()?;
        // The layout depends on the kinds of codes and scales alone.
        let like: FormatRef = match (&self.codes, self.scale) {
            (Codes::Int8, _) => &crate::formats::W8,
            (Codes::Table { bits, .. }, scale) => like_table(*bits, scale)?,
        };
        crate::PackedLayout::new(like, n, k).map(|l| l.total_bytes())
    }

    /// The description of a format.
    pub fn of(format: FormatRef) -> Option<Description> {
        let codes = match format.value {
            Value::Float(_) => return None,
            Value::Int8 => Codes::Int8,
            Value::Table(t) => Codes::Table { bits: t.bits, entries: t.entries.to_vec(), shift: t.shift },
        };
        let (name, source) = (format.name.to_owned(), format.source.to_owned());
        Some(Description { name, source, codes, group: format.group, scale: format.scale })
    }

    fn leaked(&self) -> FormatRef {
        let text = |s: &str| -> &'static str { s.to_owned().leak() };
        let value = match &self.codes {
            Codes::Int8 => Value::Int8,
            Codes::Table { bits, entries, shift } => {
                Value::Table(table(entries.clone().leak(), *bits, *shift))
            }
        };
        Box::leak(Box::new(Format {
            name: text(&self.name),
            value,
            group: self.group,
            scale: self.scale,
            source: text(&self.source),
        }))
    }
}

fn table(entries: &[i8], bits: usize, shift: i8) -> Table<'_> {
    Table { bits, entries, shift }
}

/// A format whose packed layout is that of any table format with so many bits and such scales.
fn like_table(bits: usize, scale: Scale) -> Option<FormatRef> {
    const fn with_bf16(bits: usize) -> Format {
        let entries: &[i8] = &[];
        let value = Value::Table(Table { bits, entries, shift: 0 });
        Format { name: "", value, group: GROUP, scale: Scale::Bf16, source: "" }
    }
    static BF16_SCALES: [Format; 5] = [with_bf16(2), with_bf16(3), with_bf16(4), with_bf16(5), with_bf16(6)];
    match scale {
        Scale::Bf16 => BF16_SCALES.get(bits.checked_sub(2)?),
        _ => ALL_FORMATS.iter().copied().find(|f| f.table().is_some_and(|t| t.bits == bits)),
    }
}

/// The described format of that name.
pub(crate) fn described(name: &str) -> Option<FormatRef> {
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.iter().map(|(f, _)| *f).find(|f| f.name == name)
}

/// Whether a format is one of those described.
pub fn is_described(format: FormatRef) -> bool {
    ALL_FORMATS.iter().all(|f| f.name != format.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PackedLayout;

    fn nf(name: &str) -> Description {
        let entries = vec![-127, -88, -67, -50, -36, -23, -12, -1, 10, 20, 31, 43, 56, 71, 92, 127];
        Description {
            name: name.to_owned(),
            source: "a test".to_owned(),
            codes: Codes::Table { bits: 4, entries, shift: 0 },
            group: 32,
            scale: Scale::Bf16,
        }
    }

    #[test]
    fn a_name_means_one_format() {
        let first = nf("test_once").register().unwrap();
        assert_eq!(crate::by_name("test_once"), Some(first));
        assert!(std::ptr::eq(nf("test_once").register().unwrap(), first));
        assert_eq!(Description::of(first), Some(nf("test_once")));
        let mut other = nf("test_once");
        other.scale = Scale::RowF32Field8 { bias: 32, choice_bits: 2 };
        assert!(other.register().unwrap_err().contains("test_once"));
        assert!(is_described(first) && !is_described(&crate::formats::N4));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let wrong = |change: &dyn Fn(&mut Description)| {
            let mut d = nf("test_wrong");
            change(&mut d);
            d.register().unwrap_err()
        };
        assert!(wrong(&|d| d.name = "n4".to_owned()).contains("built-in"));
        assert!(wrong(&|d| d.name = "i32".to_owned()).contains("built-in"));
        for name in ["", "Nf", "4f", "a-b", &"a".repeat(33)] {
            assert!(wrong(&|d| d.name = name.to_owned()).contains("name"), "{name}");
        }
        assert!(wrong(&|d| d.group = 64).contains("groups of 32"));
        assert!(wrong(&|d| d.scale = Scale::None).contains("scale"));
        assert!(wrong(&|d| d.scale = Scale::RowF32Field8 { bias: 300, choice_bits: 2 }).contains("bias"));
        assert!(
            wrong(&|d| d.scale = Scale::RowF32Field8 { bias: 0, choice_bits: 5 }).contains("choice_bits")
        );
        let codes = |bits, entries: Vec<i8>, shift| Codes::Table { bits, entries, shift };
        assert!(wrong(&|d| d.codes = codes(4, vec![-1, 1], 0)).contains("every code"));
        assert!(wrong(&|d| d.codes = codes(2, vec![-1, 1, 1, 2], 0)).contains("ascending"));
        assert!(wrong(&|d| d.codes = codes(2, vec![-128, 1, 2, 3], 0)).contains("-127"));
        assert!(wrong(&|d| d.codes = codes(2, vec![-3, 1, 2, 3], 4)).contains("shift"));
        assert!(crate::by_name("test_wrong").is_none());
    }

    #[test]
    fn sizes_are_known_before_the_format_is() {
        for bits in 2..=6 {
            for scale in [Scale::Bf16, Scale::RowF32Field8 { bias: 16, choice_bits: 2 }] {
                let half = 1i16 << (bits - 1);
                let entries: Vec<i8> = (-half..half).map(|i| i as i8).collect();
                let name = format!("test_size_{bits}_{}", u8::from(scale == Scale::Bf16));
                let d =
                    Description { name, codes: Codes::Table { bits, entries, shift: 0 }, scale, ..nf("x") };
                let bytes = d.packed_bytes(33, 64);
                let format = d.register().unwrap();
                assert_eq!(bytes, PackedLayout::new(format, 33, 64).map(|l| l.total_bytes()));
            }
        }
        assert_eq!(nf("x").packed_bytes(1, 33), None);
    }
}
