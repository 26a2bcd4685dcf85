//! Presets: the recipes behind `--quantize`, a format for the layers and one for embedding and head.

use crate::error::{Error, ErrorKind, Result, nearest};
use attar_format::{FormatRef, formats};

/// Formats of all matrices. Layers come first in names: `n4/n6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// Of the matrices within layers.
    pub layers: FormatRef,
    /// Of embedding and head, which are the most sensitive matrices.
    pub rest: FormatRef,
}

impl Preset {
    /// As in the checkpoint, in 32 bits.
    pub const F32: Preset = Preset { layers: &formats::F32, rest: &formats::F32 };
    /// All matrices in bf16.
    pub const BF16: Preset = Preset { layers: &formats::BF16, rest: &formats::BF16 };
    /// All matrices in w8.
    pub const W8: Preset = Preset { layers: &formats::W8, rest: &formats::W8 };
    /// Layers in n4, embedding and head in w8.
    pub const N4: Preset = Preset { layers: &formats::N4, rest: &formats::W8 };

    /// The preset of a format of the layers. Embedding and head are kept as they are where layers are; in w8 beside formats of
    /// four bits and more; in two bits and more above the layers beside smaller ones, where w8 would be half the file.
    pub fn of(layers: FormatRef) -> Preset {
        let rest = match layers.name {
            _ if layers.is_uncompressed() => layers,
            "n3" => &formats::N6,
            "n2" => &formats::N5,
            _ => &formats::W8,
        };
        Preset { layers, rest }
    }

    /// One preset for every format, in the order of the formats.
    pub fn all() -> impl Iterator<Item = Preset> {
        formats::ALL.iter().map(|f| Preset::of(f))
    }

    /// Name as `--quantize` takes it: the format of the layers, and the other one where it is not the usual one.
    pub fn name(&self) -> String {
        if *self == Preset::of(self.layers) {
            self.layers.name.to_owned()
        } else {
            format!("{}/{}", self.layers.name, self.rest.name)
        }
    }

    /// The preset of that name.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownPreset`].
    pub fn by_name(name: &str) -> Result<Preset> {
        let format = |part: &str| {
            attar_format::by_name(part).ok_or_else(|| {
                let nearest = nearest(part, formats::ALL.iter().map(|f| f.name));
                Error::new(ErrorKind::UnknownPreset { name: name.to_owned(), nearest })
            })
        };
        match name.split_once('/') {
            None => format(name).map(Preset::of),
            Some((layers, rest)) => Ok(Preset { layers: format(layers)?, rest: format(rest)? }),
        }
    }

    /// The recipe it stands for where calibration is allowed: codes of few bits are chosen by what the layers' inputs
    /// are like.
    pub fn calibrated_recipe(&self) -> String {
        let pass =
            |format: FormatRef| if format.table().is_some() { "quantize-gptq" } else { "quantize-rtn" };
        self.recipe_with(pass(self.layers), pass(self.rest), "")
    }

    /// The recipe it stands for without calibration.
    pub fn recipe(&self) -> String {
        self.recipe_with("quantize-rtn", "quantize-rtn", "")
    }

    /// The same without a search for scales: as large and as fast, and quickly made.
    pub fn rough_recipe(&self) -> String {
        self.recipe_with("quantize-rtn", "quantize-rtn", "search = false\n")
    }

    fn recipe_with(&self, layers: &str, rest: &str, options: &str) -> String {
        let Preset { layers: format, rest: other } = self;
        if (format, layers) == (other, rest) {
            return format!("[[pass]]\nname = \"{layers}\"\nformat = \"{}\"\n{options}", format.name);
        }
        format!(
            "[[pass]]\nname = \"{layers}\"\ntensors = [\"model.layers.*\"]\nformat = \"{}\"\n{options}\n\
             [[pass]]\nname = \"{rest}\"\nexclude = [\"model.layers.*\"]\nformat = \"{}\"\n{options}",
            format.name, other.name
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_named_as_they_are_written() {
        for preset in Preset::all() {
            assert_eq!(Preset::by_name(&preset.name()).unwrap(), preset);
            assert_eq!(preset.name(), preset.layers.name);
        }
        assert_eq!(Preset::by_name("n4/w8").unwrap(), Preset::N4);
        assert_eq!(Preset::by_name("n4/n6").unwrap().name(), "n4/n6");
        for wrong in ["", "q4", "n4/", "n4/n5/n6", "/n4"] {
            assert!(Preset::by_name(wrong).is_err(), "{wrong}");
        }
    }
}
