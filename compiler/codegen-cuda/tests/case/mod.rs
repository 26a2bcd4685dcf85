//! The launches that CPU kernels are tested with, as launches of a GPU.

#![allow(dead_code, reason = "CPU tests need more of what is shared")]

#[path = "../../../codegen-cpu/tests/case/attention_cases.rs"]
pub(crate) mod attention_cases;
#[path = "../../../codegen-cpu/tests/case/launch.rs"]
mod launch;
#[path = "../../../codegen-cpu/tests/case/linear_cases.rs"]
pub(crate) mod linear_cases;
#[path = "../../../codegen-cpu/tests/case/rounded.rs"]
mod rounded;
#[path = "../../../codegen-cpu/tests/case/row_cases.rs"]
pub(crate) mod row_cases;

pub(crate) use launch::{Arg, Case, Check, Random, bytes_of, cache_codes, f32s};
pub(crate) use rounded::Rounding;

use attar_artifact::manifest::KvType;
use attar_artifact::program::{Arg as SlotArg, EntryBlocks, Extent, Launch, Program, ProgramKind, StepSize};
use attar_codegen_cuda::{CudaPrograms, translate};
use attar_kernel::{KernelSpec, RowTile};
use attar_ptx::{Buffer, Memory, Module, Param, Stats};
use std::collections::BTreeMap;

/// Bytes between the places of two arguments in the arena that a case is translated with.
const SLOT: u64 = 1 << 32;

impl Case {
    /// The launches that a GPU makes of this one.
    pub(crate) fn on_gpu(&self) -> CudaPrograms {
        let place = |slot: usize, len: usize| SlotArg::Arena {
            offset: Extent::fixed(slot as u64 * SLOT),
            len: Extent::fixed(len as u64),
        };
        let args = self.args.iter().enumerate().map(|(slot, arg)| match arg {
            Arg::Number(n) => SlotArg::Imm(*n),
            Arg::Input(bytes) | Arg::Output(bytes, _) => place(slot, bytes.len()),
        });
        let launch = Launch {
            kernel: self.spec.name(),
            args: args.collect(),
            grid: Extent::fixed(self.grid),
            weight_bytes: 0,
            note: String::new(),
            tail: false,
            blocks: None,
        };
        let program = Program {
            kind: ProgramKind::Prefill,
            max_tokens: 1 << 16,
            arena: Extent::fixed(self.args.len() as u64 * SLOT),
            launches: vec![launch],
        };
        translate(std::slice::from_ref(&self.spec), &[program]).expect("every case is a launch")
    }

    /// Tokens of the step that the launch is one of.
    fn tokens(&self) -> u64 {
        let number = |slot: usize| match self.args[slot] {
            Arg::Number(n) => n,
            _ => panic!("argument {slot} is a number"),
        };
        match &self.spec {
            KernelSpec::Linear(_) => number(self.args.len() - 2),
            KernelSpec::Attention { .. } => number(8),
            KernelSpec::AttentionSpan(a) => self.grid / (a.kv_heads as u64 * number(8)),
            KernelSpec::AttentionMerge { attention, .. } => self.grid / attention.kv_heads as u64,
            _ => self.grid,
        }
    }

    /// How far results may be off where a GPU multiplies operands that it rounds to 16 bits.
    pub(crate) fn rounding(&self) -> Option<Rounding> {
        match &self.spec {
            KernelSpec::Linear(l) if l.rows == RowTile::Many && l.format.code_bits() != 32 => {
                Some(Rounding::BF16)
            }
            KernelSpec::Attention { attention: a, .. }
                if a.kv != KvType::F32 && a.head_dim.is_multiple_of(16) =>
            {
                Some(Rounding::F16)
            }
            _ => None,
        }
    }

    /// What the PTX interpreter makes of it, with every check: its outputs, and what each of its launches did. `module` compiles
    /// a kernel.
    pub(crate) fn interpreted(
        &self,
        module: &mut dyn FnMut(&CudaPrograms, &str) -> (Module, EntryBlocks),
    ) -> (Vec<Vec<u8>>, Vec<Stats>) {
        let programs = self.on_gpu();
        let step = StepSize { tokens: self.tokens(), rows: self.tokens(), spans: 1 };
        let mut memory = Memory::new();
        let mut buffers: BTreeMap<u64, Buffer> = BTreeMap::new();
        for (slot, arg) in self.args.iter().enumerate() {
            let buffer = match arg {
                Arg::Number(_) => continue,
                Arg::Input(bytes) | Arg::Output(bytes, _) => memory.alloc(&format!("argument {slot}"), bytes),
            };
            if matches!(arg, Arg::Input(_)) {
                memory.set_read_only(buffer);
            }
            buffers.insert(slot as u64 * SLOT, buffer);
        }
        let mut stats = Vec::new();
        for launch in &programs.programs[0].launches {
            let params: Vec<Param> = launch
                .args
                .iter()
                .map(|arg| match arg {
                    SlotArg::Imm(n) => Param::from(*n),
                    SlotArg::Arena { offset, len } => {
                        let at = offset.at(step).expect("small");
                        let len = len.at(step).expect("small") as usize;
                        let buffer =
                            buffers.entry(at).or_insert_with(|| memory.alloc_uninit("between launches", len));
                        Param::from(*buffer)
                    }
                    other => panic!("{other:?} is no argument of a case"),
                })
                .collect();
            let blocks = launch.blocks.expect("every launch of a GPU has blocks");
            let grid = [blocks.x, blocks.y].map(|tiles| tiles.at(step).expect("small") as u32);
            let (kernel, own) = module(&programs, &launch.kernel);
            let grid = own.grid(grid);
            let launched = attar_ptx::Launch {
                kernel: &launch.kernel,
                grid: [grid[0], grid[1], 1],
                block: [blocks.threads, 1, 1],
                dynamic_shared: own.shared_bytes as usize,
                params: &params,
            };
            let both = kernel.launch_both(&mut memory, &launched).unwrap_or_else(|e| panic!("{e}"));
            assert!(both.differing.is_empty(), "{}: {:?} depend on the order", launch.kernel, both.differing);
            stats.push(both.stats);
        }
        let outputs = self.args.iter().enumerate().filter(|(_, a)| matches!(a, Arg::Output(..)));
        (outputs.map(|(slot, _)| memory.bytes(buffers[&(slot as u64 * SLOT)]).to_vec()).collect(), stats)
    }
}
