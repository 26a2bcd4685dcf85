//! From tokens to statements. Names are resolved later, by `crate::decode`.

use crate::error::{Error, ErrorKind, Result};
use crate::lexer::{self, Spanned, Token};
use crate::syntax::{Function, Guard, Initial, Instruction, Operand, StateSpace, Statement, Text, Variable};
use crate::types::Type;

/// The newest PTX ISA the interpreter was written for.
const NEWEST: (&str, u32, u32) = ("9.0", 9, 0);

/// # Errors
/// The first line that is not PTX as this interpreter knows it.
pub(crate) fn parse(source: &str) -> Result<Text> {
    let mut parser = Parser { tokens: lexer::tokens(source)?, at: 0, depth: 0 };
    parser.text()
}

/// Deepest nesting of operands and initial values.
const DEEPEST: usize = 16;

struct Parser {
    tokens: Vec<Spanned>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|t| &t.0)
    }

    fn peek_at(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead).map(|t| &t.0)
    }

    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |t| t.1)
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.peek().cloned();
        self.at += 1;
        token
    }

    fn expected<T>(&self, expected: &str) -> Result<T> {
        let found = self.peek().map_or("end of text".to_owned(), Token::show);
        Err(Error::at_line(ErrorKind::Syntax { expected: expected.to_owned(), found }, self.line()))
    }

    fn unsupported<T>(&self, what: impl Into<String>) -> Result<T> {
        Err(Error::at_line(ErrorKind::Unsupported(what.into()), self.line()))
    }

    fn is(&self, c: char) -> bool {
        self.peek() == Some(&Token::Punct(c))
    }

    fn eat(&mut self, c: char) -> bool {
        let found = self.is(c);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, c: char) -> Result<()> {
        if self.eat(c) { Ok(()) } else { self.expected(&format!("`{c}`")) }
    }

    fn word(&mut self, what: &str) -> Result<String> {
        match self.peek() {
            Some(Token::Word(w)) => {
                let w = w.clone();
                self.at += 1;
                Ok(w)
            }
            _ => self.expected(what),
        }
    }

    fn integer(&mut self, what: &str) -> Result<u64> {
        match self.peek() {
            Some(Token::Int(i)) => {
                let i = *i;
                self.at += 1;
                Ok(i)
            }
            _ => self.expected(what),
        }
    }

    fn text(&mut self) -> Result<Text> {
        let mut text = Text::default();
        while let Some(token) = self.peek() {
            let Token::Dot(directive) = token else { return self.expected("a directive") };
            match directive.as_str() {
                "version" => {
                    self.at += 1;
                    text.version = self.version()?;
                }
                "target" => {
                    self.at += 1;
                    text.target = self.word("a target")?;
                    while self.eat(',') {
                        self.word("a target option")?;
                    }
                }
                "address_size" => {
                    self.at += 1;
                    if self.integer("an address size")? != 64 {
                        return self.unsupported("addresses of 32 bits");
                    }
                }
                "file" => {
                    self.at += 1;
                    self.integer("a file number")?;
                    self.next();
                    while self.eat(',') {
                        self.integer("a number")?;
                    }
                }
                "visible" | "weak" | "extern" | "entry" | "func" | "global" | "const" | "shared"
                | "common" => self.declaration(&mut text)?,
                // Debug sections and the like change nothing.
                "section" => self.skip_block()?,
                other => return self.unsupported(format!("directive .{other}")),
            }
        }
        if text.version.is_empty() {
            return Err(Error::at_line(
                ErrorKind::Syntax { expected: ".version".to_owned(), found: "none".to_owned() },
                1,
            ));
        }
        Ok(text)
    }

    fn version(&mut self) -> Result<String> {
        // `9.0` is a fraction to the lexer.
        let (found, line) = (self.peek().cloned(), self.line());
        let Some(Token::F64(bits)) = found else { return self.expected("a version") };
        self.at += 1;
        let version = format!("{:.1}", f64::from_bits(bits));
        let mut parts = version.split('.').map(|p| p.parse::<u32>().unwrap_or(0));
        let (major, minor) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        if (major, minor) > (NEWEST.1, NEWEST.2) {
            return Err(Error::at_line(ErrorKind::Version { found: version, known: NEWEST.0 }, line));
        }
        Ok(version)
    }

    fn skip_block(&mut self) -> Result<()> {
        while !self.is('{') {
            if self.next().is_none() {
                return self.expected("`{`");
            }
        }
        while !self.eat('}') {
            if self.next().is_none() {
                return self.expected("`}`");
            }
        }
        Ok(())
    }

    fn declaration(&mut self, text: &mut Text) -> Result<()> {
        let mut external = false;
        loop {
            match self.peek() {
                Some(Token::Dot(d)) if d == "extern" => external = true,
                Some(Token::Dot(d)) if ["visible", "weak", "common"].contains(&d.as_str()) => {}
                _ => break,
            }
            self.at += 1;
        }
        match self.peek() {
            Some(Token::Dot(d)) if d == "entry" || d == "func" => {
                let function = self.function()?;
                text.functions.push(function);
            }
            Some(Token::Dot(d)) if ["global", "const", "shared"].contains(&d.as_str()) => {
                let mut variables = self.variables(external)?;
                text.variables.append(&mut variables);
            }
            _ => return self.expected("a function or a variable"),
        }
        Ok(())
    }

    fn function(&mut self) -> Result<Function> {
        let line = self.line();
        let is_entry = self.peek() == Some(&Token::Dot("entry".to_owned()));
        self.at += 1;
        let returns = if !is_entry && self.is('(') { self.params()? } else { Vec::new() };
        let name = self.word("a function name")?;
        let params = if self.is('(') { self.params()? } else { Vec::new() };
        let mut function = Function {
            name,
            is_entry,
            params,
            returns,
            max_threads: None,
            required_block: None,
            body: None,
            line,
        };
        loop {
            match self.peek().cloned() {
                Some(Token::Dot(d)) if d == "maxntid" || d == "reqntid" => {
                    self.at += 1;
                    let block = self.triple()?;
                    function.max_threads = Some(block.iter().fold(1, |all: u32, n| all.saturating_mul(*n)));
                    if d == "reqntid" {
                        function.required_block = Some(block);
                    }
                }
                Some(Token::Dot(d)) if d == "minnctapersm" || d == "maxnreg" => {
                    self.at += 1;
                    self.integer("a number")?;
                }
                Some(Token::Dot(d)) if d == "noreturn" => self.at += 1,
                Some(Token::Dot(d)) if d == "pragma" => {
                    self.at += 1;
                    self.next();
                    self.expect(';')?;
                }
                Some(Token::Dot(d)) => return self.unsupported(format!("function directive .{d}")),
                _ => break,
            }
        }
        if self.eat(';') {
            return Ok(function);
        }
        self.expect('{')?;
        function.body = Some(self.body()?);
        Ok(function)
    }

    fn triple(&mut self) -> Result<[u32; 3]> {
        let mut out = [1; 3];
        for (i, slot) in out.iter_mut().enumerate() {
            if i > 0 && !self.eat(',') {
                break;
            }
            *slot = self.integer("a number of threads")? as u32;
        }
        Ok(out)
    }

    fn params(&mut self) -> Result<Vec<Variable>> {
        self.expect('(')?;
        let mut out = Vec::new();
        while !self.eat(')') {
            out.append(&mut self.declarators(false)?);
            if !self.eat(',') && !self.is(')') {
                return self.expected("`,` or `)`");
            }
        }
        Ok(out)
    }

    /// A variable declaration with its semicolon.
    fn variables(&mut self, external: bool) -> Result<Vec<Variable>> {
        let mut out = self.declarators(external)?;
        while self.eat(',') {
            let Some(last) = out.last() else { return self.expected("a variable") };
            let (space, element, align, line) = (last.space, last.element, last.align, self.line());
            out.push(self.declarator(space, element, align, external, line)?);
        }
        self.expect(';')?;
        Ok(out)
    }

    /// State space, alignment, type, name and dimensions of one variable.
    fn declarators(&mut self, external: bool) -> Result<Vec<Variable>> {
        let line = self.line();
        let (mut space, mut align, mut element) = (None, None, None);
        while let Some(Token::Dot(word)) = self.peek().cloned() {
            self.at += 1;
            match word.as_str() {
                "global" => space = Some(StateSpace::Global),
                "shared" => space = Some(StateSpace::Shared),
                "local" => space = Some(StateSpace::Local),
                "const" => space = Some(StateSpace::Const),
                "param" => space = Some(StateSpace::Param),
                // Registers as parameters of device functions.
                "reg" => space = Some(StateSpace::Reg),
                "align" => align = Some(self.integer("an alignment")? as usize),
                "ptr" => {
                    // Says what the pointer points to; nothing the interpreter relies on.
                    if let Some(Token::Dot(d)) = self.peek()
                        && ["global", "shared", "local", "const"].contains(&d.as_str())
                    {
                        self.at += 1;
                    }
                }
                other => match Type::parse(other) {
                    Some(ty) => {
                        element = Some(ty);
                        // `.param .u64 .ptr .global .align 16 name`
                        if self.peek() != Some(&Token::Dot("ptr".to_owned())) {
                            break;
                        }
                        self.at += 1;
                        while let Some(Token::Dot(d)) = self.peek().cloned() {
                            self.at += 1;
                            if d == "align" {
                                self.integer("an alignment")?;
                            }
                        }
                        break;
                    }
                    None => return self.unsupported(format!("declaration with .{other}")),
                },
            }
        }
        let Some(space) = space else { return self.expected("a state space") };
        let Some(element) = element else { return self.expected("a type") };
        let align = align.unwrap_or(element.bytes());
        Ok(vec![self.declarator(space, element, align, external, line)?])
    }

    fn declarator(
        &mut self,
        space: StateSpace,
        element: Type,
        align: usize,
        external: bool,
        line: u32,
    ) -> Result<Variable> {
        let name = self.word("a name")?;
        let mut count = 1usize;
        let mut is_array = false;
        while self.eat('[') {
            is_array = true;
            count = if self.is(']') {
                0
            } else {
                let n = self.integer("a dimension")? as usize;
                let Some(count) = count.checked_mul(n) else { return self.expected("a smaller dimension") };
                count
            };
            self.expect(']')?;
        }
        let mut initial = Vec::new();
        if self.eat('=') {
            self.initial(&mut initial)?;
            if is_array && count == 0 {
                count = initial.len();
            }
        }
        let Some(bytes) = count.checked_mul(element.bytes()).filter(|b| *b < 1 << 31) else {
            return self.expected("a smaller variable");
        };
        if !align.is_power_of_two() || align > 4096 {
            return self.expected("a power of two, at most 4096, as alignment");
        }
        if initial.len() > count {
            return self.expected(&format!("at most {count} initial values"));
        }
        Ok(Variable { space, name, align, bytes, external, initial, element, line })
    }

    fn initial(&mut self, out: &mut Vec<Initial>) -> Result<()> {
        if self.eat('{') {
            while !self.eat('}') {
                self.nested(|parser| parser.initial(out))?;
                if !self.eat(',') && !self.is('}') {
                    return self.expected("`,` or `}`");
                }
            }
            return Ok(());
        }
        let negative = self.eat('-');
        match self.peek().cloned() {
            Some(Token::Int(i)) => {
                self.at += 1;
                out.push(Initial::Bits(if negative { i.wrapping_neg() } else { i }));
            }
            Some(Token::F32(bits)) => {
                self.at += 1;
                out.push(Initial::Bits(u64::from(bits ^ if negative { 1 << 31 } else { 0 })));
            }
            Some(Token::F64(bits)) => {
                self.at += 1;
                out.push(Initial::Bits(bits ^ if negative { 1 << 63 } else { 0 }));
            }
            Some(Token::Word(word)) => {
                self.at += 1;
                let name = if word == "generic" && self.eat('(') {
                    let name = self.word("a variable")?;
                    self.expect(')')?;
                    name
                } else {
                    word
                };
                let plus = if self.eat('+') { self.integer("an offset")? as i64 } else { 0 };
                out.push(Initial::Address(name, plus));
            }
            _ => return self.expected("an initial value"),
        }
        Ok(())
    }

    fn body(&mut self) -> Result<Vec<Statement>> {
        let mut out = Vec::new();
        let mut depth = 0;
        loop {
            let line = self.line();
            match self.peek().cloned() {
                None => return self.expected("`}`"),
                Some(Token::Punct('{')) => {
                    self.at += 1;
                    depth += 1;
                    out.push(Statement::Open);
                }
                Some(Token::Punct('}')) => {
                    self.at += 1;
                    if depth == 0 {
                        return Ok(out);
                    }
                    depth -= 1;
                    out.push(Statement::Close);
                }
                Some(Token::Punct(';')) => self.at += 1,
                Some(Token::Word(name)) if self.peek_at(1) == Some(&Token::Punct(':')) => {
                    self.at += 2;
                    if self.peek() == Some(&Token::Dot("branchtargets".to_owned())) {
                        self.at += 1;
                        let mut targets = vec![self.word("a label")?];
                        while self.eat(',') {
                            targets.push(self.word("a label")?);
                        }
                        self.expect(';')?;
                        out.push(Statement::Label(name));
                        out.push(Statement::BranchTargets(targets));
                    } else {
                        out.push(Statement::Label(name));
                    }
                }
                Some(Token::Dot(directive)) => match directive.as_str() {
                    "reg" => {
                        self.at += 1;
                        self.registers(line, &mut out)?;
                    }
                    "shared" | "local" | "param" | "const" | "global" => {
                        out.extend(self.variables(false)?.into_iter().map(Statement::Variable));
                    }
                    "extern" => {
                        self.at += 1;
                        out.extend(self.variables(true)?.into_iter().map(Statement::Variable));
                    }
                    "pragma" => {
                        self.at += 1;
                        self.next();
                        self.expect(';')?;
                    }
                    "loc" => {
                        // `.loc file line column[, function_name label, inlined_at …]`: up to the end of the line.
                        while self.at < self.tokens.len() && self.line() == line {
                            self.at += 1;
                        }
                    }
                    other => return self.unsupported(format!("directive .{other} in a function")),
                },
                Some(_) => out.push(Statement::Instruction(self.instruction()?)),
            }
        }
    }

    fn registers(&mut self, line: u32, out: &mut Vec<Statement>) -> Result<()> {
        let element = match self.peek() {
            Some(Token::Dot(d)) => Type::parse(d),
            _ => None,
        };
        let Some(element) = element else { return self.expected("a register type") };
        self.at += 1;
        loop {
            let name = self.word("a register")?;
            let mut count = None;
            if self.eat('<') {
                count = Some(self.integer("a number of registers")? as u32);
                self.expect('>')?;
            }
            out.push(Statement::Registers { element, name, count, line });
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn instruction(&mut self) -> Result<Instruction> {
        let line = self.line();
        let guard = if self.eat('@') {
            let negated = self.eat('!');
            Some(Guard { register: self.word("a predicate")?, negated })
        } else {
            None
        };
        let mut opcode = vec![self.word("an instruction")?];
        while let Some(Token::Dot(modifier)) = self.peek() {
            opcode.push(modifier.clone());
            self.at += 1;
        }
        let mut operands = Vec::new();
        if !self.is(';') {
            operands.push(self.operand()?);
            while self.eat(',') {
                operands.push(self.operand()?);
            }
        }
        self.expect(';')?;
        Ok(Instruction { guard, opcode, operands, line })
    }

    fn operands_until(&mut self, close: char) -> Result<Vec<Operand>> {
        let mut out = Vec::new();
        while !self.eat(close) {
            out.push(self.operand()?);
            if !self.eat(',') && !self.is(close) {
                return self.expected(&format!("`,` or `{close}`"));
            }
        }
        Ok(out)
    }

    fn operand(&mut self) -> Result<Operand> {
        let first = self.single()?;
        if self.eat('|') {
            return Ok(Operand::Pair(Box::new(first), Box::new(self.single()?)));
        }
        if self.is('+') || self.is('-') {
            return self.unsupported("a sum as an operand");
        }
        Ok(first)
    }

    fn offset(&mut self) -> Result<i64> {
        let mut total = 0i64;
        while self.is('+') || self.is('-') {
            let mut negative = self.is('-');
            self.at += 1;
            if self.eat('-') {
                negative = !negative;
            }
            let value = self.integer("an offset")? as i64;
            total = total.wrapping_add(if negative { value.wrapping_neg() } else { value });
        }
        Ok(total)
    }

    /// Runs `with` one level deeper.
    fn nested<T>(&mut self, with: impl FnOnce(&mut Parser) -> Result<T>) -> Result<T> {
        if self.depth >= DEEPEST {
            return self.unsupported("so deep a nesting");
        }
        self.depth += 1;
        let result = with(self);
        self.depth -= 1;
        result
    }

    fn single(&mut self) -> Result<Operand> {
        self.nested(Parser::single_inside)
    }

    fn single_inside(&mut self) -> Result<Operand> {
        let Some(token) = self.peek().cloned() else { return self.expected("an operand") };
        self.at += 1;
        Ok(match token {
            Token::Punct('{') => Operand::Vector(self.operands_until('}')?),
            Token::Punct('(') => Operand::List(self.operands_until(')')?),
            Token::Punct('!') => Operand::Not(Box::new(self.single()?)),
            Token::Punct('-') => match self.next() {
                Some(Token::Int(i)) => Operand::Int(i.wrapping_neg()),
                Some(Token::F32(bits)) => Operand::F32(bits ^ 1 << 31),
                Some(Token::F64(bits)) => Operand::F64(bits ^ 1 << 63),
                _ => {
                    self.at -= 1;
                    return self.expected("a number");
                }
            },
            Token::Punct('[') => {
                let base = Box::new(self.single()?);
                let offset = self.offset()?;
                let coordinates = if self.eat(',') { Some(self.coordinates()?) } else { None };
                self.expect(']')?;
                Operand::Address { base, offset, coordinates }
            }
            Token::Int(i) => Operand::Int(i),
            Token::F32(bits) => Operand::F32(bits),
            Token::F64(bits) => Operand::F64(bits),
            Token::Word(word) if word == "_" => Operand::Sink,
            Token::Word(mut word) => {
                // `%tid.x`
                while word.starts_with('%')
                    && let Some(Token::Dot(part)) = self.peek()
                {
                    word = format!("{word}.{part}");
                    self.at += 1;
                }
                Operand::Name(word)
            }
            _ => {
                self.at -= 1;
                return self.expected("an operand");
            }
        })
    }

    fn coordinates(&mut self) -> Result<Vec<Operand>> {
        self.expect('{')?;
        self.operands_until('}')
    }
}
