//! Presets: the recipes behind `--quantize f32|bf16|w8|n4`.

use crate::error::{Error, ErrorKind, Result, nearest};

/// A named recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// As in the checkpoint, in 32 bits.
    F32,
    /// All matrices in bf16.
    Bf16,
    /// All matrices in w8.
    W8,
    /// Layers in n4, embedding and head in w8: they are the most sensitive tensors.
    N4,
}

impl Preset {
    /// All presets, largest artifacts first.
    pub const ALL: [Preset; 4] = [Preset::F32, Preset::Bf16, Preset::W8, Preset::N4];

    /// Name as `--quantize` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Preset::F32 => "f32",
            Preset::Bf16 => "bf16",
            Preset::W8 => "w8",
            Preset::N4 => "n4",
        }
    }

    /// Names of all presets.
    pub fn names() -> [&'static str; 4] {
        Preset::ALL.map(Preset::name)
    }

    /// The preset of that name.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownPreset`].
    pub fn by_name(name: &str) -> Result<Preset> {
        Preset::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| {
            Error::new(ErrorKind::UnknownPreset {
                name: name.to_owned(),
                nearest: nearest(name, Preset::names()),
            })
        })
    }

    /// The recipe it stands for where calibration is allowed: codes of few bits are chosen by what the layers' inputs
    /// are like.
    pub fn calibrated_recipe(self) -> &'static str {
        match self {
            Preset::N4 => {
                "[[pass]]\nname = \"quantize-gptq\"\ntensors = [\"model.layers.*\"]\nformat = \"n4\"\n\n\
                 [[pass]]\nname = \"quantize-rtn\"\nexclude = [\"model.layers.*\"]\nformat = \"w8\"\n"
            }
            Preset::F32 | Preset::Bf16 | Preset::W8 => self.recipe(),
        }
    }

    /// The recipe it stands for without calibration.
    pub fn recipe(self) -> &'static str {
        match self {
            Preset::F32 => "[[pass]]\nname = \"quantize-rtn\"\nformat = \"f32\"\n",
            Preset::Bf16 => "[[pass]]\nname = \"quantize-rtn\"\nformat = \"bf16\"\n",
            Preset::W8 => "[[pass]]\nname = \"quantize-rtn\"\nformat = \"w8\"\n",
            Preset::N4 => {
                "[[pass]]\nname = \"quantize-rtn\"\ntensors = [\"model.layers.*\"]\nformat = \"n4\"\n\n\
                 [[pass]]\nname = \"quantize-rtn\"\nexclude = [\"model.layers.*\"]\nformat = \"w8\"\n"
            }
        }
    }
}
