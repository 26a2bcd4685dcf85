//! Code images: kernels compiled for one target, laid end to end in a flat position-independent blob.
//!
//! Every function is self-contained (its constants stand beside its code, it calls nothing), so the image needs no
//! relocation: copied anywhere and made executable, it runs.

use crate::Target;
use crate::emit;
use crate::error::{Error, ErrorKind};
use crate::isa::target_isa;
use crate::lanes::Lanes;
use attar_artifact::program::Entry;
use attar_kernel::KernelSpec;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{AbiParam, Function, Signature, UserFuncName};
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
            let (context, code) = compile(&*isa, target, spec, false)?;
            drop(context);
            Ok((name, code))
        })
        .collect::<Result<_, Error>>()?;
    let mut bytes = Vec::new();
    let mut entries = Vec::with_capacity(compiled.len());
    for (kernel, code) in compiled {
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        entries.push(Entry { kernel, offset: bytes.len() as u64, len: code.len() as u64 });
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
    let (mut context, _) = compile(&*isa, target, spec, true)?;
    Ok(context.take_compiled_code().and_then(|c| c.vcode).unwrap_or_default())
}

/// Cranelift IR text of one kernel, before compilation.
///
/// # Errors
/// [`ErrorKind::Spec`] for a spec no kernel provides.
pub fn cranelift_ir(target: Target, spec: &KernelSpec) -> Result<String, Error> {
    let isa = target_isa(target)?;
    let function = build(&*isa, target, |cx| emit::emit(spec, cx)).map_err(|kind| Error {
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
    let function = function.map_err(|kind| Error { kind, kernel: "body".to_owned(), target })?;
    let (_, bytes) = compile_function(&*isa, function, false).map_err(|kind| Error {
        kind,
        kernel: "body".to_owned(),
        target,
    })?;
    let entry = Entry { kernel: "body".to_owned(), offset: 0, len: bytes.len() as u64 };
    Ok(CodeBlob { target, bytes, entries: vec![entry], features: target.features() })
}

fn compile(
    isa: &dyn TargetIsa,
    target: Target,
    spec: &KernelSpec,
    disasm: bool,
) -> Result<(Context, Vec<u8>), Error> {
    build(isa, target, |cx| emit::emit(spec, cx))
        .and_then(|function| compile_function(isa, function, disasm))
        .map_err(|kind| Error { kind, kernel: spec.name(), target })
}

fn compile_function(
    isa: &dyn TargetIsa,
    function: Function,
    disasm: bool,
) -> Result<(Context, Vec<u8>), ErrorKind> {
    let mut context = Context::for_function(function);
    context.set_disasm(disasm);
    let code =
        context.compile(isa, &mut ControlPlane::default()).map_err(|e| ErrorKind::Compile(explain(e)))?;
    let count = code.buffer.relocs().len();
    if count > 0 {
        return Err(ErrorKind::Relocation { count });
    }
    let bytes = code.buffer.data().to_vec();
    Ok((context, bytes))
}

fn explain(error: CompileError<'_>) -> String {
    cranelift_codegen::print_errors::pretty_error(error.func, error.inner)
}

fn build(
    isa: &dyn TargetIsa,
    target: Target,
    body: impl FnOnce(&mut Lanes<'_>) -> Result<(), String>,
) -> Result<Function, ErrorKind> {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params.extend([AbiParam::new(I64); 3]);
    let mut function = Function::with_name_signature(UserFuncName::default(), signature);
    let mut frontend = FunctionBuilderContext::new();
    let mut lanes = Lanes::new(FunctionBuilder::new(&mut function, &mut frontend), target);
    body(&mut lanes).map_err(ErrorKind::Spec)?;
    lanes.finish(isa.frontend_config());
    Ok(function)
}
