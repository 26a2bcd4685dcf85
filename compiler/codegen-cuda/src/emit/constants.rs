//! Constants that stand before a template.

use attar_artifact::manifest::KvType;
use attar_format::planes::planes;
use attar_format::{FormatRef, PackedLayout, Scale};
use attar_kernel::hadamard;
use std::collections::BTreeSet;

/// Lines of declarations; of two with one name the first counts.
pub(super) struct Constants {
    lines: Vec<String>,
    names: BTreeSet<String>,
}

impl Constants {
    pub(super) fn new() -> Constants {
        Constants { lines: vec!["// What this kernel was made for.".to_owned()], names: BTreeSet::new() }
    }

    pub(super) fn int(&mut self, name: &str, value: usize) -> &mut Constants {
        self.declare(name, "int", &value.to_string())
    }

    pub(super) fn flag(&mut self, name: &str, value: bool) -> &mut Constants {
        self.declare(name, "bool", &value.to_string())
    }

    /// The shortest decimal that is read back as the same number.
    pub(super) fn float(&mut self, name: &str, value: f32) -> &mut Constants {
        self.declare(name, "float", &format!("{value:?}f"))
    }

    pub(super) fn line(&mut self, text: &str) -> &mut Constants {
        self.lines.push(text.to_owned());
        self
    }

    fn declare(&mut self, name: &str, kind: &str, value: &str) -> &mut Constants {
        if self.names.insert(name.to_owned()) {
            self.lines.push(format!("constexpr {kind} {name} = {value};"));
        }
        self
    }

    /// `struct W`: format and shape of a packed matrix, which must fit each other.
    pub(super) fn weights(&mut self, format: FormatRef, n: usize, k: usize) -> &mut Constants {
        let layout = PackedLayout::new(format, n, k).expect("lowering has packed the matrix");
        let planes = format.table().map_or(&[][..], |t| planes(t.bits));
        let (bias, choice_bits) = match format.scale {
            Scale::RowF32Field8 { bias, choice_bits } => (bias, choice_bits),
            Scale::None | Scale::Bf16 => (0, 0),
        };
        let bf16_scales = format.scale == Scale::Bf16;
        let plane = |at: usize| planes.get(at).map_or((0, 0), |p| (p.first_row, p.width));
        let ((row, width), (high_row, high_width)) = (plane(0), plane(1));
        let group_rows = if layout.groups > 0 { format.group_rows() } else { 0 };
        self.line(&format!(
            "/// Weights [{n}, {k}] in format {}.\nstruct W {{\n  static constexpr int N = {n}, K = {k}, GROUPS = {}, \
             BITS = {}, ENTRIES = {};\n  static constexpr int HEADER = {}, BLOCK = {}, FIELDS = {}, CODES = {}, GROUP_ROWS = {group_rows};\n  \
             static constexpr int PLANE_ROW = {row}, PLANE_WIDTH = {width}, HIGH_ROW = {high_row}, HIGH_WIDTH = \
             {high_width};\n  static constexpr int BIAS = {bias}, CHOICE_BITS = {choice_bits};\n  \
             static constexpr bool BF16_SCALES = {bf16_scales};\n}};",
            format.name,
            layout.groups,
            format.code_bits(),
            format.table().map_or(0, |t| 1 << t.bits),
            layout.header_bytes,
            layout.block_bytes,
            layout.fields_offset,
            layout.codes_offset,
        ))
    }

    /// `struct C`: the cache.
    pub(super) fn cache(
        &mut self,
        kv: KvType,
        head_dim: usize,
        kv_heads: usize,
        page_len: usize,
    ) -> &mut Constants {
        let kind = match kv {
            KvType::F32 => 0,
            KvType::F16 => 1,
            KvType::Int8 => 2,
            KvType::Int4 => 3,
        };
        self.line(&format!(
            "/// {kv:?} cache of {kv_heads} heads of {head_dim}.\nstruct C {{\n  static constexpr int KIND = {kind}, HEAD_DIM = \
             {head_dim}, KV_HEADS = {kv_heads}, PAGE_LEN = {page_len};\n  static constexpr int BLOCK = {}, SCALES = {}, RUN = \
             {}, HADAMARD = {};\n  static constexpr float HADAMARD_FACTOR = {:?}f;\n}};",
            kv.block_bytes(head_dim, page_len),
            kv.scales_offset(head_dim, page_len),
            KvType::RUN,
            hadamard::order(head_dim),
            hadamard::factor(head_dim),
        ))
    }

    pub(super) fn finish(&self) -> String {
        self.lines.join("\n") + "\n"
    }
}
