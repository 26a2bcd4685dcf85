//! The host behind the C interface: every question becomes a call of its table.

use crate::abi::{
    ATTAR_ATTR_BOOL, ATTAR_ATTR_DIMS, ATTAR_ATTR_FLOAT, ATTAR_ATTR_FLOATS, ATTAR_ATTR_INT, ATTAR_ATTR_TEXT,
    ATTAR_CANCELLED, ATTAR_CODES_FLOAT, ATTAR_CODES_INT8, ATTAR_DIM_CONTEXT, ATTAR_DIM_ROWS,
    ATTAR_DIM_TOKENS, ATTAR_ERROR, ATTAR_LOG_DEBUG, ATTAR_LOG_INFO, ATTAR_LOG_WARNING, ATTAR_MAX_RANK,
    ATTAR_METRIC_COUNT, ATTAR_METRIC_NUMBER, ATTAR_METRIC_TEXT, ATTAR_MISUSE, ATTAR_OK, ATTAR_PANIC,
    ATTAR_SCALE_ROW_F32_FIELD8, ATTAR_UNAVAILABLE, AttarAttr, AttarCodes, AttarEdit, AttarFloats,
    AttarFormat, AttarHost, AttarMetric, AttarNode, AttarNodeInfo, AttarRun, AttarStatistics, AttarStatus,
    AttarStr, AttarTensorInfo, AttarTokens, AttarType, AttarUse, AttarValue,
};
use crate::entry::str_of;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{
    Attr, Dim, Encoded, FormatInfo, FormatKind, Held, HeldMut, HeldStatistics, Host, Level, Metric, Node,
    NodeInfo, TensorInfo, Type, Value,
};
use std::mem::offset_of;

/// A host's table, during the run of a pass.
#[derive(Debug)]
pub struct RemoteHost {
    host: *const AttarHost,
    size: usize,
    run: AttarRun,
}

impl RemoteHost {
    /// The host of a run.
    ///
    /// # Safety
    /// `host` must point to a host's table, which is as large as it says and valid for as long as this is used.
    pub unsafe fn new(host: *const AttarHost, run: AttarRun) -> RemoteHost {
        // SAFETY: every table begins with its size.
        let size = unsafe { (&raw const (*host).size).read() } as usize;
        RemoteHost { host, size, run }
    }

    /// The message of the call that failed last.
    fn last_error(&self) -> String {
        let mut message = EMPTY;
        let at = offset_of!(AttarHost, last_error);
        if self.has(at) {
            // SAFETY: the table is large enough to hold the function.
            if let Some(last_error) = unsafe { (&raw const (*self.host).last_error).read() } {
                // SAFETY: the function writes one text, which is valid until the next call.
                unsafe {
                    if last_error(&raw mut message) == ATTAR_OK {
                        return text_of(message);
                    }
                }
            }
        }
        "the host says nothing more".to_owned()
    }

    fn has(&self, offset: usize) -> bool {
        self.size >= offset + size_of::<usize>()
    }

    fn outcome(&self, call: &'static str, status: AttarStatus) -> Result<()> {
        match kind_of(status) {
            None => Ok(()),
            Some(kind) => Err(Error::of(kind, self.last_error()).in_call(call)),
        }
    }
}

const EMPTY: AttarStr = AttarStr { data: std::ptr::null(), len: 0 };

/// The kind of error that a status is.
fn kind_of(status: AttarStatus) -> Option<ErrorKind> {
    match status {
        ATTAR_OK => None,
        ATTAR_MISUSE => Some(ErrorKind::Misuse),
        ATTAR_CANCELLED => Some(ErrorKind::Cancelled),
        ATTAR_UNAVAILABLE => Some(ErrorKind::Unavailable),
        ATTAR_PANIC => Some(ErrorKind::Panic),
        _ => Some(ErrorKind::Failed),
    }
}

/// The status that a kind of error is.
pub fn status_of(kind: ErrorKind) -> AttarStatus {
    match kind {
        ErrorKind::Failed => ATTAR_ERROR,
        ErrorKind::Misuse => ATTAR_MISUSE,
        ErrorKind::Cancelled => ATTAR_CANCELLED,
        ErrorKind::Unavailable => ATTAR_UNAVAILABLE,
        ErrorKind::Panic => ATTAR_PANIC,
    }
}

/// A copy of a text of the other side; what is no UTF-8 in it is replaced.
///
/// # Safety
/// `text` must be valid for reads of its length, or null.
pub unsafe fn text_of(text: AttarStr) -> String {
    if text.data.is_null() || text.len == 0 {
        return String::new();
    }
    // SAFETY: as the caller promises.
    let bytes = unsafe { std::slice::from_raw_parts(text.data, text.len) };
    String::from_utf8_lossy(bytes).into_owned()
}

/// Calls a function of the table, if the host is new enough to have it.
macro_rules! call {
    ($self:ident . $name:ident ( $($argument:expr),* )) => {{
        const NAME: &str = stringify!($name);
        let function = if $self.has(offset_of!(AttarHost, $name)) {
            // SAFETY: the table is large enough to hold the function.
            unsafe { (&raw const (*$self.host).$name).read() }
        } else {
            None
        };
        match function {
            // SAFETY: pointers are to what lives during the call and is as large as the call says.
            Some(function) => $self.outcome(NAME, unsafe { function($self.run, $($argument),*) }),
            None => {
                let message = "this host is too old to have it; update Attar";
                Err(Error::of(ErrorKind::Unavailable, message).in_call(NAME))
            }
        }
    }};
}

/// Asks for a list: once to learn how long it is, and again where the first guess was too short.
fn list<T: Clone>(empty: T, mut ask: impl FnMut(*mut T, usize, *mut usize) -> Result<()>) -> Result<Vec<T>> {
    let mut items = vec![empty.clone(); 16];
    loop {
        let (capacity, mut count) = (items.len(), 0);
        ask(items.as_mut_ptr(), capacity, &raw mut count)?;
        let fits = count <= capacity;
        items.resize(count, empty.clone());
        if fits {
            return Ok(items);
        }
    }
}

/// Dimensions as the interface has them.
fn dim_of(dim: i64) -> Dim {
    match dim {
        ATTAR_DIM_TOKENS => Dim::Tokens,
        ATTAR_DIM_ROWS => Dim::Rows,
        ATTAR_DIM_CONTEXT => Dim::Context,
        n => Dim::Fixed(usize::try_from(n).unwrap_or(0)),
    }
}

/// Dimensions as the interface has them.
pub fn dim_number(dim: Dim) -> i64 {
    match dim {
        Dim::Fixed(n) => i64::try_from(n).unwrap_or(0),
        Dim::Tokens => ATTAR_DIM_TOKENS,
        Dim::Rows => ATTAR_DIM_ROWS,
        Dim::Context => ATTAR_DIM_CONTEXT,
    }
}

fn numbers_of(values: &[Value]) -> Vec<AttarValue> {
    values.iter().map(|v| v.0).collect()
}

const NO_ATTR: AttarAttr = AttarAttr {
    name: EMPTY,
    kind: 0,
    integer: 0,
    number: 0.0,
    text: EMPTY,
    numbers: std::ptr::null(),
    dims: std::ptr::null(),
    len: 0,
};

/// An attribute for the call; `dims` keeps what it points to.
fn attr_of(name: &str, attr: &Attr, dims: &[i64]) -> AttarAttr {
    let base = AttarAttr { name: str_of(name), ..NO_ATTR };
    match attr {
        Attr::Bool(v) => AttarAttr { kind: ATTAR_ATTR_BOOL, integer: i64::from(*v), ..base },
        Attr::Int(v) => AttarAttr { kind: ATTAR_ATTR_INT, integer: *v, ..base },
        Attr::Float(v) => AttarAttr { kind: ATTAR_ATTR_FLOAT, number: *v, ..base },
        Attr::Text(v) => AttarAttr { kind: ATTAR_ATTR_TEXT, text: str_of(v), ..base },
        Attr::Floats(v) => AttarAttr { kind: ATTAR_ATTR_FLOATS, numbers: v.as_ptr(), len: v.len(), ..base },
        Attr::Dims(_) => AttarAttr { kind: ATTAR_ATTR_DIMS, dims: dims.as_ptr(), len: dims.len(), ..base },
    }
}

/// An attribute from the host.
///
/// # Safety
/// What it points to must be valid for reads.
unsafe fn attr_from(attr: &AttarAttr) -> Attr {
    match attr.kind {
        ATTAR_ATTR_BOOL => Attr::Bool(attr.integer != 0),
        ATTAR_ATTR_INT => Attr::Int(attr.integer),
        ATTAR_ATTR_FLOAT => Attr::Float(attr.number),
        // SAFETY: as the caller promises; so below.
        ATTAR_ATTR_TEXT => Attr::Text(unsafe { text_of(attr.text) }),
        // SAFETY: as above.
        ATTAR_ATTR_FLOATS => Attr::Floats(unsafe { copied(attr.numbers, attr.len) }),
        // SAFETY: as above.
        _ => Attr::Dims(unsafe { copied(attr.dims, attr.len) }.into_iter().map(dim_of).collect()),
    }
}

/// A copy of memory of the host.
///
/// # Safety
/// `data` must be valid for reads of `len` elements, or null.
unsafe fn copied<T: Copy>(data: *const T, len: usize) -> Vec<T> {
    if data.is_null() || len == 0 {
        return Vec::new();
    }
    // SAFETY: as the caller promises.
    unsafe { std::slice::from_raw_parts(data, len) }.to_vec()
}

// SAFETY: the interface promises what the trait asks for.
unsafe impl Host for RemoteHost {
    fn fail(&mut self, message: &str) -> Result<()> {
        call!(self.fail(str_of(message)))
    }

    fn log(&mut self, level: Level, message: &str) -> Result<()> {
        let level = match level {
            Level::Debug => ATTAR_LOG_DEBUG,
            Level::Info => ATTAR_LOG_INFO,
            Level::Warning => ATTAR_LOG_WARNING,
        };
        call!(self.log(level, str_of(message)))
    }

    fn progress(&mut self, what: &str, done: u64, total: u64) -> Result<()> {
        call!(self.progress(str_of(what), done, total))
    }

    fn metric(&mut self, subject: &str, values: &[(&str, Metric)]) -> Result<()> {
        let metric = |(name, value): &(&str, Metric)| {
            let base = AttarMetric { name: str_of(name), kind: 0, count: 0, number: 0.0, text: EMPTY };
            match value {
                Metric::Count(count) => AttarMetric { kind: ATTAR_METRIC_COUNT, count: *count, ..base },
                Metric::Number(n) => AttarMetric { kind: ATTAR_METRIC_NUMBER, number: *n, ..base },
                Metric::Text(text) => AttarMetric { kind: ATTAR_METRIC_TEXT, text: str_of(text), ..base },
            }
        };
        let values: Vec<AttarMetric> = values.iter().map(metric).collect();
        call!(self.metric(str_of(subject), values.as_ptr(), values.len()))
    }

    fn rewrite(&mut self, site: &str) -> Result<bool> {
        let mut allowed = 0;
        call!(self.rewrite(str_of(site), &raw mut allowed))?;
        Ok(allowed != 0)
    }

    fn seed(&mut self) -> Result<u64> {
        let mut seed = 0;
        call!(self.seed(&raw mut seed))?;
        Ok(seed)
    }

    fn release(&mut self, buffer: u64) -> Result<()> {
        call!(self.release(buffer))
    }

    fn graph_text(&mut self) -> Result<String> {
        let mut text = EMPTY;
        call!(self.graph_text(&raw mut text))?;
        // SAFETY: the text lives until the run ends; so for all texts of the host below.
        Ok(unsafe { text_of(text) })
    }

    fn nodes(&mut self) -> Result<Vec<Node>> {
        let nodes = list(0, |out, capacity, count| call!(self.nodes(out, capacity, count)))?;
        Ok(nodes.into_iter().map(Node).collect())
    }

    fn inputs(&mut self) -> Result<Vec<Value>> {
        let values = list(0, |out, capacity, count| call!(self.inputs(out, capacity, count)))?;
        Ok(values.into_iter().map(Value).collect())
    }

    fn outputs(&mut self) -> Result<Vec<Value>> {
        let values = list(0, |out, capacity, count| call!(self.outputs(out, capacity, count)))?;
        Ok(values.into_iter().map(Value).collect())
    }

    fn set_outputs(&mut self, values: &[Value]) -> Result<()> {
        let values = numbers_of(values);
        call!(self.set_outputs(values.as_ptr(), values.len()))
    }

    fn node_by_name(&mut self, name: &str) -> Result<Node> {
        let mut node = 0;
        call!(self.node_by_name(str_of(name), &raw mut node))?;
        Ok(Node(node))
    }

    fn node_info(&mut self, node: Node) -> Result<NodeInfo> {
        let mut info =
            AttarNodeInfo { op: EMPTY, name: EMPTY, target: EMPTY, inputs: 0, outputs: 0, attrs: 0 };
        call!(self.node_info(node.0, &raw mut info))?;
        // SAFETY: as above.
        let (op, name, target) = unsafe { (text_of(info.op), text_of(info.name), text_of(info.target)) };
        Ok(NodeInfo {
            op,
            name,
            target,
            inputs: info.inputs as usize,
            outputs: info.outputs as usize,
            attrs: info.attrs as usize,
        })
    }

    fn node_inputs(&mut self, node: Node) -> Result<Vec<Value>> {
        let values = list(0, |out, capacity, count| call!(self.node_inputs(node.0, out, capacity, count)))?;
        Ok(values.into_iter().map(Value).collect())
    }

    fn node_output(&mut self, node: Node, slot: usize) -> Result<Value> {
        let mut value = 0;
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        call!(self.node_output(node.0, slot, &raw mut value))?;
        Ok(Value(value))
    }

    fn node_attr(&mut self, node: Node, index: usize) -> Result<(String, Attr)> {
        let mut attr = NO_ATTR;
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        call!(self.node_attr(node.0, index, &raw mut attr))?;
        // SAFETY: what an attribute of the host points to lives until the run ends.
        Ok(unsafe { (text_of(attr.name), attr_from(&attr)) })
    }

    fn value_node(&mut self, value: Value) -> Result<Node> {
        let mut node = 0;
        call!(self.value_node(value.0, &raw mut node))?;
        Ok(Node(node))
    }

    fn value_type(&mut self, value: Value) -> Result<Type> {
        let mut ty = AttarType { elem: EMPTY, rank: 0, dims: [0; ATTAR_MAX_RANK] };
        call!(self.value_type(value.0, &raw mut ty))?;
        let dims = ty.dims.iter().take(ty.rank as usize).map(|d| dim_of(*d)).collect();
        // SAFETY: as above.
        Ok(Type { elem: unsafe { text_of(ty.elem) }, dims })
    }

    fn value_uses(&mut self, value: Value) -> Result<Vec<(Node, usize)>> {
        let none = AttarUse { node: 0, slot: 0 };
        let uses = list(none, |out, capacity, count| call!(self.value_uses(value.0, out, capacity, count)))?;
        Ok(uses.into_iter().map(|u| (Node(u.node), u.slot as usize)).collect())
    }

    fn add_node(&mut self, op: &str, name: &str, inputs: &[Value], attrs: &[(&str, Attr)]) -> Result<Node> {
        let inputs = numbers_of(inputs);
        let dims = |attr: &Attr| match attr {
            Attr::Dims(dims) => dims.iter().map(|d| dim_number(*d)).collect(),
            _ => Vec::new(),
        };
        let dims: Vec<Vec<i64>> = attrs.iter().map(|(_, a)| dims(a)).collect();
        let attrs: Vec<AttarAttr> =
            attrs.iter().zip(&dims).map(|((name, attr), dims)| attr_of(name, attr, dims)).collect();
        let mut node: AttarNode = 0;
        call!(self.add_node(
            str_of(op),
            str_of(name),
            inputs.as_ptr(),
            inputs.len(),
            attrs.as_ptr(),
            attrs.len(),
            &raw mut node
        ))?;
        Ok(Node(node))
    }

    fn add_weight(&mut self, tensor: &str) -> Result<Value> {
        let mut value = 0;
        call!(self.add_weight(str_of(tensor), &raw mut value))?;
        Ok(Value(value))
    }

    fn replace_uses(&mut self, old: Value, new: Value) -> Result<()> {
        call!(self.replace_uses(old.0, new.0))
    }

    fn remove_node(&mut self, node: Node) -> Result<()> {
        call!(self.remove_node(node.0))
    }

    fn custom_begin(&mut self, name: &str, inputs: &[Value]) -> Result<Vec<Value>> {
        let inputs = numbers_of(inputs);
        let mut inside = vec![0; inputs.len()];
        call!(self.custom_begin(str_of(name), inputs.as_ptr(), inputs.len(), inside.as_mut_ptr()))?;
        Ok(inside.into_iter().map(Value).collect())
    }

    fn custom_end(&mut self, outputs: &[Value]) -> Result<Node> {
        let outputs = numbers_of(outputs);
        let mut node = 0;
        call!(self.custom_end(outputs.as_ptr(), outputs.len(), &raw mut node))?;
        Ok(Node(node))
    }

    fn tensors(&mut self, all: bool) -> Result<Vec<String>> {
        let names =
            list(EMPTY, |out, capacity, count| call!(self.tensors(u32::from(all), out, capacity, count)))?;
        // SAFETY: as above.
        Ok(names.into_iter().map(|name| unsafe { text_of(name) }).collect())
    }

    fn tensor_info(&mut self, tensor: &str) -> Result<TensorInfo> {
        let mut info = AttarTensorInfo {
            elem: EMPTY,
            stored_as: EMPTY,
            rank: 0,
            is_explicit: 0,
            shape: [0; ATTAR_MAX_RANK],
        };
        call!(self.tensor_info(str_of(tensor), &raw mut info))?;
        // SAFETY: as above.
        let (elem, stored_as) = unsafe { (text_of(info.elem), text_of(info.stored_as)) };
        let shape = info.shape.iter().take(info.rank as usize).map(|d| *d as usize).collect();
        Ok(TensorInfo { shape, elem, stored_as, is_explicit: info.is_explicit != 0 })
    }

    fn tensor_read(&mut self, tensor: &str, first: u64, rows: u64) -> Result<Held<f32>> {
        let mut values = AttarFloats { data: std::ptr::null(), len: 0, buffer: 0 };
        call!(self.tensor_read(str_of(tensor), first, rows, &raw mut values))?;
        Ok(Held { data: values.data, len: values.len, buffer: values.buffer })
    }

    fn tensor_edit(&mut self, tensor: &str) -> Result<HeldMut> {
        let mut values = AttarEdit { data: std::ptr::null_mut(), len: 0, buffer: 0 };
        call!(self.tensor_edit(str_of(tensor), &raw mut values))?;
        Ok(HeldMut { data: values.data, len: values.len, buffer: values.buffer })
    }

    fn tensor_create(&mut self, tensor: &str, shape: &[usize]) -> Result<HeldMut> {
        let mut values = AttarEdit { data: std::ptr::null_mut(), len: 0, buffer: 0 };
        let shape: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
        call!(self.tensor_create(str_of(tensor), shape.as_ptr(), shape.len(), &raw mut values))?;
        Ok(HeldMut { data: values.data, len: values.len, buffer: values.buffer })
    }

    fn tensor_commit(&mut self, buffer: u64) -> Result<()> {
        call!(self.tensor_commit(buffer))
    }

    fn tensor_set_format(&mut self, tensor: &str, format: &str, importance: Option<&[f32]>) -> Result<f64> {
        let mut error = 0.0;
        let (data, len) = importance.map_or((std::ptr::null(), 0), |i| (i.as_ptr(), i.len()));
        call!(self.tensor_set_format(str_of(tensor), str_of(format), data, len, &raw mut error))?;
        Ok(error)
    }

    fn tensor_set_codes(&mut self, tensor: &str, codes: &Encoded<'_>) -> Result<()> {
        let (table, table_len, shift) =
            codes.table.map_or((std::ptr::null(), 0, 0), |(t, shift)| (t.as_ptr(), t.len(), shift));
        let codes = AttarCodes {
            format: str_of(codes.format),
            n: codes.n as u64,
            k: codes.k as u64,
            codes: codes.codes.as_ptr(),
            codes_len: codes.codes.len(),
            fields: codes.fields.as_ptr(),
            fields_len: codes.fields.len(),
            row_scales: codes.row_scales.as_ptr(),
            row_scales_len: codes.row_scales.len(),
            table,
            table_len,
            shift: i32::from(shift),
        };
        call!(self.tensor_set_codes(str_of(tensor), &raw const codes))
    }

    fn format_info(&mut self, name: &str) -> Result<FormatInfo> {
        let mut format = AttarFormat {
            name: EMPTY,
            source: EMPTY,
            codes: 0,
            bits: 0,
            group: 0,
            scale: 0,
            bias: 0,
            choice_bits: 0,
            entries: std::ptr::null(),
            entries_len: 0,
            shift: 0,
        };
        call!(self.format_info(str_of(name), &raw mut format))?;
        // SAFETY: formats of the host stay as they are until it ends.
        let (name, source, entries) = unsafe {
            (text_of(format.name), text_of(format.source), copied(format.entries, format.entries_len))
        };
        let kind = match format.codes {
            ATTAR_CODES_FLOAT => FormatKind::Float,
            ATTAR_CODES_INT8 => FormatKind::Int8,
            _ => FormatKind::Table { entries, shift: format.shift as i8 },
        };
        let has_rows = format.scale == ATTAR_SCALE_ROW_F32_FIELD8;
        Ok(FormatInfo {
            name,
            source,
            bits: format.bits as usize,
            group: format.group as usize,
            kind,
            row_fields: has_rows.then_some((format.bias, format.choice_bits)),
        })
    }

    fn statistics(&mut self, value: Value) -> Result<HeldStatistics> {
        let mut s = AttarStatistics {
            n_tokens: 0,
            width: 0,
            second_moment: std::ptr::null(),
            minimum: std::ptr::null(),
            maximum: std::ptr::null(),
            buffer: 0,
        };
        call!(self.statistics(value.0, &raw mut s))?;
        Ok(HeldStatistics {
            n_tokens: s.n_tokens,
            width: s.width as usize,
            second_moment: s.second_moment,
            minimum: s.minimum,
            maximum: s.maximum,
            buffer: s.buffer,
        })
    }

    fn calibration_window(&mut self, index: usize) -> Result<(Held<u32>, usize)> {
        let mut tokens = AttarTokens { data: std::ptr::null(), len: 0, buffer: 0 };
        let mut count = 0;
        call!(self.calibration_window(index, &raw mut tokens, &raw mut count))?;
        Ok((Held { data: tokens.data, len: tokens.len, buffer: tokens.buffer }, count))
    }

    fn tokenize(&mut self, text: &str) -> Result<Held<u32>> {
        let mut tokens = AttarTokens { data: std::ptr::null(), len: 0, buffer: 0 };
        call!(self.tokenize(str_of(text), &raw mut tokens))?;
        Ok(Held { data: tokens.data, len: tokens.len, buffer: tokens.buffer })
    }

    fn run_model(&mut self, tokens: &[u32], value: Option<Value>) -> Result<Held<f32>> {
        let mut values = AttarFloats { data: std::ptr::null(), len: 0, buffer: 0 };
        let value = value.map_or(0, |v| v.0);
        call!(self.run_model(tokens.as_ptr(), tokens.len(), value, &raw mut values))?;
        Ok(Held { data: values.data, len: values.len, buffer: values.buffer })
    }

    fn refused(&mut self, subject: &str, reason: &str) -> Result<()> {
        call!(self.refused(str_of(subject), str_of(reason)))
    }

    fn replace_node(&mut self, node: Node, values: &[Value]) -> Result<()> {
        let values = numbers_of(values);
        call!(self.replace_node(node.0, values.as_ptr(), values.len()))
    }

    fn remove_unused(&mut self, node: Node) -> Result<()> {
        call!(self.remove_unused(node.0))
    }

    fn node_evaluate(&mut self, node: Node, tensor: &str) -> Result<()> {
        call!(self.node_evaluate(node.0, str_of(tensor)))
    }

    fn tensor_stack(&mut self, tensor: &str, parts: &[&str]) -> Result<bool> {
        let parts: Vec<AttarStr> = parts.iter().map(|p| str_of(p)).collect();
        let mut stacked = 0;
        call!(self.tensor_stack(str_of(tensor), parts.as_ptr(), parts.len(), &raw mut stacked))?;
        Ok(stacked != 0)
    }
}
