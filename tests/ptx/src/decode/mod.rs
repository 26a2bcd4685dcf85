//! From statements to dense code: names are resolved, types chosen, device functions inlined.
//!
//! An instruction is decoded by the file of its family. To add one, write its decoding there, name its root in
//! [`Decoder::op`], and execute its [`Op`] in `crate::machine`.

mod alu;
mod async_copy;
mod collective;
mod control;
mod matrix;
mod memory_access;
mod modifiers;
mod operands;

use crate::code::{Code, Inst, Op, ParamSlot};
use crate::error::{Error, ErrorKind, Result};
use crate::shared::{Named, SHARED_BASE};
use crate::syntax::{Function, Instruction, Operand, StateSpace, Statement, Text, Variable};
use crate::types::Type;
pub(crate) use control::CLUSTER;
use modifiers::Modifiers;
use std::collections::BTreeMap;

/// What one instruction decodes to, or why it does not.
pub(crate) type Decoded<T> = std::result::Result<T, ErrorKind>;

/// Instructions a kernel may have after inlining.
const MAX_INSTS: usize = 1 << 22;

/// Registers a kernel may have after inlining.
const MAX_REGISTERS: usize = 1 << 17;
/// Bytes of local memory of a thread, as on devices.
const MAX_LOCAL: usize = 512 << 10;
/// Deepest calls.
const MAX_CALLS: usize = 64;

/// What a name stands for.
#[derive(Debug, Clone, Copy)]
enum Binding {
    Reg(u32),
    Pred(u32),
    /// Address in shared memory.
    Shared(u64),
    DynamicShared,
    /// Offset in the local memory of a thread: a variable.
    Local(u64),
    /// Offset there of a parameter of a device function.
    CallParam(u64),
    /// Offset in the parameters of the kernel.
    Param(u64),
    /// Index of a variable of the module.
    Variable(u32),
    Label(u32),
}

type Scope = BTreeMap<String, Binding>;

/// Variables of the module that have storage in device memory, by name.
pub(crate) type VariableIndex = BTreeMap<String, u32>;

pub(crate) struct Decoder<'a> {
    text: &'a Text,
    code: Code,
    scopes: Vec<Scope>,
    register_bits: Vec<u32>,
    /// Positions of labels, by their number.
    labels: Vec<Option<u32>>,
    /// Names of labels, for errors.
    label_names: Vec<String>,
    /// Targets of indexed branches, by the label before `.branchtargets`.
    branch_tables: BTreeMap<u32, Vec<u32>>,
    /// Functions being inlined, and where the innermost returns to.
    calls: Vec<&'a str>,
    return_to: Option<u32>,
    /// Shared variables of functions: every instance of a function has the same.
    function_shared: BTreeMap<(String, String), u64>,
    spellings: BTreeMap<String, u32>,
    line: u32,
}

/// Decodes a kernel.
///
/// # Errors
/// What the interpreter does not know, with its line.
pub(crate) fn kernel(text: &Text, entry: &Function, variables: &VariableIndex) -> Result<Code> {
    let mut decoder = Decoder {
        text,
        code: Code {
            name: entry.name.clone(),
            insts: Vec::new(),
            registers: Vec::new(),
            predicates: Vec::new(),
            params: Vec::new(),
            param_bytes: 0,
            local_bytes: 0,
            shared: Vec::new(),
            shared_bytes: 0,
            dynamic_align: None,
            spellings: Vec::new(),
            max_threads: entry.max_threads,
            required_block: entry.required_block,
        },
        scopes: vec![Scope::new()],
        register_bits: Vec::new(),
        labels: Vec::new(),
        label_names: Vec::new(),
        branch_tables: BTreeMap::new(),
        calls: Vec::new(),
        return_to: None,
        function_shared: BTreeMap::new(),
        spellings: BTreeMap::new(),
        line: entry.line,
    };
    decoder.entry(entry, variables).map_err(|kind| {
        let mut error = Error::at_line(kind, decoder.line);
        error.at.kernel = Some(entry.name.clone());
        error
    })?;
    Ok(decoder.code)
}

impl<'a> Decoder<'a> {
    fn entry(&mut self, entry: &'a Function, variables: &VariableIndex) -> Decoded<()> {
        for (name, index) in variables {
            self.bind(name, Binding::Variable(*index));
        }
        let shared = self.text.variables.iter().filter(|v| v.space == StateSpace::Shared);
        for variable in shared {
            let binding = self.place_shared(variable);
            self.bind(&variable.name, binding);
        }
        let mut offset = 0usize;
        for param in &entry.params {
            offset = offset.next_multiple_of(param.align);
            self.bind(&param.name, Binding::Param(offset as u64));
            self.code.params.push(ParamSlot { name: param.name.clone(), offset, bytes: param.bytes });
            offset += param.bytes;
        }
        self.code.param_bytes = offset;
        self.body(entry)?;
        self.emit(None, Op::Exit, "exit");
        self.resolve_labels()
    }

    /// The statements of a function, in a scope of their own.
    fn body(&mut self, function: &'a Function) -> Decoded<()> {
        let Some(body) = &function.body else {
            return Err(ErrorKind::Unsupported(format!("call of {}, which has no body here", function.name)));
        };
        if self.calls.contains(&function.name.as_str()) {
            return Err(ErrorKind::Unsupported(format!("recursion of {}", function.name)));
        }
        if self.calls.len() >= MAX_CALLS {
            return Err(ErrorKind::Unsupported("calls so deep".to_owned()));
        }
        self.calls.push(&function.name);
        self.open(body);
        for (at, statement) in body.iter().enumerate() {
            self.statement(statement, &body[at + 1..])?;
        }
        self.scopes.pop();
        self.calls.pop();
        Ok(())
    }

    /// A new scope with the labels that `rest` defines in it, so that branches may go forward.
    fn open(&mut self, rest: &[Statement]) {
        self.scopes.push(Scope::new());
        let mut depth = 0;
        for statement in rest {
            match statement {
                Statement::Open => depth += 1,
                Statement::Close if depth == 0 => break,
                Statement::Close => depth -= 1,
                Statement::Label(name) if depth == 0 => {
                    let label = self.new_label(name);
                    self.bind(name, Binding::Label(label));
                }
                _ => {}
            }
        }
    }

    fn new_label(&mut self, name: &str) -> u32 {
        self.labels.push(None);
        self.label_names.push(name.to_owned());
        self.labels.len() as u32 - 1
    }

    fn place_label(&mut self, label: u32) {
        self.labels[label as usize] = Some(self.code.insts.len() as u32);
    }

    fn bind(&mut self, name: &str, binding: Binding) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), binding);
        }
    }

    fn lookup(&self, name: &str) -> Option<Binding> {
        self.scopes.iter().rev().find_map(|s| s.get(name)).copied()
    }

    fn statement(&mut self, statement: &'a Statement, rest: &[Statement]) -> Decoded<()> {
        match statement {
            Statement::Open => self.open(rest),
            Statement::Close => {
                self.scopes.pop();
            }
            Statement::Label(name) => {
                let Some(Binding::Label(label)) = self.lookup(name) else {
                    return Err(ErrorKind::Undeclared(name.clone()));
                };
                self.place_label(label);
            }
            Statement::BranchTargets(names) => {
                let targets = names.iter().map(|n| self.label(n)).collect::<Decoded<Vec<_>>>()?;
                // The label of the table stands right before it.
                let table = self.labels.iter().rposition(|l| *l == Some(self.code.insts.len() as u32));
                if let Some(table) = table {
                    self.branch_tables.insert(table as u32, targets);
                }
            }
            Statement::Registers { element, name, count, line } => {
                self.line = *line;
                match count {
                    None => self.register(*element, name)?,
                    Some(count) => {
                        for i in 0..*count {
                            self.register(*element, &format!("{name}{i}"))?;
                        }
                    }
                }
            }
            Statement::Variable(variable) => {
                self.line = variable.line;
                let binding = self.place(variable)?;
                self.bind(&variable.name, binding);
            }
            Statement::Instruction(inst) => {
                self.line = inst.line;
                self.instruction(inst)?;
            }
        }
        Ok(())
    }

    fn register(&mut self, element: Type, name: &str) -> Decoded<()> {
        if self.register_bits.len() + self.code.predicates.len() >= MAX_REGISTERS {
            return Err(ErrorKind::Unsupported("so many registers".to_owned()));
        }
        let binding = match element {
            Type::Pred => {
                self.code.predicates.push(name.to_owned());
                Binding::Pred(self.code.predicates.len() as u32 - 1)
            }
            Type::B128 => return Err(ErrorKind::Unsupported("registers of 128 bits".to_owned())),
            _ => {
                self.code.registers.push(name.to_owned());
                self.register_bits.push(element.bits());
                Binding::Reg(self.code.registers.len() as u32 - 1)
            }
        };
        self.bind(name, binding);
        Ok(())
    }

    fn place(&mut self, variable: &Variable) -> Decoded<Binding> {
        Ok(match variable.space {
            StateSpace::Shared => {
                let function = self.calls.last().copied().unwrap_or_default().to_owned();
                let key = (function, variable.name.clone());
                if !variable.external
                    && let Some(address) = self.function_shared.get(&key)
                {
                    return Ok(Binding::Shared(*address));
                }
                let binding = self.place_shared(variable);
                if let Binding::Shared(address) = binding {
                    self.function_shared.insert(key, address);
                }
                binding
            }
            StateSpace::Local => Binding::Local(self.place_local(variable)?),
            StateSpace::Param => Binding::CallParam(self.place_local(variable)?),
            StateSpace::Global | StateSpace::Const | StateSpace::Reg => {
                return Err(ErrorKind::Unsupported(format!("variable {} in a function", variable.name)));
            }
        })
    }

    fn place_shared(&mut self, variable: &Variable) -> Binding {
        if variable.external {
            let align = self.code.dynamic_align.unwrap_or(16).max(variable.align);
            self.code.dynamic_align = Some(align);
            return Binding::DynamicShared;
        }
        let offset = self.code.shared_bytes.next_multiple_of(variable.align);
        self.code.shared.push(Named { name: variable.name.clone(), offset, bytes: variable.bytes });
        self.code.shared_bytes = offset + variable.bytes;
        Binding::Shared(SHARED_BASE + offset as u64)
    }

    fn place_local(&mut self, variable: &Variable) -> Decoded<u64> {
        let offset = self.code.local_bytes.next_multiple_of(variable.align);
        self.code.local_bytes = offset + variable.bytes;
        if self.code.local_bytes > MAX_LOCAL {
            return Err(ErrorKind::Unsupported(format!("more than {MAX_LOCAL} bytes of local memory")));
        }
        Ok(offset as u64)
    }

    fn emit(&mut self, guard: Option<(u32, bool)>, op: Op, spelling: &str) {
        let next = self.spellings.len() as u32;
        let spelling = *self.spellings.entry(spelling.to_owned()).or_insert_with_key(|s| {
            self.code.spellings.push(s.clone());
            next
        });
        self.code.insts.push(Inst { guard, op, line: self.line, spelling });
    }

    fn instruction(&mut self, inst: &'a Instruction) -> Decoded<()> {
        if self.code.insts.len() >= MAX_INSTS {
            return Err(ErrorKind::Unsupported("so many instructions".to_owned()));
        }
        let spelling = inst.opcode.join(".");
        let guard = match &inst.guard {
            None => None,
            Some(guard) => match self.lookup(&guard.register) {
                Some(Binding::Pred(index)) => Some((index, guard.negated)),
                _ => return Err(ErrorKind::Undeclared(format!("predicate {}", guard.register))),
            },
        };
        if inst.opcode[0] == "call" {
            return self.call(inst, guard, &spelling);
        }
        let mut modifiers = Modifiers::of(&inst.opcode);
        let op = self.op(&inst.opcode[0], &mut modifiers, &inst.operands)?;
        modifiers.finish()?;
        self.emit(guard, op, &spelling);
        Ok(())
    }

    fn op(&mut self, root: &str, m: &mut Modifiers<'_>, operands: &[Operand]) -> Decoded<Op> {
        match root {
            "ld" | "ldu" | "st" | "atom" | "red" | "cvta" | "isspacep" | "prefetch" | "prefetchu"
            | "fence" | "membar" | "discard" | "createpolicy" | "mapa" => self.memory_op(root, m, operands),
            "bra" | "brx" | "ret" | "exit" | "trap" | "brkpt" | "bar" | "barrier" | "nanosleep"
            | "griddepcontrol" | "setmaxnreg" | "pmevent" => self.control_op(root, m, operands),
            "vote" | "match" | "shfl" | "redux" | "activemask" | "elect" => {
                self.collective_op(root, m, operands)
            }
            "ldmatrix" | "stmatrix" | "movmatrix" | "mma" | "wgmma" => self.matrix_op(root, m, operands),
            "cp" => self.copy_op(m, operands),
            "mbarrier" => self.mbarrier_op(m, operands),
            _ => self.alu_op(root, m, operands),
        }
    }

    /// Labels are numbers until all are placed.
    fn resolve_labels(&mut self) -> Decoded<()> {
        let (labels, names) = (&self.labels, &self.label_names);
        let position = |label: u32| {
            labels[label as usize]
                .ok_or_else(|| ErrorKind::Undeclared(format!("label {}", names[label as usize])))
        };
        for inst in &mut self.code.insts {
            self.line = inst.line;
            match &mut inst.op {
                Op::Branch { target } => *target = position(*target)?,
                Op::BranchIndexed { targets, .. } => {
                    for target in targets {
                        *target = position(*target)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn label(&self, name: &str) -> Decoded<u32> {
        match self.lookup(name) {
            Some(Binding::Label(label)) => Ok(label),
            _ => Err(ErrorKind::Undeclared(format!("label {name}"))),
        }
    }
}
