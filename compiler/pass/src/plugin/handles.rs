//! Numbers that stand for nodes, values and buffers. They carry the run they belong to and what they stand for, so that one that
//! was made up, or outlives its run, is told from one that is good.

use attar_ir::NodeId;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a handle stands for: its highest 4 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Run = 1,
    Node = 2,
    Value = 3,
    Buffer = 4,
}

/// Bits of the number of a run, and where they stand.
const RUN_BITS: u32 = 20;
const RUN_AT: u32 = 40;
const SLOT_AT: u32 = 32;
const KIND_AT: u32 = 60;

/// A number for a run, different from those of the million runs before.
pub(super) fn next_run() -> u64 {
    static RUNS: AtomicU64 = AtomicU64::new(1);
    loop {
        let run = RUNS.fetch_add(1, Ordering::Relaxed) & ((1 << RUN_BITS) - 1);
        if run != 0 {
            return run;
        }
    }
}

/// Whether nodes belong to the graph, or to the body of the custom op of that number, from 1.
pub(super) type Space = usize;
pub(super) const GRAPH: Space = 0;

/// The handles of a run.
#[derive(Debug)]
pub(super) struct Handles {
    run: u64,
    /// By index; `None` once the node is gone.
    nodes: Vec<Option<(Space, NodeId)>>,
    by_node: BTreeMap<(Space, NodeId), u32>,
    buffers: u32,
}

impl Handles {
    pub(super) fn new() -> Handles {
        Handles { run: next_run(), nodes: Vec::new(), by_node: BTreeMap::new(), buffers: 0 }
    }

    fn packed(&self, kind: Kind, slot: u8, index: u32) -> u64 {
        (kind as u64) << KIND_AT | self.run << RUN_AT | u64::from(slot) << SLOT_AT | u64::from(index)
    }

    /// The handle of the run itself.
    pub(super) fn run(&self) -> u64 {
        self.packed(Kind::Run, 0, 0)
    }

    fn index_of(&mut self, space: Space, node: NodeId) -> u32 {
        *self.by_node.entry((space, node)).or_insert_with(|| {
            self.nodes.push(Some((space, node)));
            self.nodes.len() as u32 - 1
        })
    }

    pub(super) fn node(&mut self, space: Space, node: NodeId) -> u64 {
        let index = self.index_of(space, node);
        self.packed(Kind::Node, 0, index)
    }

    pub(super) fn value(&mut self, space: Space, node: NodeId, slot: u16) -> u64 {
        let index = self.index_of(space, node);
        // No op has nearly as many outputs.
        self.packed(Kind::Value, slot.min(255) as u8, index)
    }

    pub(super) fn buffer(&mut self) -> u64 {
        self.buffers += 1;
        self.packed(Kind::Buffer, 0, self.buffers)
    }

    /// What a handle of that kind stands for, and its slot.
    pub(super) fn find(&self, handle: u64, kind: Kind) -> Result<(Space, NodeId, u16), &'static str> {
        self.check(handle, kind)?;
        let slot = (handle >> SLOT_AT & 0xff) as u16;
        match self.nodes.get((handle & 0xffff_ffff) as usize) {
            Some(Some((space, node))) => Ok((*space, *node, slot)),
            Some(None) => Err("its node has been removed"),
            None => Err("no such handle was given out"),
        }
    }

    /// Whether a handle is of that kind and of this run.
    pub(super) fn check(&self, handle: u64, kind: Kind) -> Result<(), &'static str> {
        if handle >> KIND_AT != kind as u64 {
            return Err(match kind {
                Kind::Run => "no handle of a run",
                Kind::Node => "no handle of a node",
                Kind::Value => "no handle of a value",
                Kind::Buffer => "no handle of a buffer",
            });
        }
        if handle >> RUN_AT & ((1 << RUN_BITS) - 1) != self.run {
            return Err("the run it belongs to has ended");
        }
        Ok(())
    }

    /// Forgets a node: its handles are stale from now on.
    pub(super) fn forget(&mut self, space: Space, node: NodeId) {
        if let Some(index) = self.by_node.remove(&(space, node))
            && let Some(entry) = self.nodes.get_mut(index as usize)
        {
            *entry = None;
        }
    }

    /// Nodes of the graph, or of a custom op's body, that have handles.
    pub(super) fn nodes_of(&self, space: Space) -> impl Iterator<Item = NodeId> {
        self.by_node.keys().filter(move |(s, _)| *s == space).map(|(_, n)| *n)
    }

    /// Forgets all nodes of the graph, or of a custom op's body.
    pub(super) fn forget_space(&mut self, space: Space) {
        let gone: Vec<NodeId> = self.nodes_of(space).collect();
        gone.into_iter().for_each(|node| self.forget(space, node));
    }
}

/// Whether a handle is one of a run that has ended, or of none at all.
pub fn is_handle_of_run(handle: u64) -> bool {
    handle >> KIND_AT == Kind::Run as u64
}
