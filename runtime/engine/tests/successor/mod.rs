//! An artifact whose model says the last token plus one. Its kernel is a few instructions of x86-64.

#![allow(unreachable_pub, reason = "shared by test programs")]

use attar_artifact::Writer;
use attar_artifact::certificate::Certificate;
use attar_artifact::manifest::{KvSpec, KvType, Model, SectionKind};
use attar_artifact::program::{Arg, Entry, EntryBlocks, Extent, Launch, Program, ProgramKind, StepBuffer};
use std::path::Path;

pub const VOCAB: u32 = 256;

/// Args: tokens, rows, logits, V. Grid R.
///
/// ```text
///     mov r8, [rdi]; mov r9, [rdi+8]; mov r10, [rdi+16]; mov r11, [rdi+24]
/// row: cmp rsi, rdx; jae end
///     mov rcx, rsi; imul rcx, r11; lea rcx, [r10+rcx*4]; xor eax, eax
/// clear: mov dword ptr [rcx+rax*4], 0; inc rax; cmp rax, r11; jb clear
///     movsxd rax, dword ptr [r9+rsi*4]; mov eax, [r8+rax*4]; inc rax; cmp rax, r11; jb store; xor eax, eax
/// store: mov dword ptr [rcx+rax*4], 10.0; inc rsi; jmp row
/// end: ret
/// ```
pub const X86: &[u8] = &[
    0x4c, 0x8b, 0x07, 0x4c, 0x8b, 0x4f, 0x08, 0x4c, 0x8b, 0x57, 0x10, 0x4c, 0x8b, 0x5f, 0x18, // loads
    0x48, 0x39, 0xd6, 0x73, 0x3a, // row
    0x48, 0x89, 0xf1, 0x49, 0x0f, 0xaf, 0xcb, 0x49, 0x8d, 0x0c, 0x8a, 0x31, 0xc0, // address
    0xc7, 0x04, 0x81, 0x00, 0x00, 0x00, 0x00, 0x48, 0xff, 0xc0, 0x4c, 0x39, 0xd8, 0x72, 0xf1, // clear
    0x49, 0x63, 0x04, 0xb1, 0x41, 0x8b, 0x04, 0x80, 0x48, 0xff, 0xc0, 0x4c, 0x39, 0xd8, 0x72, 0x02, 0x31,
    0xc0, // token
    0xc7, 0x04, 0x81, 0x00, 0x00, 0x20, 0x41, 0x48, 0xff, 0xc6, 0xeb, 0xc1, // store
    0xc3, // end
];

type CodeSection<'a> = (&'a str, &'a [&'a str], &'a [u8]);

pub fn write(path: &Path, code: &[CodeSection<'_>]) {
    write_with(path, code, &1234.5f64.to_le_bytes());
}

/// With these bytes, a multiple of four, as weights that nothing reads.
pub fn write_with(path: &Path, code: &[CodeSection<'_>], unused: &[u8]) {
    write_certified(path, code, unused, None);
}

pub fn write_certified(
    path: &Path,
    code: &[CodeSection<'_>],
    unused: &[u8],
    certificate: Option<&Certificate>,
) {
    let mut w = Writer::create(path).unwrap();
    let mut weights = w.weights().unwrap();
    weights.add("unused", "f32", &[unused.len() as u64 / 4], unused).unwrap();
    weights.finish();
    for (target, features, bytes) in code {
        let kind = SectionKind::Code {
            target: (*target).to_owned(),
            features: features.iter().map(|f| (*f).to_owned()).collect(),
            entries: vec![Entry {
                kernel: "successor".to_owned(),
                offset: 0,
                len: bytes.len() as u64,
                blocks: EntryBlocks::PLAIN,
            }],
            prefill_differs: false,
        };
        w.add_section(kind, bytes).unwrap();
    }
    let args = vec![
        Arg::Step(StepBuffer::Tokens),
        Arg::Step(StepBuffer::Rows),
        Arg::Step(StepBuffer::Logits),
        Arg::Imm(VOCAB.into()),
    ];
    let launch = Launch {
        kernel: "successor".to_owned(),
        args,
        grid: Extent::per_row(1),
        weight_bytes: 0,
        tail: false,
        blocks: None,
        note: String::new(),
    };
    let program = |kind, max_tokens| Program {
        kind,
        max_tokens,
        arena: Extent::default(),
        launches: vec![launch.clone()],
    };
    w.add_programs("cpu", &[program(ProgramKind::Decode, 1), program(ProgramKind::Prefill, 64)]).unwrap();
    let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/tiny/smollm2/tokenizer.json");
    w.add_tokenizer(&std::fs::read_to_string(tokenizer).unwrap()).unwrap();
    w.add_section(SectionKind::ChatTemplate, b"{{ bos_token }}{{ messages[0].content }}").unwrap();
    if let Some(certificate) = certificate {
        w.add_certificate(certificate).unwrap();
    }
    let model = Model {
        name: "successor".to_owned(),
        architecture: "none".to_owned(),
        layers: 1,
        hidden: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
        vocab: VOCAB,
        context_length: 4096,
        parameters: 2,
        rope: Vec::new(),
        kv: KvSpec { dtype: KvType::F16, page_len: 32, span: 256 },
        eos: vec![2],
        bos: Some(1),
    };
    w.finish("attar tests", model).unwrap();
}
