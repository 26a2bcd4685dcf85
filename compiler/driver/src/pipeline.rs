//! The passes that always run, in order, each with the reason for its place.
//!
//! A recipe's own passes join the phase they declare, after the default ones of that phase.

/// A default pass and why it stands where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub pass: &'static str,
    pub reason: &'static str,
}

/// Default passes by phase: canonicalize, then fuse. Compression belongs to the recipe.
pub const DEFAULT: &[Position] = &[
    Position {
        pass: "fold-constants",
        reason: "first, because folded weights are what every later pass should see",
    },
    Position {
        pass: "eliminate-common-subexpressions",
        reason: "after folding, which makes equal nodes out of unequal ones",
    },
    Position {
        pass: "eliminate-dead-code",
        reason: "last of its phase, to drop what the two before left without users, so that no pass compresses a weight \
                 nobody reads",
    },
    Position {
        pass: "fuse-qkv",
        reason: "after compress: rows are stacked as codes, so quantization has seen the checkpoint's own tensors",
    },
    Position {
        pass: "fuse-gate-up",
        reason: "like fuse-qkv; the two touch different blocks and their order does not matter",
    },
    Position { pass: "fuse-rope", reason: "needs the joined projection that fuse-qkv makes" },
    Position { pass: "fuse-swiglu", reason: "needs the joined projection that fuse-gate-up makes" },
    Position {
        pass: "fuse-norm",
        reason: "after the projections are joined: a norm moves only into its single user",
    },
    Position {
        pass: "fuse-residual",
        reason: "last, because it takes plain linears that no other fusion wanted",
    },
];

/// Names of the default passes, in order.
pub fn default_passes() -> Vec<&'static str> {
    DEFAULT.iter().map(|p| p.pass).collect()
}
