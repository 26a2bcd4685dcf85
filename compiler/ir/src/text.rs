//! The text form `.air`: `parse(print(g)) == g`, and `print(parse(s)) == s` for every printed `s`.
//!
//! ```text
//! file   := func*
//! func   := "func" "@" name "(" [input {"," input}] ")" "->" types "{" stmt* "return" [value {"," value}] "}"
//! input  := "%" name ":" type
//! types  := type | "(" [type {"," type}] ")"
//! stmt   := value {"," value} "=" (op [value {"," value}] [attrs] | "weight" "@" name) [":" type {"," type}]
//! value  := "%" name ["#" slot]
//! attrs  := "{" [name "=" attr {"," name "=" attr}] "}"
//! attr   := "true" | "false" | number | string | "[" [number-or-symbol {"," number-or-symbol}] "]"
//! type   := element "[" [dim {"," dim}] "]"            dim := integer | "T" | "R" | "S"
//! name   := letters, digits, "_" and "."; after "@" also a quoted string
//! ```
//!
//! `;` starts a comment. A value is defined before it is used. An op with several results lists them all:
//! `%qkv#0, %qkv#1, %qkv#2 = qkv_rope …`. Types after `:` may be left out, except for weights; given ones are checked.
//! A list of integers and symbols is a shape; one with a fraction, an exponent or a sign in it is a list of numbers.

mod lexer;

use crate::attr::{Attr, Attrs};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, ValueId, unbounded};
use crate::ops::{Op, OpKind};
use crate::types::{Dim, Elem, Sym, TensorType};
use crate::weights::WeightName;
use lexer::{Lexer, Place, Token};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Attributes of one op; none has nearly as many.
const MAX_ATTRS: usize = 64;

/// Writes a graph as text.
pub fn print(graph: &Graph) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_graph(graph, &mut out);
    out
}

fn write_graph(graph: &Graph, out: &mut String) -> std::fmt::Result {
    let inputs = graph.inputs().iter().map(|id| {
        let node = graph.node(*id);
        format!("%{}: {}", node.name, joined(&node.outputs))
    });
    let inputs = inputs.collect::<Vec<_>>().join(", ");
    let types: Vec<String> = graph.outputs().iter().map(|v| graph.ty(*v).to_string()).collect();
    let types = if types.len() == 1 { types.concat() } else { format!("({})", types.join(", ")) };
    writeln!(out, "func {}({inputs}) -> {types} {{", at_name(&graph.name))?;
    for id in graph.topo() {
        let node = graph.node(id);
        if matches!(node.op, OpKind::Input(_)) {
            continue;
        }
        let results =
            (0..node.outputs.len()).map(|slot| spell(graph, ValueId { node: id, slot: slot as u16 }));
        write!(out, "  {} = {}", results.collect::<Vec<_>>().join(", "), node.op.name())?;
        if let OpKind::Weight(weight) = &node.op {
            write!(out, " {}", at_name(&weight.name))?;
        }
        let operands: Vec<String> = graph.inputs_of(id).into_iter().map(|v| spell(graph, v)).collect();
        if !operands.is_empty() {
            write!(out, " {}", operands.join(", "))?;
        }
        let attrs = node.op.attrs();
        if !attrs.list.is_empty() {
            let list = attrs.list.iter().map(|(name, attr)| format!("{name} = {}", spell_attr(attr)));
            write!(out, " {{{}}}", list.collect::<Vec<_>>().join(", "))?;
        }
        writeln!(out, " : {}", joined(&node.outputs))?;
    }
    let outputs: Vec<String> = graph.outputs().iter().map(|v| format!(" {}", spell(graph, *v))).collect();
    writeln!(out, "  return{}", outputs.join(","))?;
    writeln!(out, "}}")
}

fn joined(types: &[TensorType]) -> String {
    types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn spell(graph: &Graph, v: ValueId) -> String {
    let node = graph.node(v.node);
    if node.outputs.len() == 1 { format!("%{}", node.name) } else { format!("%{}#{}", node.name, v.slot) }
}

fn at_name(name: &str) -> String {
    let is_plain = !name.is_empty() && name.bytes().all(lexer::is_name_byte);
    if is_plain { format!("@{name}") } else { format!("@{}", quoted(name)) }
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn spell_attr(attr: &Attr) -> String {
    let list = |items: Vec<String>| format!("[{}]", items.join(", "));
    match attr {
        Attr::Bool(v) => v.to_string(),
        Attr::Int(v) => v.to_string(),
        // `{:?}` is the shortest text that reads back to the same bits, and always has a point or an exponent.
        Attr::Float(v) => format!("{v:?}"),
        Attr::Str(v) => quoted(v),
        Attr::Floats(v) => list(v.iter().map(|x| format!("{x:?}")).collect()),
        Attr::Dims(v) => list(v.iter().map(ToString::to_string).collect()),
    }
}

/// Reads all functions of a text. Every rule that concerns one node is checked as it is read.
///
/// # Errors
/// The first error, with line and column, and the function and node once they are known.
pub fn parse(text: &str) -> Result<Vec<Graph>> {
    let mut lexer = Lexer::new(text);
    let mut graphs = Vec::new();
    let mut names = BTreeMap::new();
    loop {
        let place = lexer.place();
        match lexer.next()? {
            Token::End => return Ok(graphs),
            Token::Word("func") => {}
            other => return Err(lexer.error(place, "func", other)),
        }
        let place = lexer.place();
        let name = at(&mut lexer)?;
        if names.insert(name.clone(), ()).is_some() {
            let problem = format!("two functions are called @{name}");
            return Err(at_place(Error::new(ErrorKind::Structure { rule: "G7", problem }), &lexer, place));
        }
        let graph = Parser::new(&mut lexer, &name).func();
        graphs.push(graph.map_err(|e| e.at_func(name))?);
    }
}

fn at_place(error: Error, lexer: &Lexer<'_>, place: Place) -> Error {
    let (line, column) = lexer.position(place);
    error.at_line(line, column)
}

/// `@name` or `@"any text"`.
fn at(lexer: &mut Lexer<'_>) -> Result<String> {
    let place = lexer.place();
    match lexer.next()? {
        Token::At(name) => Ok(name.to_owned()),
        Token::AtQuoted(name) => Ok(name),
        other => Err(lexer.error(place, "@name", other)),
    }
}

struct Parser<'l, 't> {
    lexer: &'l mut Lexer<'t>,
    graph: Graph,
}

/// `%name` or `%name#slot`.
struct Named<'t> {
    name: &'t str,
    slot: Option<u16>,
    place: Place,
}

impl<'l, 't> Parser<'l, 't> {
    fn new(lexer: &'l mut Lexer<'t>, name: &str) -> Parser<'l, 't> {
        Parser { lexer, graph: Graph::new(name) }
    }

    fn func(mut self) -> Result<Graph> {
        self.punct('(')?;
        if !self.took(')')? {
            loop {
                let named = self.named()?;
                self.punct(':')?;
                let ty = self.ty()?;
                self.check_new(&named)?;
                self.graph.add_input(named.name, ty);
                if self.took(')')? {
                    break;
                }
                self.punct(',')?;
            }
        }
        self.punct('>')?;
        let place = self.lexer.place();
        let types = self.result_types()?;
        self.punct('{')?;
        while !self.took_word("return")? {
            self.statement()?;
        }
        let mut outputs = Vec::new();
        if !self.took('}')? {
            loop {
                outputs.push(self.value()?);
                if self.took('}')? {
                    break;
                }
                self.punct(',')?;
            }
        }
        let returned: Vec<TensorType> = outputs.iter().map(|v| self.graph.ty(*v).clone()).collect();
        self.graph.set_outputs(outputs);
        if returned != types {
            let problem = format!(
                "the function is declared to return {}, it returns {}",
                joined(&types),
                joined(&returned)
            );
            return Err(self.at(Error::new(ErrorKind::Structure { rule: "G3", problem }), place));
        }
        Ok(self.graph)
    }

    fn result_types(&mut self) -> Result<Vec<TensorType>> {
        if !self.took('(')? {
            return Ok(vec![self.ty()?]);
        }
        let mut types = Vec::new();
        if self.took(')')? {
            return Ok(types);
        }
        loop {
            types.push(self.ty()?);
            if self.took(')')? {
                return Ok(types);
            }
            self.punct(',')?;
        }
    }

    fn statement(&mut self) -> Result<()> {
        let mut results = vec![self.named()?];
        while self.took(',')? {
            results.push(self.named()?);
        }
        self.punct('=')?;
        let place = self.lexer.place();
        let op = match self.lexer.next()? {
            Token::Word(op) => op,
            other => return Err(self.lexer.error(place, "an op", other)),
        };
        let name = results[0].name;
        self.check_new(&results[0])?;
        let site = format!("%{name} = {}", lexer::shortened(op));
        let id = if op == "weight" {
            let weight: WeightName = at(self.lexer)?.into();
            let type_place = self.lexer.place();
            self.punct(':')?;
            let ty = self.ty()?;
            if ty.shape.iter().any(|d| d.fixed().is_none()) {
                let problem = format!("a weight of type {ty}: every dimension must be a number");
                let error = Error::new(ErrorKind::Structure { rule: "G5", problem });
                return Err(self.at(error.at_node(site), type_place));
            }
            self.graph.add_weight_named(&weight, ty, name)
        } else {
            let inputs = self.operands()?;
            let attrs = self.attrs(op)?;
            let op = OpKind::from_attrs(&lexer::shortened(op), attrs)
                .map_err(|e| self.at(e.at_node(&*site), place))?;
            let id = self.graph.add_named(op, &inputs, Some(name));
            let id = id.map_err(|e| self.at(e.at_node(&*site), place))?;
            if self.took(':')? {
                let type_place = self.lexer.place();
                let mut types = vec![self.ty()?];
                while self.took(',')? {
                    types.push(self.ty()?);
                }
                if types != self.graph.node(id).outputs {
                    let inferred = joined(&self.graph.node(id).outputs);
                    let problem = format!("the types are {inferred}, recorded are {}", joined(&types));
                    let error = Error::new(ErrorKind::Structure { rule: "G3", problem });
                    return Err(self.at(error.at_node(site), type_place));
                }
            }
            id
        };
        let count = self.graph.node(id).outputs.len();
        let are_slots = match results.as_slice() {
            [one] => count == 1 && one.slot.is_none(),
            many => {
                many.iter().enumerate().all(|(i, r)| r.name == name && r.slot.map(usize::from) == Some(i))
            }
        };
        if results.len() != count || !are_slots {
            let expected = match count {
                1 => format!("%{name}"),
                _ => (0..count).map(|i| format!("%{name}#{i}")).collect::<Vec<_>>().join(", "),
            };
            let got = format!("{} results of other names", results.len());
            return Err(
                self.at(Error::new(ErrorKind::Syntax { expected, got }).at_node(site), results[0].place)
            );
        }
        Ok(())
    }

    fn operands(&mut self) -> Result<Vec<ValueId>> {
        let mut inputs = Vec::new();
        if !matches!(self.lexer.peek()?, Token::Percent(..)) {
            return Ok(inputs);
        }
        inputs.push(self.value()?);
        while self.took(',')? {
            inputs.push(self.value()?);
        }
        Ok(inputs)
    }

    fn attrs(&mut self, op: &str) -> Result<Attrs> {
        let mut attrs = Attrs::new(op);
        if !self.took('{')? || self.took('}')? {
            return Ok(attrs);
        }
        loop {
            let place = self.lexer.place();
            let name = match self.lexer.next()? {
                Token::Word(name) => name,
                other => return Err(self.lexer.error(place, "the name of an attribute", other)),
            };
            self.punct('=')?;
            let value = self.attr()?;
            let problem = if attrs.list.iter().any(|(n, _)| n == name) {
                Some("given twice")
            } else {
                (attrs.list.len() >= MAX_ATTRS).then_some("too many attributes")
            };
            if let Some(problem) = problem {
                let (op, name) = (lexer::shortened(op), lexer::shortened(name));
                let kind = ErrorKind::Attribute { op, name, problem: problem.to_owned() };
                return Err(self.at(Error::new(kind), place));
            }
            attrs = attrs.with(name, value);
            if self.took('}')? {
                return Ok(attrs);
            }
            self.punct(',')?;
        }
    }

    fn attr(&mut self) -> Result<Attr> {
        let place = self.lexer.place();
        match self.lexer.next()? {
            Token::Word("true") => Ok(Attr::Bool(true)),
            Token::Word("false") => Ok(Attr::Bool(false)),
            Token::Int(v) => Ok(Attr::Int(v)),
            Token::Float(v) => Ok(Attr::Float(v)),
            Token::Quoted(v) => Ok(Attr::Str(v)),
            Token::Punct('[') => self.list(),
            other => Err(self.lexer.error(place, "true, false, a number, a string or a list", other)),
        }
    }

    /// The rest of a list: a shape while it can be one, otherwise numbers.
    fn list(&mut self) -> Result<Attr> {
        let (mut dims, mut numbers) = (Some(Vec::new()), Some(Vec::new()));
        if self.took(']')? {
            return Ok(Attr::Dims(Vec::new()));
        }
        loop {
            let place = self.lexer.place();
            let token = self.lexer.next()?;
            let dim = match &token {
                Token::Int(v) => usize::try_from(*v).ok().map(Dim::Fixed),
                Token::Word(letter) => Sym::by_letter(letter).map(Dim::Sym),
                _ => None,
            };
            let number = match &token {
                Token::Int(v) => Some(*v as f64),
                Token::Float(v) => Some(*v),
                _ => None,
            };
            dims = dims.zip(dim).map(|(mut list, d)| {
                list.push(d);
                list
            });
            numbers = numbers.zip(number).map(|(mut list, n)| {
                list.push(n);
                list
            });
            if dims.is_none() && numbers.is_none() {
                return Err(self.lexer.error(place, "numbers, or dimensions", token));
            }
            if self.took(']')? {
                break;
            }
            self.punct(',')?;
        }
        Ok(match (dims, numbers) {
            (Some(dims), _) => Attr::Dims(dims),
            (None, numbers) => Attr::Floats(numbers.unwrap_or_default()),
        })
    }

    fn ty(&mut self) -> Result<TensorType> {
        let place = self.lexer.place();
        let elem = match self.lexer.next()? {
            Token::Word(word) => match Elem::by_name(word) {
                Some(elem) => elem,
                None => {
                    return Err(self.lexer.error(place, "an element type such as f32", Token::Word(word)));
                }
            },
            other => return Err(self.lexer.error(place, "a type", other)),
        };
        self.punct('[')?;
        let mut shape = Vec::new();
        if !self.took(']')? {
            loop {
                let dim_place = self.lexer.place();
                let token = self.lexer.next()?;
                let dim = match &token {
                    Token::Int(v) => usize::try_from(*v).ok().map(Dim::Fixed),
                    Token::Word(letter) => Sym::by_letter(letter).map(Dim::Sym),
                    _ => None,
                };
                let Some(dim) = dim else {
                    return Err(self.lexer.error(dim_place, "a dimension: a number, T, R or S", token));
                };
                shape.push(dim);
                if shape.len() > TensorType::MAX_RANK {
                    return Err(self.lexer.error(dim_place, "at most 8 dimensions", token));
                }
                if self.took(']')? {
                    break;
                }
                self.punct(',')?;
            }
        }
        let ty = TensorType::new(elem, shape);
        if ty.is_bounded() { Ok(ty) } else { Err(self.at(unbounded(&ty), place)) }
    }

    fn named(&mut self) -> Result<Named<'t>> {
        let place = self.lexer.place();
        match self.lexer.next()? {
            Token::Percent(name, slot) => Ok(Named { name, slot, place }),
            other => Err(self.lexer.error(place, "a %value", other)),
        }
    }

    fn check_new(&self, named: &Named<'_>) -> Result<()> {
        let problem = if self.graph.by_name(named.name).is_some() {
            format!("the name %{} is taken", lexer::shortened(named.name))
        } else if !crate::graph::is_plain_name(named.name) {
            format!("the name %{} is too long", lexer::shortened(named.name))
        } else {
            return Ok(());
        };
        Err(self.at(Error::new(ErrorKind::Structure { rule: "G7", problem }), named.place))
    }

    /// A value that is already defined.
    fn value(&mut self) -> Result<ValueId> {
        let Named { name, slot, place } = self.named()?;
        let found = self.graph.by_name(name).filter(|id| {
            let count = self.graph.node(*id).outputs.len();
            match slot {
                None => count == 1,
                Some(slot) => count > 1 && usize::from(slot) < count,
            }
        });
        match found {
            Some(node) => Ok(ValueId { node, slot: slot.unwrap_or(0) }),
            None => {
                let slot = slot.map_or(String::new(), |s| format!("#{s}"));
                let name = format!("%{}{slot}", lexer::shortened(name));
                Err(self.at(Error::new(ErrorKind::UnknownValue { name }), place))
            }
        }
    }

    fn punct(&mut self, expected: char) -> Result<()> {
        let place = self.lexer.place();
        match self.lexer.next()? {
            Token::Punct(c) if c == expected => Ok(()),
            other => {
                let expected = if expected == '>' { "->".to_owned() } else { expected.to_string() };
                Err(self.lexer.error(place, &expected, other))
            }
        }
    }

    fn took(&mut self, c: char) -> Result<bool> {
        let found = *self.lexer.peek()? == Token::Punct(c);
        if found {
            self.lexer.next()?;
        }
        Ok(found)
    }

    fn took_word(&mut self, word: &str) -> Result<bool> {
        let found = *self.lexer.peek()? == Token::Word(word);
        if found {
            self.lexer.next()?;
        }
        Ok(found)
    }

    fn at(&self, error: Error, place: Place) -> Error {
        at_place(error, self.lexer, place)
    }
}
