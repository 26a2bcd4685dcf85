//! Branches, calls, barriers.

use super::modifiers::Modifiers;
use super::{Binding, Decoded, Decoder, Scope};
use crate::code::{Barrier, BarrierReduce, Op};
use crate::error::ErrorKind;
use crate::syntax::{Instruction, Operand};
use crate::types::Type;

impl<'a> Decoder<'a> {
    pub(super) fn control_op(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        match root {
            "bra" => {
                m.take("uni");
                let [Operand::Name(name)] = o else { return Err(m.unsupported("without a label")) };
                Ok(Op::Branch { target: self.label(name)? })
            }
            "brx" => {
                m.take("uni");
                if !m.take("idx") {
                    return Err(m.unsupported(""));
                }
                let [index, Operand::Name(table)] = o else { return Err(m.unsupported("without a table")) };
                let index = self.src(index, Type::U32)?;
                let table = self.label(table)?;
                let Some(targets) = self.branch_tables.get(&table).cloned() else {
                    return Err(m.unsupported("with a table declared behind it"));
                };
                Ok(Op::BranchIndexed { index, targets })
            }
            "ret" => {
                m.take("uni");
                Ok(self.return_to.map_or(Op::Exit, |target| Op::Branch { target }))
            }
            "exit" => Ok(Op::Exit),
            "trap" | "brkpt" => Ok(Op::Trap),
            // Hints, and limits that only matter to the assembler.
            "nanosleep" => {
                m.take("u32");
                Ok(Op::Nop)
            }
            "griddepcontrol" => {
                if !m.take("wait") && !m.take("launch_dependents") {
                    return Err(m.unsupported(""));
                }
                Ok(Op::Nop)
            }
            "setmaxnreg" => {
                if !m.take("inc") && !m.take("dec") {
                    return Err(m.unsupported(""));
                }
                m.take("sync");
                m.take("aligned");
                m.take("u32");
                Ok(Op::Nop)
            }
            "pmevent" => {
                m.take("mask");
                Ok(Op::Nop)
            }
            _ => self.barrier(root, m, o),
        }
    }

    fn barrier(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        if m.take("warp") {
            m.take("sync");
            let [members] = o else { return Err(m.unsupported("without a member mask")) };
            return Ok(Op::WarpSync { members: self.src(members, Type::B32)? });
        }
        if m.take("cluster") {
            // A cluster holds one block: what its threads do is ordered by the barrier of the block, which both halves
            // together are.
            m.take("aligned");
            m.take_prefix("rel");
            m.take_prefix("acq");
            let waits = m.take("wait");
            if !waits && !m.take("arrive") {
                return Err(m.unsupported(""));
            }
            return if waits {
                let aligned = true;
                Ok(Op::Barrier(Barrier {
                    id: crate::code::Src::Imm(CLUSTER),
                    threads: None,
                    waits,
                    aligned,
                    reduce: None,
                }))
            } else {
                Ok(Op::Nop)
            };
        }
        m.take("cta");
        let aligned = m.take("aligned") || root == "bar";
        let waits = !m.take("arrive");
        let reduce = m.take("red");
        if !waits || reduce {
            // Said already.
        } else if !m.take("sync") {
            return Err(m.unsupported(""));
        }
        let mut rest = o;
        let mut result = None;
        if reduce {
            let [into, others @ ..] = rest else { return Err(m.unsupported("without a result")) };
            result = Some(into);
            rest = others;
        }
        let [id, others @ ..] = rest else { return Err(m.unsupported("without a barrier")) };
        let id = self.src(id, Type::U32)?;
        let mut others = others.to_vec();
        let mut reduction = None;
        if let Some(into) = result {
            let Some(from) = others.pop() else { return Err(m.unsupported("without a predicate")) };
            let from = self.pred_src(&from)?;
            reduction = Some(match m.one_of(&[("popc", 0), ("and", 1), ("or", 2)]) {
                Some(0) => BarrierReduce::Count(self.reg(into)?, from),
                Some(1) => BarrierReduce::And(self.pred(into)?, from),
                Some(_) => BarrierReduce::Or(self.pred(into)?, from),
                None => return Err(m.unsupported("without an operation")),
            });
            m.take("pred");
            m.take("u32");
        }
        let threads = match &others[..] {
            [] => None,
            [threads] => Some(self.src(threads, Type::U32)?),
            _ => return Err(m.unsupported("with so many operands")),
        };
        if !waits && threads.is_none() {
            return Err(m.unsupported("without a number of threads"));
        }
        Ok(Op::Barrier(Barrier { id, threads, waits, aligned, reduce: reduction }))
    }

    /// A call is replaced by the function's instructions. Parameters lie in local memory, where caller and callee
    /// name the same bytes.
    pub(super) fn call(
        &mut self,
        inst: &'a Instruction,
        guard: Option<(u32, bool)>,
        spelling: &str,
    ) -> Decoded<()> {
        let mut m = Modifiers::of(&inst.opcode);
        m.take("uni");
        m.finish()?;
        let (returns, name, params): (&[Operand], &Operand, &[Operand]) = match &inst.operands[..] {
            [name @ Operand::Name(_)] => (&[], name, &[]),
            [name @ Operand::Name(_), Operand::List(params)] => (&[], name, params),
            [Operand::List(returns), name] => (returns, name, &[]),
            [Operand::List(returns), name, Operand::List(params)] => (returns, name, params),
            _ => return Err(m.unsupported("through a pointer")),
        };
        let Operand::Name(name) = name else { return Err(m.unsupported("through a pointer")) };
        let text = self.text;
        let functions = || text.functions.iter().filter(|f| !f.is_entry && f.name == *name);
        let Some(function) = functions().find(|f| f.body.is_some()).or_else(|| functions().next()) else {
            return Err(ErrorKind::Undeclared(format!("function {name}")));
        };
        if params.len() != function.params.len() || returns.len() != function.returns.len() {
            return Err(ErrorKind::Syntax {
                expected: format!(
                    "{} results and {} parameters",
                    function.returns.len(),
                    function.params.len()
                ),
                found: format!("{} and {}", returns.len(), params.len()),
            });
        }
        let mut scope = Scope::new();
        let formal = function.params.iter().chain(&function.returns);
        for (formal, actual) in formal.zip(params.iter().chain(returns)) {
            let Operand::Name(actual) = actual else { return Err(m.unsupported("with a constant")) };
            match self.lookup(actual) {
                Some(binding @ Binding::CallParam(_)) => scope.insert(formal.name.clone(), binding),
                _ => return Err(m.unsupported("with parameters in registers")),
            };
        }
        let line = self.line;
        let skip = self.new_label("behind a call");
        if let Some((pred, negated)) = guard {
            self.emit(Some((pred, !negated)), Op::Branch { target: skip }, spelling);
        } else {
            self.emit(None, Op::Nop, spelling);
        }
        let outer = self.return_to.replace(skip);
        // A function sees the module and its parameters, nothing of its caller.
        let callers = self.scopes.split_off(1);
        self.scopes.push(scope);
        let result = self.body(function);
        self.scopes.truncate(1);
        self.scopes.extend(callers);
        result?;
        self.return_to = outer;
        self.line = line;
        self.place_label(skip);
        Ok(())
    }
}

/// Number of the barrier that stands for the barrier of a cluster, behind the sixteen of a block.
pub(crate) const CLUSTER: u64 = 16;
