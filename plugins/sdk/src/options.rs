//! Options of passes: serde structs whose fields have docs, defaults and ranges.

use crate::decl::{OptionDecl, OptionKind, OptionValue};
use crate::error::{Error, Result};
use serde::de::value::MapDeserializer;
use serde::de::{DeserializeOwned, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

/// A set of options. [`options!`](macro@crate::options) makes one from a struct; [`NoOptions`] is the empty one.
pub trait Options: DeserializeOwned {
    /// The declarations, field by field.
    const DECLS: &'static [OptionDecl];
}

/// For passes without options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub struct NoOptions {}

impl Options for NoOptions {
    const DECLS: &'static [OptionDecl] = &[];
}

/// Reads options from their values.
///
/// # Errors
/// When a value does not suit the field's type.
pub fn read<O: Options>(values: Vec<(String, OptionValue)>) -> Result<O> {
    let pairs = values.into_iter().map(|(name, value)| (name, Held(value)));
    let map: MapDeserializer<'_, _, serde::de::value::Error> = MapDeserializer::new(pairs);
    O::deserialize(map).map_err(|e| Error::new(format!("options: {e}")))
}

/// The defaults of a set of options, where all have one.
///
/// # Errors
/// When an option has no default.
pub fn defaults<O: Options>() -> Result<O> {
    let value = |d: &OptionDecl| match d.default() {
        Some(value) => Ok((d.name.to_owned(), value)),
        None => Err(Error::new(format!("option {} has no default", d.name))),
    };
    read(O::DECLS.iter().map(value).collect::<Result<_>>()?)
}

/// The default of an option without a range: a flag, or a text.
#[doc(hidden)]
#[derive(Debug)]
pub struct Plain<T>(pub T);

impl Plain<bool> {
    pub const fn kind(self) -> OptionKind {
        OptionKind::Bool { default: self.0 }
    }
}

impl Plain<&'static str> {
    pub const fn kind(self) -> OptionKind {
        OptionKind::Text { default: self.0 }
    }
}

/// A value that serde can read a field from.
struct Held(OptionValue);

impl<'de> serde::Deserializer<'de> for Held {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, Self::Error> {
        match self.0 {
            OptionValue::Bool(v) => visitor.visit_bool(v),
            OptionValue::Int(v) => visitor.visit_i64(v),
            OptionValue::Float(v) => visitor.visit_f64(v),
            OptionValue::Text(v) => visitor.visit_string(v),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> std::result::Result<V::Value, Self::Error> {
        match self.0 {
            OptionValue::Text(v) => v.into_deserializer().deserialize_enum(name, variants, visitor),
            other => Held(other).deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, serde::de::value::Error> for Held {
    type Deserializer = Held;

    fn into_deserializer(self) -> Held {
        self
    }
}

/// Declares a struct of options. Each field has its documentation, a type that serde reads, and one of
///
/// - `= true;` or `= false;`
/// - `= "out.csv";` for any text of one line
/// - `= 4, int 1..=64;` for integers, with the least and the greatest value
/// - `= 0.5, float 0.0..=1.0;` for numbers
/// - `= "rows", of ["rows", "columns"];` for words, into a `String` or an enum
/// - `, of ["rows", "columns"];` for words that a recipe must choose from; a constant array will do for the list
///
/// ```
/// attar_plugin::options! {
///     /// Options of an example.
///     pub struct Options {
///         /// share of the weights that stay
///         pub keep: f64 = 0.5, float 0.0..=1.0;
///         /// whether to be thorough
///         pub thorough: bool = true;
///     }
/// }
/// let options: Options = attar_plugin::options::defaults()?;
/// assert!(options.thorough && options.keep == 0.5);
/// # Ok::<(), attar_plugin::Error>(())
/// ```
#[macro_export]
macro_rules! options {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident {
            $(
                $(#[doc = $doc:literal])*
                $field_vis:vis $field:ident : $ty:ty
                $(= $default:expr)?
                $(, int $int_min:literal ..= $int_max:expr)?
                $(, float $float_min:literal ..= $float_max:literal)?
                $(, of $words:tt)? ;
            )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, $crate::serde::Deserialize)]
        #[serde(crate = "attar_plugin::serde")]
        $vis struct $name {
            $($(#[doc = $doc])* $field_vis $field: $ty,)*
        }

        impl $crate::options::Options for $name {
            const DECLS: &'static [$crate::OptionDecl] = &[
                $($crate::OptionDecl {
                    name: stringify!($field),
                    doc: concat!($($doc),*).trim_ascii(),
                    kind: $crate::option_kind!(
                        [$($default)?] [$($int_min, $int_max)?] [$($float_min, $float_max)?] [$($words)?]
                    ),
                },)*
            ];
        }
    };
}

/// The kind of an option from what [`options!`](macro@crate::options) was given.
#[doc(hidden)]
#[macro_export]
macro_rules! option_kind {
    ([$default:expr] [] [] []) => {
        $crate::options::Plain($default).kind()
    };
    ([$default:expr] [$min:literal, $max:expr] [] []) => {
        $crate::OptionKind::Int { default: $default, min: $min, max: $max }
    };
    ([$default:expr] [] [$min:literal, $max:literal] []) => {
        $crate::OptionKind::Float { default: $default, min: $min, max: $max }
    };
    ([$default:expr] [] [] [$words:tt]) => {
        $crate::OptionKind::Choice { default: Some($default), of: &$words }
    };
    ([] [] [] [$words:tt]) => {
        $crate::OptionKind::Choice { default: None, of: &$words }
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate as attar_plugin;

    #[derive(Clone, Copy, Debug, PartialEq, serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Way {
        ByRow,
        ByColumn,
    }

    attar_plugin::options! {
        /// Of a test.
        struct All {
            /// a flag
            flag: bool = true;
            /// a count
            /// of things
            count: usize = 3, int 1..=8;
            share: f32 = 0.25, float 0.0..=1.0;
            way: Way = "by-row", of ["by-row", "by-column"];
            path: String = "a.csv";
        }
    }

    #[test]
    fn fields_become_declarations_and_values_fields() {
        let kinds: Vec<OptionKind> = All::DECLS.iter().map(|d| d.kind).collect();
        assert_eq!(kinds[0], OptionKind::Bool { default: true });
        assert_eq!(kinds[1], OptionKind::Int { default: 3, min: 1, max: 8 });
        assert_eq!(kinds[2], OptionKind::Float { default: 0.25, min: 0.0, max: 1.0 });
        assert_eq!(kinds[3], OptionKind::Choice { default: Some("by-row"), of: &["by-row", "by-column"] });
        assert_eq!(All::DECLS[1].doc, "a count of things");
        let all: All = defaults().unwrap();
        assert_eq!(all, All { flag: true, count: 3, share: 0.25, way: Way::ByRow, path: "a.csv".to_owned() });
        let mut values = vec![
            ("flag".to_owned(), OptionValue::Bool(false)),
            ("count".to_owned(), OptionValue::Int(5)),
            ("share".to_owned(), OptionValue::Float(1.0)),
            ("way".to_owned(), OptionValue::Text("by-column".to_owned())),
            ("path".to_owned(), OptionValue::Text(String::new())),
        ];
        let all: All = read(values.clone()).unwrap();
        assert_eq!(all, All { flag: false, count: 5, share: 1.0, way: Way::ByColumn, path: String::new() });
        values[1].1 = OptionValue::Text("five".to_owned());
        assert!(read::<All>(values).unwrap_err().message.contains("five"));
        assert!(read::<All>(Vec::new()).is_err());
    }
}
