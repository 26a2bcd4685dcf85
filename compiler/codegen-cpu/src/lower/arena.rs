//! Memory planning: offsets in the activation arena for buffers with known lifetimes.
//!
//! Sizes are linear in the step's tokens T and logit rows R, and R never exceeds T, so a buffer of `c` bytes per
//! token or per row fits `c * T` bytes. All such buffers share one line measured in bytes per token; each gets the
//! lowest free stretch, largest first, and two buffers that live at the same time never overlap whatever T is.
//! Buffers of fixed size stand on a line of their own before it, and buffers that grow with the spans S of the context on
//! one after it, measured in bytes per token and span. Every offset is a multiple of 64.

use super::launches::{BufId, VirtualLaunch};
use attar_artifact::program::Extent;

const ALIGN: u64 = 64;

/// When a buffer is written first and touched last, as launch indices, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) size: Extent,
    pub(super) first: usize,
    pub(super) last: usize,
}

/// Where each buffer stands, and how much there must be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) offsets: Vec<Extent>,
    pub(super) arena: Extent,
}

/// Lifetimes of all buffers. `kept` are function inputs (alive from the start) and outputs (alive to the end).
pub(super) fn lifetimes(
    sizes: &[Extent],
    launches: &[VirtualLaunch],
    kept_from_start: &[BufId],
    kept_to_end: &[BufId],
) -> Vec<Life> {
    let mut lives: Vec<Option<Life>> = vec![None; sizes.len()];
    for (at, launch) in launches.iter().enumerate() {
        for buf in launch.reads().chain(launch.writes()) {
            let life = lives[buf.0].get_or_insert(Life { size: sizes[buf.0], first: at, last: at });
            life.last = at;
        }
    }
    for (buf, life) in lives.iter_mut().enumerate() {
        if kept_from_start.contains(&BufId(buf)) {
            life.get_or_insert(Life { size: sizes[buf], first: 0, last: 0 }).first = 0;
        }
        if kept_to_end.contains(&BufId(buf)) {
            let end = launches.len();
            life.get_or_insert(Life { size: sizes[buf], first: end, last: end }).last = end;
        }
    }
    let unused = Life { size: Extent::default(), first: 0, last: 0 };
    lives.into_iter().map(|l| l.unwrap_or(unused)).collect()
}

/// Pairs (input, output) of launches that may write over an input that nobody reads afterwards.
pub(super) fn in_place(lives: &[Life], launches: &[VirtualLaunch], kept: &[BufId]) -> Vec<(BufId, BufId)> {
    let mut pairs = Vec::new();
    for (at, launch) in launches.iter().enumerate() {
        let Some(over) = launch.may_overwrite else { continue };
        let Some(out) = launch.writes().next() else { continue };
        let dies = lives[over.0].last == at && !kept.contains(&over);
        let once = launch.reads().filter(|b| *b == over).count() == 1;
        if dies && once && lives[out.0].first == at && lives[out.0].size == lives[over.0].size {
            pairs.push((over, out));
        }
    }
    pairs
}

/// Places every buffer; `same` lists pairs that share their place, the first dying where the second begins.
pub(super) fn place(lives: &[Life], same: &[(BufId, BufId)]) -> Plan {
    // A chain of in-place steps is one buffer that lives from the first to the last of them.
    let mut group: Vec<usize> = (0..lives.len()).collect();
    for (a, b) in same {
        let root = find(&group, a.0);
        let other = find(&group, b.0);
        group[root.max(other)] = root.min(other);
    }
    let roots: Vec<usize> = (0..lives.len()).map(|b| find(&group, b)).collect();
    let mut merged = lives.to_vec();
    for (buf, root) in roots.iter().enumerate() {
        merged[*root].first = merged[*root].first.min(lives[buf].first);
        merged[*root].last = merged[*root].last.max(lives[buf].last);
    }
    let is_root = |b: &usize| roots[*b] == *b;
    let spanned = |b: &usize| merged[*b].size.per_token_span > 0;
    let fixed = |b: &usize| merged[*b].size == Extent::fixed(merged[*b].size.base);

    let members: Vec<usize> = (0..lives.len()).filter(is_root).filter(fixed).collect();
    let (fixed_at, base) = line(&merged, &members, |s| s.base);
    let members: Vec<usize> = (0..lives.len()).filter(is_root).filter(|b| !fixed(b) && !spanned(b)).collect();
    // T >= 1 and S >= 1, so a constant part is covered by as many bytes per token, and so on.
    let (linear_at, per_token) = line(&merged, &members, |s| s.base + s.per_token + s.per_row);
    let members: Vec<usize> = (0..lives.len()).filter(is_root).filter(spanned).collect();
    let total = |s: &Extent| s.base + s.per_token + s.per_row + s.per_token_span;
    let (spanned_at, per_token_span) = line(&merged, &members, total);

    let mut offsets = vec![Extent::default(); lives.len()];
    for (buf, at) in fixed_at {
        offsets[buf] = Extent::fixed(at);
    }
    for (buf, at) in linear_at {
        offsets[buf] = Extent { base, ..Extent::per_token(at) };
    }
    for (buf, at) in spanned_at {
        offsets[buf] = Extent { base, per_token, per_row: 0, per_token_span: at };
    }
    for (buf, root) in roots.iter().enumerate() {
        offsets[buf] = offsets[*root];
    }
    Plan { offsets, arena: Extent { base, per_token, per_row: 0, per_token_span } }
}

fn find(group: &[usize], mut b: usize) -> usize {
    while group[b] != b {
        b = group[b];
    }
    b
}

/// Offsets of `members` on one line, and its length: largest first, each at the lowest place that is free during
/// its whole life.
fn line(lives: &[Life], members: &[usize], size: impl Fn(&Extent) -> u64) -> (Vec<(usize, u64)>, u64) {
    let mut order = members.to_vec();
    order.sort_by_key(|b| (std::cmp::Reverse(size(&lives[*b].size)), lives[*b].first, *b));
    let mut placed: Vec<(usize, u64, u64)> = Vec::with_capacity(order.len());
    let mut length = 0;
    for buf in order {
        let (life, len) = (lives[buf], size(&lives[buf].size).next_multiple_of(ALIGN));
        let mut taken: Vec<(u64, u64)> = placed
            .iter()
            .filter(|(other, ..)| lives[*other].first <= life.last && life.first <= lives[*other].last)
            .map(|(_, start, end)| (*start, *end))
            .collect();
        taken.sort_unstable();
        let mut at = 0;
        for (start, end) in taken {
            if at + len <= start {
                break;
            }
            at = at.max(end);
        }
        placed.push((buf, at, at + len));
        length = length.max(at + len);
    }
    (placed.into_iter().map(|(buf, at, _)| (buf, at)).collect(), length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_artifact::program::StepSize;
    use proptest::prelude::*;

    fn life() -> impl Strategy<Value = Life> {
        let size = prop_oneof![
            (1u64..5000).prop_map(Extent::per_token),
            (1u64..5000).prop_map(Extent::per_row),
            (1u64..5000).prop_map(Extent::fixed),
            (1u64..5000).prop_map(Extent::per_token_span),
        ];
        (size, 0usize..40, 0usize..12).prop_map(|(size, first, len)| Life { size, first, last: first + len })
    }

    proptest! {
        #[test]
        fn buffers_alive_together_never_overlap(lives in prop::collection::vec(life(), 0..60)) {
            let plan = place(&lives, &[]);
            let steps = [(1, 0), (1, 1), (2, 1), (16, 16), (17, 3), (512, 1), (512, 512)];
            for ((tokens, rows), spans) in steps.into_iter().flat_map(|s| [1, 2, 31].map(|n| (s, n))) {
                let step = StepSize { tokens, rows, spans };
                let range = |b: usize| {
                    let start = plan.offsets[b].at(step).expect("small");
                    (start, start + lives[b].size.at(step).expect("small"))
                };
                for a in 0..lives.len() {
                    prop_assert_eq!(range(a).0 % ALIGN, 0);
                    prop_assert!(range(a).1 <= plan.arena.at(step).expect("small"));
                    for b in 0..a {
                        let together = lives[a].first <= lives[b].last && lives[b].first <= lives[a].last;
                        let apart = range(a).1 <= range(b).0 || range(b).1 <= range(a).0;
                        prop_assert!(apart || !together, "{a} {b} at {step:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_dead_buffer_is_used_again() {
        let size = Extent::per_token(100);
        let lives: Vec<Life> = (0..10).map(|i| Life { size, first: i, last: i + 1 }).collect();
        assert_eq!(place(&lives, &[]).arena, Extent::per_token(256));
    }

    #[test]
    fn in_place_chains_share_one_place() {
        let size = Extent::per_token(64);
        let lives: Vec<Life> = (0..4).map(|i| Life { size, first: i, last: i + 1 }).collect();
        let same = [(BufId(0), BufId(1)), (BufId(1), BufId(2)), (BufId(2), BufId(3))];
        let plan = place(&lives, &same);
        assert_eq!(plan.arena, size);
        assert!(plan.offsets.iter().all(|o| *o == Extent::default()));
    }
}
