//! Code images: kernels compiled for one target, laid end to end in a flat position-independent blob.
//!
//! Every function is self-contained: its constants stand beside its code, and it calls nothing but the hand-assembled
//! inner functions laid right behind it, by relative calls that are resolved here. So the image needs no relocation:
//! copied anywhere and made executable, it runs.

use crate::Target;
use crate::emit;
use crate::error::{Error, ErrorKind};
use crate::isa::target_isa;
use crate::lanes::Lanes;
use crate::target::Arch;
use attar_artifact::program::{Entry, EntryBlocks};
use attar_kernel::KernelSpec;
use cranelift_codegen::FinalizedRelocTarget;
use cranelift_codegen::binemit::Reloc;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{AbiParam, ExternalName, Function, Signature, UserFuncName};
use cranelift_codegen::isa::{CallConv, TargetIsa};
use cranelift_codegen::{CompileError, Context};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Functions start on cache lines.
const ALIGN: usize = 64;

/// The code section of one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeBlob {
    pub target: Target,
    /// Position-independent code; to be mapped at an address that is a multiple of 64.
    pub bytes: Vec<u8>,
    /// One per kernel, in order of name.
    pub entries: Vec<Entry>,
    /// CPU features the code needs, as [`Target::features`].
    pub features: &'static [&'static str],
}

impl CodeBlob {
    /// The entry of a kernel.
    pub fn entry(&self, kernel: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.kernel == kernel)
    }
}

/// Compiles kernels for a target. Equal specs are compiled once; the bytes depend only on the set of specs.
///
/// # Errors
/// [`ErrorKind::Spec`] for a spec no kernel provides; the other kinds are bugs.
pub fn compile_blob(target: Target, specs: &[KernelSpec]) -> Result<CodeBlob, Error> {
    let isa = target_isa(target)?;
    let unique: BTreeMap<String, &KernelSpec> = specs.iter().map(|s| (s.name(), s)).collect();
    let compiled: Vec<(String, Vec<u8>)> = unique
        .into_par_iter()
        .map(|(name, spec)| {
            let compiled = compile(&*isa, target, spec, false)?;
            Ok((name, compiled.code))
        })
        .collect::<Result<_, Error>>()?;
    let mut bytes = Vec::new();
    let mut entries = Vec::with_capacity(compiled.len());
    for (kernel, code) in compiled {
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        entries.push(Entry {
            kernel,
            offset: bytes.len() as u64,
            len: code.len() as u64,
            blocks: EntryBlocks::PLAIN,
        });
        bytes.extend_from_slice(&code);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    Ok(CodeBlob { target, bytes, entries, features: target.features() })
}

/// Assembly text of one kernel, as the code generator prints it.
///
/// # Errors
/// As [`compile_blob`].
pub fn disassemble(target: Target, spec: &KernelSpec) -> Result<String, Error> {
    let isa = target_isa(target)?;
    let compiled = compile(&*isa, target, spec, true)?;
    let inner: String = compiled.inner.iter().map(|code| disassemble_inner(target, code)).collect();
    Ok(compiled.text + &inner)
}

/// Text of the inner functions of one kernel alone: what was assembled by hand.
///
/// # Errors
/// As [`compile_blob`].
pub fn disassemble_inners(target: Target, spec: &KernelSpec) -> Result<Vec<String>, Error> {
    let isa = target_isa(target)?;
    let compiled = compile(&*isa, target, spec, false)?;
    Ok(compiled.inner.iter().map(|code| disassemble_inner(target, code)).collect())
}

fn disassemble_inner(target: Target, code: &[u8]) -> String {
    match target.arch() {
        Arch::X86_64 => crate::x86::disassemble(code),
        Arch::Aarch64 => crate::aarch64::disassemble(code),
        Arch::Riscv64 => unreachable!("kernels for targets without vectors have no inner functions"),
    }
}

/// Cranelift IR text of one kernel, before compilation.
///
/// # Errors
/// [`ErrorKind::Spec`] for a spec no kernel provides.
pub fn cranelift_ir(target: Target, spec: &KernelSpec) -> Result<String, Error> {
    let isa = target_isa(target)?;
    let (function, _) = build(&*isa, target, |cx| emit::emit(spec, cx)).map_err(|kind| Error {
        kind,
        kernel: spec.name(),
        target,
    })?;
    Ok(function.display().to_string())
}

/// A blob of one kernel named `body` whose body is given here: for tests of the emitter itself.
#[cfg(test)]
pub(crate) fn compile_body(target: Target, body: impl FnOnce(&mut Lanes<'_>)) -> Result<CodeBlob, Error> {
    let isa = target_isa(target)?;
    let function = build(&*isa, target, |cx| {
        body(cx);
        Ok(())
    });
    let compiled = function.and_then(|(f, inner)| compile_function(&*isa, target, f, inner, false));
    let compiled = compiled.map_err(|kind| Error { kind, kernel: "body".to_owned(), target })?;
    let bytes = compiled.code;
    let entry =
        Entry { kernel: "body".to_owned(), offset: 0, len: bytes.len() as u64, blocks: EntryBlocks::PLAIN };
    Ok(CodeBlob { target, bytes, entries: vec![entry], features: target.features() })
}

/// One kernel in machine code.
struct Compiled {
    /// The function, then its inner functions.
    code: Vec<u8>,
    inner: Vec<Vec<u8>>,
    /// Assembly text of the function, when asked for.
    text: String,
}

fn compile(isa: &dyn TargetIsa, target: Target, spec: &KernelSpec, disasm: bool) -> Result<Compiled, Error> {
    build(isa, target, |cx| emit::emit(spec, cx))
        .and_then(|(function, inner)| compile_function(isa, target, function, inner, disasm))
        .map_err(|kind| Error { kind, kernel: spec.name(), target })
}

fn compile_function(
    isa: &dyn TargetIsa,
    target: Target,
    function: Function,
    inner: Vec<Vec<u8>>,
    disasm: bool,
) -> Result<Compiled, ErrorKind> {
    let mut context = Context::for_function(function);
    context.set_disasm(disasm);
    context.compile(isa, &mut ControlPlane::default()).map_err(|e| ErrorKind::Compile(explain(e)))?;
    let compiled = context.take_compiled_code();
    let Some(compiled) = compiled else { return Err(ErrorKind::Compile("no code was made".to_owned())) };
    let mut code = compiled.buffer.data().to_vec();
    let mut starts = Vec::new();
    for function in &inner {
        code.resize(code.len().next_multiple_of(ALIGN), 0);
        starts.push(code.len());
        code.extend_from_slice(function);
    }
    for reloc in compiled.buffer.relocs() {
        let callee = match &reloc.target {
            FinalizedRelocTarget::ExternalName(ExternalName::User(name)) => {
                let name = &context.func.params.user_named_funcs()[*name];
                starts.get(name.index as usize).copied()
            }
            _ => None,
        };
        let resolved = callee.and_then(|callee| {
            let distance = callee as i64 + reloc.addend - i64::from(reloc.offset);
            resolve_call(target, reloc.kind, distance, code.get_mut(reloc.offset as usize..)?)
        });
        if resolved.is_none() {
            return Err(ErrorKind::Relocation { kind: format!("{:?}", reloc.kind) });
        }
    }
    Ok(Compiled { code, inner, text: compiled.vcode.unwrap_or_default() })
}

/// Writes the distance of a call to an inner function into the instruction at `site`. `None` for any other
/// relocation.
fn resolve_call(target: Target, kind: Reloc, distance: i64, site: &mut [u8]) -> Option<()> {
    let word = site.first_chunk_mut::<4>()?;
    match (target.arch(), kind) {
        (Arch::X86_64, Reloc::X86CallPCRel4) => *word = i32::try_from(distance).ok()?.to_le_bytes(),
        (Arch::Aarch64, Reloc::Arm64Call) => {
            let words = i32::try_from(distance / 4).ok().filter(|w| (-(1 << 25)..1 << 25).contains(w))?;
            let branch = u32::from_le_bytes(*word) & 0xfc00_0000 | words as u32 & 0x03ff_ffff;
            *word = branch.to_le_bytes();
        }
        _ => return None,
    }
    Some(())
}

fn explain(error: CompileError<'_>) -> String {
    cranelift_codegen::print_errors::pretty_error(error.func, error.inner)
}

fn build(
    isa: &dyn TargetIsa,
    target: Target,
    body: impl FnOnce(&mut Lanes<'_>) -> Result<(), String>,
) -> Result<(Function, Vec<Vec<u8>>), ErrorKind> {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params.extend([AbiParam::new(I64); 3]);
    let mut function = Function::with_name_signature(UserFuncName::default(), signature);
    let mut frontend = FunctionBuilderContext::new();
    let mut lanes = Lanes::new(FunctionBuilder::new(&mut function, &mut frontend), target);
    body(&mut lanes).map_err(ErrorKind::Spec)?;
    let inner = lanes.finish(isa.frontend_config());
    Ok((function, inner))
}
