//! What a launch did, counted.

use std::collections::BTreeMap;
use std::ops::AddAssign;

/// Executions of one opcode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// By warps, whatever their active lanes.
    pub warps: u64,
    /// By active threads.
    pub threads: u64,
}

/// Traffic of one kind of access.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Accesses, one per warp instruction.
    pub requests: u64,
    /// Bytes that active lanes asked for.
    pub bytes: u64,
    /// Distinct sectors of 32 bytes, added up over accesses: times 32, what a device without caches would move.
    pub sectors: u64,
}

/// Shared memory accesses and the conflicts of their banks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SharedTraffic {
    pub requests: u64,
    pub bytes: u64,
    /// Passes over the 32 banks that the accesses take.
    pub wavefronts: u64,
    /// Passes they would take without conflicts.
    pub ideal_wavefronts: u64,
}

/// Counts of one launch, or of several added up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// By opcode, spelled as in the text with all modifiers.
    pub opcodes: BTreeMap<String, Count>,
    pub global_read: Traffic,
    pub global_written: Traffic,
    /// Atomic updates of global memory.
    pub global_atomic: Traffic,
    /// Bytes that asynchronous copies moved between global and shared memory, either way.
    pub async_bytes: u64,
    pub shared_read: SharedTraffic,
    pub shared_written: SharedTraffic,
    /// Barriers that were completed.
    pub barriers: u64,
    /// Multiply-adds done by matrix instructions.
    pub matrix_macs: u64,
}

impl Stats {
    /// Warp instructions executed.
    pub fn warp_instructions(&self) -> u64 {
        self.opcodes.values().map(|c| c.warps).sum()
    }

    /// Thread instructions executed.
    pub fn thread_instructions(&self) -> u64 {
        self.opcodes.values().map(|c| c.threads).sum()
    }

    /// Executions of all opcodes that begin with `prefix`, as `mma.sync` or `ld.global`.
    pub fn count(&self, prefix: &str) -> Count {
        let mut total = Count::default();
        for (_, count) in self.opcodes.iter().filter(|(opcode, _)| opcode.starts_with(prefix)) {
            total += *count;
        }
        total
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Count) {
        self.warps += other.warps;
        self.threads += other.threads;
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Traffic) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.sectors += other.sectors;
    }
}

impl AddAssign for SharedTraffic {
    fn add_assign(&mut self, other: SharedTraffic) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.wavefronts += other.wavefronts;
        self.ideal_wavefronts += other.ideal_wavefronts;
    }
}

impl AddAssign<&Stats> for Stats {
    fn add_assign(&mut self, other: &Stats) {
        for (opcode, count) in &other.opcodes {
            *self.opcodes.entry(opcode.clone()).or_default() += *count;
        }
        self.global_read += other.global_read;
        self.global_written += other.global_written;
        self.global_atomic += other.global_atomic;
        self.async_bytes += other.async_bytes;
        self.shared_read += other.shared_read;
        self.shared_written += other.shared_written;
        self.barriers += other.barriers;
        self.matrix_macs += other.matrix_macs;
    }
}
