//! What a checkpoint says of its model, whichever container it came in.
//!
//! Read from `config.json` as transformers 4 and 5 write it, or from GGUF metadata. Absent settings take the defaults
//! that transformers has for all decoders here; architectures decide what the settings mean for them.

use crate::container::gguf::Gguf;
use crate::error::{Error, ErrorKind, Problems};
use crate::rope::{RopeScaling, RopeSpec};
use serde_json::{Map, Value};

/// Settings of a decoder. Counts are at least 1.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    pub context_length: usize,
    pub rms_norm_eps: f64,
    pub rope: RopeSpec,
    /// Whether the head is the embedding; `None` when the checkpoint's tensors decide.
    pub tied: Option<bool>,
    /// `None` when the checkpoint's tensors decide.
    pub attention_bias: Option<bool>,
    /// `None` when the checkpoint's tensors decide.
    pub mlp_bias: Option<bool>,
    pub window: Window,
}

/// Sliding-window settings, of which each architecture reads its own.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Window {
    /// `sliding_window`: absent, null, or a number of tokens.
    pub size: Setting<usize>,
    /// `use_sliding_window`.
    pub enabled: Option<bool>,
    /// First layer that slides.
    pub from_layer: Option<usize>,
    /// Per layer, whether it slides; wins over `from_layer`.
    pub layers: Option<Vec<bool>>,
}

/// A setting that can be absent, explicitly null, or have a value; the three differ where a default exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Setting<T> {
    #[default]
    Absent,
    Null,
    Value(T),
}

/// Layers a model may have: more is taken for a damaged file.
const MAX_LAYERS: u64 = 4096;
/// Bound of every other size.
const MAX_SIZE: u64 = 1 << 26;

/// Reads `config.json`. `None` when something essential is missing; the problems say what.
pub fn from_hf(config: &Map<String, Value>, problems: &mut Problems) -> Option<ModelConfig> {
    let mut r = Hf { config, problems };
    let layers = r.size("num_hidden_layers", MAX_LAYERS);
    let hidden = r.size("hidden_size", MAX_SIZE);
    let heads = r.size("num_attention_heads", MAX_SIZE);
    let ffn = r.size("intermediate_size", MAX_SIZE);
    let vocab = r.size("vocab_size", MAX_SIZE);
    let context_length = r.size("max_position_embeddings", u64::from(u32::MAX));
    let kv_heads = r.opt_size("num_key_value_heads", MAX_SIZE).or(heads);
    let head_dim = r.opt_size("head_dim", MAX_SIZE);
    let rms_norm_eps = r.number("rms_norm_eps").unwrap_or(1e-6);
    let tied = r.flag("tie_word_embeddings");
    let attention_bias = r.flag("attention_bias").or(Some(false));
    let mlp_bias = r.flag("mlp_bias").or(Some(false));
    let enabled = r.flag("use_sliding_window");
    let from_layer = r.config.get("max_window_layers").and_then(Value::as_u64).map(|n| n as usize);
    let size = match r.config.get("sliding_window") {
        None => Setting::Absent,
        Some(Value::Null) => Setting::Null,
        Some(_) => r.size("sliding_window", u64::from(u32::MAX)).map_or(Setting::Null, Setting::Value),
    };
    let sliding = r.layer_types(layers);
    r.activation();
    if r.config.get("quantization_config").is_some_and(|v| !v.is_null()) {
        let got = "weights quantized by another tool".to_owned();
        r.unsupported("quantization_config", got, "F32, F16 or BF16 weights; import the original model");
    }
    let rope = r.rope();
    let (layers, hidden, heads, ffn, vocab) = (layers?, hidden?, heads?, ffn?, vocab?);
    let config = ModelConfig {
        layers,
        hidden,
        heads,
        kv_heads: kv_heads?,
        head_dim: head_dim.unwrap_or(hidden / heads),
        ffn,
        vocab,
        context_length: context_length?,
        rms_norm_eps,
        rope: rope?,
        tied,
        attention_bias,
        mlp_bias,
        window: Window { size, enabled, from_layer, layers: sliding },
    };
    check(&config, ["num_attention_heads", "head_dim", "rms_norm_eps"], problems).then_some(config)
}

/// Reads the metadata of architecture `arch`. `None` when something essential is missing.
pub fn from_gguf(gguf: &Gguf, arch: &str, problems: &mut Problems) -> Option<ModelConfig> {
    let mut r = Meta { gguf, arch, problems };
    let layers = r.size("block_count", MAX_LAYERS);
    let hidden = r.size("embedding_length", MAX_SIZE);
    let heads = r.size("attention.head_count", MAX_SIZE);
    let ffn = r.size("feed_forward_length", MAX_SIZE);
    let context_length = r.size("context_length", u64::from(u32::MAX));
    let kv_heads = r.opt_size("attention.head_count_kv", MAX_SIZE).or(heads);
    let key_length = r.opt_size("attention.key_length", MAX_SIZE);
    let value_length = r.opt_size("attention.value_length", MAX_SIZE);
    let rope_dim = r.opt_size("rope.dimension_count", MAX_SIZE);
    let eps = r.float("attention.layer_norm_rms_epsilon");
    let size =
        r.opt_size("attention.sliding_window", u64::from(u32::MAX)).map_or(Setting::Null, Setting::Value);
    let embedding = gguf.tensor("token_embd.weight").and_then(|t| t.shape.first().copied());
    let vocab = match embedding {
        Some(n) => Some(n),
        None => r.size("vocab_size", MAX_SIZE),
    };
    let rope = r.rope();
    if eps.is_none() {
        let key = format!("{arch}.attention.layer_norm_rms_epsilon");
        r.problems.push(Error::config(key, "a number", "nothing"));
    }
    let (layers, hidden, heads, ffn, vocab) = (layers?, hidden?, heads?, ffn?, vocab?);
    let head_dim = key_length.unwrap_or(hidden / heads);
    for (key, got) in [("attention.value_length", value_length), ("rope.dimension_count", rope_dim)] {
        if let Some(got) = got.filter(|n| *n != head_dim) {
            let key = format!("{arch}.{key}");
            problems.push(Error::config(key, format!("the head width {head_dim}"), got.to_string()));
        }
    }
    let config = ModelConfig {
        layers,
        hidden,
        heads,
        kv_heads: kv_heads?,
        head_dim,
        ffn,
        vocab,
        context_length: context_length?,
        rms_norm_eps: eps?,
        rope: rope?,
        tied: None,
        attention_bias: None,
        mlp_bias: None,
        window: Window { size, ..Window::default() },
    };
    let keys = ["attention.head_count", "attention.key_length", "attention.layer_norm_rms_epsilon"];
    let keys = keys.map(|k| format!("{arch}.{k}"));
    check(&config, [&keys[0], &keys[1], &keys[2]], problems).then_some(config)
}

/// Checks what must hold between settings. `keys`: those of heads, head width and epsilon.
fn check(c: &ModelConfig, keys: [&str; 3], problems: &mut Problems) -> bool {
    let mut ok = true;
    let mut require = |holds: bool, key: &str, expected: String, got: String| {
        if !holds {
            problems.push(Error::config(key, expected, got));
            ok = false;
        }
    };
    let heads_fit = c.heads.is_multiple_of(c.kv_heads);
    require(heads_fit, keys[0], format!("a multiple of the {} KV heads", c.kv_heads), c.heads.to_string());
    let even = c.head_dim > 0 && c.head_dim.is_multiple_of(2);
    require(even, keys[1], "an even head width".to_owned(), c.head_dim.to_string());
    let eps = c.rms_norm_eps;
    require(eps.is_finite() && eps >= 0.0, keys[2], "0 or a positive number".to_owned(), eps.to_string());
    ok
}

/// `config.json` and where its problems go.
struct Hf<'a> {
    config: &'a Map<String, Value>,
    problems: &'a mut Problems,
}

impl Hf<'_> {
    fn wrong(&mut self, key: &str, expected: impl Into<String>, got: &Value) {
        self.problems.push(Error::config(key, expected, short(got)));
    }

    fn unsupported(&mut self, key: &str, got: String, supported: &str) {
        let kind = ErrorKind::Unsupported { got, supported: supported.to_owned() };
        self.problems.push(Error::new(kind).at_key(key));
    }

    fn opt_size(&mut self, key: &str, max: u64) -> Option<usize> {
        let v = self.config.get(key).filter(|v| !v.is_null())?;
        match v.as_u64() {
            Some(n) if (1..=max).contains(&n) => usize::try_from(n).ok(),
            _ => {
                self.wrong(key, format!("a number from 1 to {max}"), v);
                None
            }
        }
    }

    fn size(&mut self, key: &str, max: u64) -> Option<usize> {
        if self.config.get(key).is_none_or(Value::is_null) {
            self.problems.push(Error::config(key, format!("a number from 1 to {max}"), "nothing"));
            return None;
        }
        self.opt_size(key, max)
    }

    fn number(&mut self, key: &str) -> Option<f64> {
        let v = self.config.get(key).filter(|v| !v.is_null())?;
        if v.as_f64().is_none() {
            self.wrong(key, "a number", v);
        }
        v.as_f64()
    }

    fn flag(&mut self, key: &str) -> Option<bool> {
        let v = self.config.get(key).filter(|v| !v.is_null())?;
        if v.as_bool().is_none() {
            self.wrong(key, "true or false", v);
        }
        v.as_bool()
    }

    fn activation(&mut self) {
        let act = self.config.get("hidden_act").or_else(|| self.config.get("hidden_activation"));
        match act {
            None | Some(Value::Null) => {}
            Some(Value::String(s)) if s == "silu" || s == "swish" => {}
            Some(v) => self.unsupported("hidden_act", format!("activation {}", short(v)), "silu"),
        }
    }

    fn layer_types(&mut self, layers: Option<usize>) -> Option<Vec<bool>> {
        let v = self.config.get("layer_types").filter(|v| !v.is_null())?;
        let Value::Array(list) = v else {
            self.wrong("layer_types", "a list", v);
            return None;
        };
        if layers.is_some_and(|n| n != list.len()) {
            let got = format!("a list of {}", list.len());
            self.problems.push(Error::config("layer_types", "one entry per layer", got));
            return None;
        }
        let mut sliding = Vec::new();
        for v in list {
            match v.as_str() {
                Some("full_attention") => sliding.push(false),
                Some("sliding_attention") => sliding.push(true),
                _ => {
                    let got = format!("layer type {}", short(v));
                    self.unsupported("layer_types", got, "full_attention, sliding_attention");
                    return None;
                }
            }
        }
        Some(sliding)
    }

    /// transformers 5 has one object `rope_parameters`; 4 has `rope_theta` and, if the rotation is scaled,
    /// `rope_scaling`, whose type was once called `type`.
    fn rope(&mut self) -> Option<RopeSpec> {
        if let Some(part) = self.number("partial_rotary_factor").filter(|p| *p != 1.0) {
            let got = format!("rotation of {part} of each head");
            self.unsupported("partial_rotary_factor", got, "1.0");
            return None;
        }
        let (key, object) = match (self.config.get("rope_parameters"), self.config.get("rope_scaling")) {
            (Some(v), _) if !v.is_null() => ("rope_parameters", Some(v)),
            (_, Some(v)) if !v.is_null() => ("rope_scaling", Some(v)),
            _ => ("rope_scaling", None),
        };
        let empty = Map::new();
        let params = match object {
            None => &empty,
            Some(Value::Object(map)) => map,
            Some(v) => {
                self.wrong(key, "an object", v);
                return None;
            }
        };
        let theta = match params.get("rope_theta") {
            Some(v) => v.as_f64(),
            None => self.number("rope_theta").or(Some(10000.0)),
        };
        let Some(theta) = theta.filter(|t| t.is_finite() && *t > 0.0) else {
            self.problems.push(Error::config("rope_theta", "a positive number", "something else"));
            return None;
        };
        let part =
            |name: &str| params.get(name).and_then(Value::as_f64).filter(|x| x.is_finite() && *x > 0.0);
        let kind = params.get("rope_type").or_else(|| params.get("type"));
        let needed: &[&str] = match kind.and_then(Value::as_str) {
            None if kind.is_none_or(Value::is_null) => &[],
            Some("default") => &[],
            Some("linear") => &["factor"],
            Some("llama3") => {
                &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
            }
            _ => {
                let got = format!("rotation type {}", kind.map(short).unwrap_or_default());
                self.unsupported(key, got, "default, linear, llama3");
                return None;
            }
        };
        let mut values = Vec::new();
        for name in needed {
            match part(name) {
                Some(x) => values.push(x),
                None => {
                    let got = params.get(*name).map_or_else(|| "nothing".to_owned(), short);
                    self.problems.push(Error::config(format!("{key}.{name}"), "a positive number", got));
                }
            }
        }
        let scaling = match values[..] {
            _ if values.len() < needed.len() => return None,
            [factor, low, high, original] => {
                if low >= high {
                    let expected = format!("less than high_freq_factor {high}");
                    self.problems.push(Error::config(
                        format!("{key}.low_freq_factor"),
                        expected,
                        low.to_string(),
                    ));
                    return None;
                }
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_context: original,
                }
            }
            [factor] => RopeScaling::Linear { factor },
            _ => RopeScaling::None,
        };
        Some(RopeSpec { theta, scaling })
    }
}

/// GGUF metadata and where its problems go.
struct Meta<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
    problems: &'a mut Problems,
}

impl Meta<'_> {
    fn opt_size(&mut self, key: &str, max: u64) -> Option<usize> {
        let key = format!("{}.{key}", self.arch);
        let n = self.problems.keep(self.gguf.unsigned(&key)).flatten()?;
        if !(1..=max).contains(&n) {
            self.problems.push(Error::config(key, format!("a number from 1 to {max}"), n.to_string()));
            return None;
        }
        usize::try_from(n).ok()
    }

    fn size(&mut self, key: &str, max: u64) -> Option<usize> {
        let full = format!("{}.{key}", self.arch);
        if !self.gguf.metadata.contains_key(&full) {
            self.problems.push(Error::config(full, format!("a number from 1 to {max}"), "nothing"));
            return None;
        }
        self.opt_size(key, max)
    }

    fn float(&mut self, key: &str) -> Option<f64> {
        let key = format!("{}.{key}", self.arch);
        self.problems.keep(self.gguf.float(&key)).flatten()
    }

    /// Scaling of Llama 3 is no metadata but a tensor of factors, see [`crate::arch`].
    fn rope(&mut self) -> Option<RopeSpec> {
        let theta = self.float("rope.freq_base").unwrap_or(10000.0);
        if !(theta.is_finite() && theta > 0.0) {
            let key = format!("{}.rope.freq_base", self.arch);
            self.problems.push(Error::config(key, "a positive number", theta.to_string()));
            return None;
        }
        let key = format!("{}.rope.scaling.type", self.arch);
        let kind = self.problems.keep(self.gguf.text(&key)).flatten();
        // Files of 2023 gave a linear factor under another key and no type.
        let old = self.float("rope.scale_linear");
        let factor = self.float("rope.scaling.factor").or(old);
        let scaling = match (kind, factor) {
            (Some("none"), _) | (None, None) => RopeScaling::None,
            (Some("linear") | None, Some(factor)) if factor.is_finite() && factor > 0.0 => {
                RopeScaling::Linear { factor }
            }
            (Some("linear") | None, _) => {
                let key = format!("{}.rope.scaling.factor", self.arch);
                self.problems.push(Error::config(key, "a positive number", "something else"));
                return None;
            }
            (Some(other), _) => {
                let kind = ErrorKind::Unsupported {
                    got: format!("rotation type {other}"),
                    supported: "none, linear, factors in rope_freqs.weight".to_owned(),
                };
                self.problems.push(Error::new(kind).at_key(key));
                return None;
            }
        };
        Some(RopeSpec { theta, scaling })
    }
}

/// A JSON value for a message, cut short.
fn short(v: &Value) -> String {
    const MAX: usize = 60;
    let text = match v {
        Value::Array(list) => return format!("a list of {}", list.len()),
        Value::Object(map) => return format!("an object of {}", map.len()),
        plain => plain.to_string(),
    };
    match text.char_indices().nth(MAX) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
