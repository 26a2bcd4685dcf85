//! A model for tests whose kernels are part of the test program: the next token is a hash of all tokens so far and
//! their positions, read back from the paged KV cache.

use crate::device::cpu::Code;
use crate::device::executable::Kernel;
use crate::memory::Region;
use crate::model::{Model, OpenTimings, Parts, WeightMemory};
use crate::text::Tokenizer;
use attar_artifact::manifest::{KvSpec, KvType, Manifest, RopeTable};
use attar_artifact::program::{Arg, Extent, Launch, Program, ProgramKind, StepBuffer};
use std::ptr::{with_exposed_provenance as at, with_exposed_provenance_mut as at_mut};

pub(crate) const PAGE_LEN: usize = 4;
pub(crate) const VOCAB: usize = 256;
pub(crate) const LONGEST: usize = 200;
pub(crate) const MOST_TOKENS: usize = 24;

/// What the toy model says after `tokens`.
pub(crate) fn next(tokens: &[u32]) -> u32 {
    let sum: u64 = tokens.iter().zip(1u64..).map(|(t, p)| p * (u64::from(*t) + 7)).sum();
    3 + (sum % (VOCAB as u64 - 3)) as u32
}

/// tokens, arena: `arena[t] = tokens[t]` as f32.
unsafe extern "C" fn embed(args: *const u64, begin: u64, end: u64) {
    // SAFETY: the engine passes buffers as the program below describes them.
    unsafe {
        let (tokens, out) = (at::<i32>(*args as usize), at_mut::<f32>(*args.add(1) as usize));
        for t in begin as usize..end as usize {
            *out.add(t) = *tokens.add(t) as f32;
        }
    }
}

/// arena, positions, seqs, tables, stride, keys, rope: stores each value at its position, if the rotary row is right.
unsafe extern "C" fn store(args: *const u64, begin: u64, end: u64) {
    // SAFETY: as above.
    unsafe {
        let (x, positions) = (at::<f32>(*args as usize), at::<i32>(*args.add(1) as usize));
        let (seqs, tables) = (at::<i32>(*args.add(2) as usize), at::<u32>(*args.add(3) as usize));
        let (stride, keys) = (*args.add(4) as usize, at_mut::<f32>(*args.add(5) as usize));
        let rope = at::<f32>(*args.add(6) as usize);
        for t in begin as usize..end as usize {
            let p = *positions.add(t) as usize;
            let page = *tables.add(*seqs.add(t) as usize * stride + p / PAGE_LEN) as usize;
            let angle = p as f64 * 0.5;
            let good = *rope.add(2 * t) == (2.0 * angle.cos()) as f32
                && *rope.add(2 * t + 1) == (2.0 * angle.sin()) as f32;
            *keys.add((page * PAGE_LEN + p % PAGE_LEN) * 2) = if good { *x.add(t) } else { f32::NAN };
        }
    }
}

/// rows, positions, seqs, tables, stride, keys, logits, V: the hash of everything up to each row's position.
unsafe extern "C" fn recall(args: *const u64, begin: u64, end: u64) {
    // SAFETY: as above.
    unsafe {
        let (rows, positions) = (at::<i32>(*args as usize), at::<i32>(*args.add(1) as usize));
        let (seqs, tables) = (at::<i32>(*args.add(2) as usize), at::<u32>(*args.add(3) as usize));
        let (stride, keys) = (*args.add(4) as usize, at::<f32>(*args.add(5) as usize));
        let (logits, vocab) = (at_mut::<f32>(*args.add(6) as usize), *args.add(7) as usize);
        for r in begin as usize..end as usize {
            let t = *rows.add(r) as usize;
            let table = tables.add(*seqs.add(t) as usize * stride);
            let mut sum = 0u64;
            for p in 0..=*positions.add(t) as usize {
                let page = *table.add(p / PAGE_LEN) as usize;
                let value = *keys.add((page * PAGE_LEN + p % PAGE_LEN) * 2);
                sum += (p as u64 + 1) * (value as u64 + 7);
            }
            for v in 0..vocab {
                *logits.add(r * vocab + v) = -(v as f32) / 100.0;
            }
            *logits.add(r * vocab + 3 + (sum % (vocab as u64 - 3)) as usize) = 9.0;
        }
    }
}

pub(crate) fn model(threads: usize) -> Model {
    use StepBuffer::{BlockTables, Logits, Positions, Rope, Rows, Seqs, Tokens};
    let step = Arg::Step;
    let arena = Arg::Arena { offset: Extent::fixed(64), len: Extent::per_token(4) };
    let launch = |kernel: &str, args, grid| {
        let kernel = kernel.to_owned();
        Launch { kernel, args, grid, weight_bytes: 0, note: String::new(), tail: false, blocks: None }
    };
    let (stride, keys) = (Arg::BlockTableStride, Arg::Keys { layer: 1 });
    let launches = vec![
        launch("embed", vec![step(Tokens), arena], Extent::per_token(1)),
        launch(
            "store",
            vec![
                arena,
                step(Positions),
                step(Seqs),
                step(BlockTables),
                stride,
                keys,
                step(Rope { table: 0 }),
            ],
            Extent::per_token(1),
        ),
        launch(
            "recall",
            vec![
                step(Rows),
                step(Positions),
                step(Seqs),
                step(BlockTables),
                stride,
                keys,
                step(Logits),
                Arg::Imm(VOCAB as u64),
            ],
            Extent::per_row(1),
        ),
    ];
    let arena = Extent { base: 64, ..Extent::per_token(4) };
    let program = |kind, max_tokens| Program { kind, max_tokens, arena, launches: launches.clone() };
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/tiny/smollm2/tokenizer.json");
    Model::assemble(Parts {
        manifest: Manifest {
            generator: String::new(),
            model: attar_artifact::manifest::Model {
                name: "toy".to_owned(),
                architecture: "toy".to_owned(),
                layers: 2,
                hidden: 1,
                heads: 1,
                kv_heads: 1,
                head_dim: 2,
                vocab: VOCAB as u32,
                context_length: LONGEST as u32,
                parameters: 0,
                rope: vec![RopeTable { inv_freq: vec![0.5], mscale: 2.0 }],
                kv: KvSpec { dtype: KvType::F32, page_len: PAGE_LEN as u32, span: PAGE_LEN as u32 },
                eos: Vec::new(),
                bos: None,
            },
            sections: Vec::new(),
            tensors: Vec::new(),
            formats: Vec::new(),
            uncertified: None,
            requires: Vec::new(),
        },
        programs: vec![
            program(ProgramKind::Decode, 1),
            program(ProgramKind::SmallBatch, 16),
            program(ProgramKind::Prefill, MOST_TOKENS as u32),
        ],
        weights: WeightMemory::Copied(Region::zeroed(0, "the weights", "").unwrap().into()),
        code: Some(Code::of(&[
            ("embed", Kernel::of(embed)),
            ("store", Kernel::of(store)),
            ("recall", Kernel::of(recall)),
        ])),
        device: None,
        tokenizer: Some(Tokenizer::from_json(&std::fs::read_to_string(path).unwrap()).unwrap()),
        template: None,
        threads,
        opening: OpenTimings::default(),
        started: std::time::Instant::now(),
        prefetch: None,
    })
    .unwrap()
}
