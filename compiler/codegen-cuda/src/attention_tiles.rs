//! How prompts' attention is cut up for tensor cores: `emit/attention_mma.cu`.

use attar_artifact::manifest::KvType;
use attar_kernel::AttentionSpec;

/// Warps of a block.
const WARPS: usize = 4;
/// Widest head of which a warp holds the sums of 32 rows in registers.
const WIDE: usize = 128;
/// Widest head of which two stages of 32 positions fit in 99 KiB of shared memory, the least that a GPU lends a block.
const LONG: usize = 224;
/// With fewer heads blocks of 64 rows are enough work, and there are twice as many for multiprocessors to share.
const MANY_HEADS: usize = 16;

/// What a block of the kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttentionTiles {
    /// Sixteen rows each, of one warp.
    pub(crate) row_tiles: usize,
    /// Positions of a step.
    pub(crate) positions: usize,
}

impl AttentionTiles {
    /// Blocks of each KV head beside one for each tile of rows. Where tiles are few they share out the sequences of a tile: a step of
    /// many sequences has few rows of each, all of which a block would walk one after the other.
    pub(crate) const SPARE_BLOCKS: usize = 15;

    /// `None` where attention is left to the kernel that computes in f32: f32 caches, and heads that are no multiples of 16 wide.
    pub(crate) fn of(attention: &AttentionSpec) -> Option<AttentionTiles> {
        let AttentionSpec { head_dim, heads, kv, .. } = *attention;
        if kv == KvType::F32 || !head_dim.is_multiple_of(16) {
            return None;
        }
        let row_tiles = if head_dim <= WIDE && heads >= MANY_HEADS { 2 } else { 1 };
        Some(AttentionTiles { row_tiles, positions: if head_dim <= LONG { 32 } else { 16 } })
    }

    /// Rows of a block.
    pub(crate) fn rows(self) -> usize {
        WARPS * 16 * self.row_tiles
    }

    /// Blocks that a multiprocessor shall have registers for.
    pub(crate) fn blocks(self, attention: &AttentionSpec) -> usize {
        match (attention.head_dim, self.row_tiles) {
            (..=64, 1) => 4,
            (..=128, 1) => 3,
            (..=64, _) if !attention.kv.has_scales() => 3,
            _ => 2,
        }
    }

    /// Shared memory of a block, `struct Shared` of the template: tiles of keys and values; queries as f16, and for each row a
    /// scale and where it ends. Most rows of matrices are eight numbers longer than they need be.
    pub(crate) fn shared_bytes(self, attention: &AttentionSpec) -> usize {
        let (d, positions) = (attention.head_dim, self.positions);
        let tiles = if attention.kv.has_scales() {
            // Two stages of codes and scales, what is unpacked of one, and the largest scale.
            let codes = positions * d * attention.kv.bits() / 8 + positions * 4;
            2 * 2 * codes + 2 * (d * (positions + 8) + positions * (d + 8)) + 16
        } else {
            // Rows of keys end with their stage.
            (2 * 2 * (d * positions + positions * (d + 8))).next_multiple_of(128)
        };
        tiles + self.rows() * (2 * (d + 8) + 8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gpu_has_the_shared_memory() {
        for head_dim in (16..=256).step_by(16) {
            for (heads, kv) in [(4, KvType::F16), (32, KvType::F16), (4, KvType::Int8), (32, KvType::Int4)] {
                let attention = AttentionSpec {
                    heads,
                    kv_heads: 4,
                    head_dim,
                    scale: 1.0,
                    window: None,
                    kv,
                    page_len: 32,
                    span: 256,
                };
                let tiles = AttentionTiles::of(&attention).expect("a multiple of 16");
                assert!(tiles.shared_bytes(&attention) <= 99 << 10, "{head_dim}");
            }
        }
    }
}
