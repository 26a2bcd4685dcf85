//! The table of the host's functions: each reads what the plugin gave, asks the run's [`GraphHost`], and writes the answer.
//!
//! [`GraphHost`]: attar_pass::plugin::GraphHost

use crate::session::{answer, give, give_list, last_message, list_in, text_in};
use attar_plugin::abi::*;
use attar_plugin::host::{FormatKind, Held};
use attar_plugin::remote::dim_number;
use attar_plugin::{Attr, Dim, Encoded, Error, ErrorKind, Host, Level, Metric, Node, Result, Value};

/// Longest list of values, attributes or metrics.
const MOST_LIST: usize = 1 << 16;
/// Most tokens of a call.
const MOST_TOKENS: usize = 1 << 20;

/// The host's table. Functions are documented where [`AttarHost`] is.
pub static HOST: AttarHost = AttarHost {
    size: size_of::<AttarHost>() as u32,
    abi_major: ATTAR_ABI_MAJOR,
    abi_minor: ATTAR_ABI_MINOR,
    last_error: Some(last_error),
    fail: Some(fail),
    log: Some(log),
    progress: Some(progress),
    metric: Some(metric),
    rewrite: Some(rewrite),
    seed: Some(seed),
    release: Some(release),
    graph_text: Some(graph_text),
    nodes: Some(nodes),
    inputs: Some(inputs),
    outputs: Some(outputs),
    set_outputs: Some(set_outputs),
    node_by_name: Some(node_by_name),
    node_info: Some(node_info),
    node_inputs: Some(node_inputs),
    node_output: Some(node_output),
    node_attr: Some(node_attr),
    value_node: Some(value_node),
    value_type: Some(value_type),
    value_uses: Some(value_uses),
    add_node: Some(add_node),
    add_weight: Some(add_weight),
    replace_uses: Some(replace_uses),
    remove_node: Some(remove_node),
    custom_begin: Some(custom_begin),
    custom_end: Some(custom_end),
    tensors: Some(tensors),
    tensor_info: Some(tensor_info),
    tensor_read: Some(tensor_read),
    tensor_edit: Some(tensor_edit),
    tensor_create: Some(tensor_create),
    tensor_commit: Some(tensor_commit),
    tensor_set_format: Some(tensor_set_format),
    tensor_set_codes: Some(tensor_set_codes),
    format_info: Some(format_info),
    statistics: Some(statistics),
    calibration_window: Some(calibration_window),
    tokenize: Some(tokenize),
    run_model: Some(run_model),
    refused: Some(refused),
    replace_node: Some(replace_node),
    remove_unused: Some(remove_unused),
    node_evaluate: Some(node_evaluate),
    tensor_stack: Some(tensor_stack),
};

/// How many functions the table has.
pub const FUNCTIONS: usize = (size_of::<AttarHost>() - 8) / size_of::<usize>();

fn values_in(values: &[AttarValue]) -> Vec<Value> {
    values.iter().map(|v| Value::from_number(*v)).collect()
}

fn numbers_of(values: Vec<Value>) -> Vec<u64> {
    values.into_iter().map(Value::number).collect()
}

fn misuse(problem: String) -> Error {
    Error::of(ErrorKind::Misuse, problem)
}

unsafe extern "C" fn last_error(message: *mut AttarStr) -> AttarStatus {
    // SAFETY: plugins give what the header asks for: null, or an address that is valid for the access named there. All
    // functions below trust that, after they have looked for null, alignment and lengths that cannot be.
    match unsafe { give("message", message, last_message()) } {
        Ok(()) => ATTAR_OK,
        Err(_) => ATTAR_MISUSE,
    }
}

/// Defines functions of the table: the name is that of the call, and `$s` the session.
macro_rules! functions {
    ($(fn $name:ident($($argument:ident : $ty:ty),* $(,)?) |$s:ident| $body:block)*) => {
        $(
            unsafe extern "C" fn $name(run: AttarRun, $($argument: $ty),*) -> AttarStatus {
                #[allow(unused_unsafe, reason = "some functions are given numbers alone")]
                // SAFETY: see `last_error`.
                answer(stringify!($name), run, |$s| unsafe { $body })
            }
        )*
    };
}

functions! {
    fn fail(message: AttarStr) |s| {
        s.host.fail(text_in("message", message)?)
    }

    fn log(level: u32, message: AttarStr) |s| {
        let level = match level {
            ATTAR_LOG_DEBUG => Level::Debug,
            ATTAR_LOG_INFO => Level::Info,
            ATTAR_LOG_WARNING => Level::Warning,
            other => return Err(misuse(format!("level: {other} is none"))),
        };
        s.host.log(level, text_in("message", message)?)
    }

    fn progress(what: AttarStr, done: u64, total: u64) |s| {
        s.host.progress(text_in("what", what)?, done, total)
    }

    fn metric(subject: AttarStr, values: *const AttarMetric, values_len: usize) |s| {
        let subject = text_in("subject", subject)?;
        let mut all = Vec::new();
        for m in list_in("values", values, values_len, MOST_LIST)? {
            let value = match m.kind {
                ATTAR_METRIC_COUNT => Metric::Count(m.count),
                ATTAR_METRIC_NUMBER => Metric::Number(m.number),
                ATTAR_METRIC_TEXT => Metric::Text(text_in("text of a metric", m.text)?.to_owned()),
                other => return Err(misuse(format!("kind of a metric: {other} is none"))),
            };
            all.push((text_in("name of a metric", m.name)?, value));
        }
        s.host.metric(subject, &all)
    }

    fn rewrite(site: AttarStr, allowed: *mut u32) |s| {
        let yes = s.host.rewrite(text_in("site", site)?)?;
        give("allowed", allowed, u32::from(yes))
    }

    fn seed(seed: *mut u64) |s| {
        let value = s.host.seed()?;
        give("seed", seed, value)
    }

    fn release(buffer: AttarBuffer) |s| {
        s.host.release(buffer)
    }

    fn graph_text(text: *mut AttarStr) |s| {
        let printed = s.host.graph_text()?;
        let kept = s.text(&printed);
        give("text", text, kept)
    }

    fn nodes(nodes: *mut AttarNode, capacity: usize, count: *mut usize) |s| {
        let all: Vec<u64> = s.host.nodes()?.into_iter().map(Node::number).collect();
        give_list("nodes", (nodes, capacity), count, &all)
    }

    fn inputs(values: *mut AttarValue, capacity: usize, count: *mut usize) |s| {
        let all = numbers_of(s.host.inputs()?);
        give_list("values", (values, capacity), count, &all)
    }

    fn outputs(values: *mut AttarValue, capacity: usize, count: *mut usize) |s| {
        let all = numbers_of(s.host.outputs()?);
        give_list("values", (values, capacity), count, &all)
    }

    fn set_outputs(values: *const AttarValue, len: usize) |s| {
        let values = values_in(list_in("values", values, len, MOST_LIST)?);
        s.host.set_outputs(&values)
    }

    fn node_by_name(name: AttarStr, node: *mut AttarNode) |s| {
        let found = s.host.node_by_name(text_in("name", name)?)?;
        give("node", node, found.number())
    }

    fn node_info(node: AttarNode, info: *mut AttarNodeInfo) |s| {
        let i = s.host.node_info(Node::from_number(node))?;
        let (op, name, target) = (s.text(&i.op), s.text(&i.name), s.text(&i.target));
        let (inputs, outputs, attrs) = (i.inputs as u32, i.outputs as u32, i.attrs as u32);
        give("info", info, AttarNodeInfo { op, name, target, inputs, outputs, attrs })
    }

    fn node_inputs(node: AttarNode, values: *mut AttarValue, capacity: usize, count: *mut usize) |s| {
        let all = numbers_of(s.host.node_inputs(Node::from_number(node))?);
        give_list("values", (values, capacity), count, &all)
    }

    fn node_output(node: AttarNode, slot: u32, value: *mut AttarValue) |s| {
        let found = s.host.node_output(Node::from_number(node), slot as usize)?;
        give("value", value, found.number())
    }

    fn node_attr(node: AttarNode, index: u32, attr: *mut AttarAttr) |s| {
        let (name, value) = s.host.node_attr(Node::from_number(node), index as usize)?;
        let mut out = AttarAttr {
            name: s.text(&name),
            kind: ATTAR_ATTR_BOOL,
            integer: 0,
            number: 0.0,
            text: s.text(""),
            numbers: std::ptr::null(),
            dims: std::ptr::null(),
            len: 0,
        };
        match &value {
            Attr::Bool(v) => out.integer = i64::from(*v),
            Attr::Int(v) => (out.kind, out.integer) = (ATTAR_ATTR_INT, *v),
            Attr::Float(v) => (out.kind, out.number) = (ATTAR_ATTR_FLOAT, *v),
            Attr::Text(v) => (out.kind, out.text) = (ATTAR_ATTR_TEXT, s.text(v)),
            Attr::Floats(v) => {
                (out.kind, out.len) = (ATTAR_ATTR_FLOATS, v.len());
                out.numbers = s.words(v.iter().map(|x| x.to_bits())).cast();
            }
            Attr::Dims(v) => {
                (out.kind, out.len) = (ATTAR_ATTR_DIMS, v.len());
                out.dims = s.words(v.iter().map(|d| dim_number(*d) as u64)).cast();
            }
        }
        give("attr", attr, out)
    }

    fn value_node(value: AttarValue, node: *mut AttarNode) |s| {
        let found = s.host.value_node(Value::from_number(value))?;
        give("node", node, found.number())
    }

    fn value_type(value: AttarValue, ty: *mut AttarType) |s| {
        let found = s.host.value_type(Value::from_number(value))?;
        let mut dims = [0; ATTAR_MAX_RANK];
        dims.iter_mut().zip(&found.dims).for_each(|(to, dim)| *to = dim_number(*dim));
        let elem = s.text(&found.elem);
        give("ty", ty, AttarType { elem, rank: found.dims.len().min(ATTAR_MAX_RANK) as u32, dims })
    }

    fn value_uses(value: AttarValue, uses: *mut AttarUse, capacity: usize, count: *mut usize) |s| {
        let all = s.host.value_uses(Value::from_number(value))?;
        let all: Vec<AttarUse> =
            all.into_iter().map(|(n, slot)| AttarUse { node: n.number(), slot: slot as u32 }).collect();
        give_list("uses", (uses, capacity), count, &all)
    }

    fn add_node(
        op: AttarStr,
        name: AttarStr,
        inputs: *const AttarValue,
        inputs_len: usize,
        attrs: *const AttarAttr,
        attrs_len: usize,
        node: *mut AttarNode,
    ) |s| {
        let (op, name) = (text_in("op", op)?, text_in("name", name)?);
        let inputs = values_in(list_in("inputs", inputs, inputs_len, MOST_LIST)?);
        let mut all = Vec::new();
        for attr in list_in("attrs", attrs, attrs_len, MOST_LIST)? {
            all.push((text_in("name of an attribute", attr.name)?, attr_in(attr)?));
        }
        let added = s.host.add_node(op, name, &inputs, &all)?;
        give("node", node, added.number())
    }

    fn add_weight(tensor: AttarStr, value: *mut AttarValue) |s| {
        let added = s.host.add_weight(text_in("tensor", tensor)?)?;
        give("value", value, added.number())
    }

    fn replace_uses(old: AttarValue, new: AttarValue) |s| {
        s.host.replace_uses(Value::from_number(old), Value::from_number(new))
    }

    fn remove_node(node: AttarNode) |s| {
        s.host.remove_node(Node::from_number(node))
    }

    fn custom_begin(
        name: AttarStr,
        inputs: *const AttarValue,
        inputs_len: usize,
        body_inputs: *mut AttarValue,
    ) |s| {
        let inputs = values_in(list_in("inputs", inputs, inputs_len, MOST_LIST)?);
        let inside = numbers_of(s.host.custom_begin(text_in("name", name)?, &inputs)?);
        let mut count = 0;
        give_list("body_inputs", (body_inputs, inside.len()), &raw mut count, &inside)
    }

    fn custom_end(outputs: *const AttarValue, outputs_len: usize, node: *mut AttarNode) |s| {
        let outputs = values_in(list_in("outputs", outputs, outputs_len, MOST_LIST)?);
        let added = s.host.custom_end(&outputs)?;
        give("node", node, added.number())
    }

    fn tensors(all: u32, names: *mut AttarStr, capacity: usize, count: *mut usize) |s| {
        let found = s.host.tensors(all != 0)?;
        let found: Vec<AttarStr> = found.iter().map(|name| s.text(name)).collect();
        give_list("names", (names, capacity), count, &found)
    }

    fn tensor_info(tensor: AttarStr, info: *mut AttarTensorInfo) |s| {
        let found = s.host.tensor_info(text_in("tensor", tensor)?)?;
        let mut shape = [0; ATTAR_MAX_RANK];
        shape.iter_mut().zip(&found.shape).for_each(|(to, d)| *to = *d as u64);
        let (elem, stored_as) = (s.text(&found.elem), s.text(&found.stored_as));
        let rank = found.shape.len().min(ATTAR_MAX_RANK) as u32;
        let is_explicit = u32::from(found.is_explicit);
        give("info", info, AttarTensorInfo { elem, stored_as, rank, is_explicit, shape })
    }

    fn tensor_read(tensor: AttarStr, first: u64, rows: u64, values: *mut AttarFloats) |s| {
        let held = s.host.tensor_read(text_in("tensor", tensor)?, first, rows)?;
        give("values", values, floats(held))
    }

    fn tensor_edit(tensor: AttarStr, values: *mut AttarEdit) |s| {
        let held = s.host.tensor_edit(text_in("tensor", tensor)?)?;
        give("values", values, AttarEdit { data: held.data, len: held.len, buffer: held.buffer })
    }

    fn tensor_create(tensor: AttarStr, shape: *const u64, rank: usize, values: *mut AttarEdit) |s| {
        let shape = list_in("shape", shape, rank, ATTAR_MAX_RANK)?;
        let shape: Vec<usize> = shape.iter().map(|d| usize::try_from(*d).unwrap_or(usize::MAX)).collect();
        let held = s.host.tensor_create(text_in("tensor", tensor)?, &shape)?;
        give("values", values, AttarEdit { data: held.data, len: held.len, buffer: held.buffer })
    }

    fn tensor_commit(buffer: AttarBuffer) |s| {
        s.host.tensor_commit(buffer)
    }

    fn tensor_set_format(
        tensor: AttarStr,
        format: AttarStr,
        importance: *const f32,
        importance_len: usize,
        relative_error: *mut f64,
    ) |s| {
        let (tensor, format) = (text_in("tensor", tensor)?, text_in("format", format)?);
        let width = s.host.tensor_info(tensor)?.shape.get(1).copied().unwrap_or(0);
        if importance_len != 0 && importance_len != width {
            let problem = format!("importance: tensor {tensor} has {width} columns, got {importance_len} numbers");
            return Err(misuse(problem));
        }
        let importance = list_in("importance", importance, importance_len, width)?;
        let importance = (!importance.is_empty()).then_some(importance);
        let error = s.host.tensor_set_format(tensor, format, importance)?;
        give("relative_error", relative_error, error)
    }

    fn tensor_set_codes(tensor: AttarStr, codes: *const AttarCodes) |s| {
        let tensor = text_in("tensor", tensor)?;
        let [c] = list_in("codes", codes, 1, 1)? else { return Err(misuse("codes: none".to_owned())) };
        let format = text_in("format", c.format)?;
        // Lengths are checked against the tensor before anything is read.
        let layout = s.host.format_info(format)?;
        let shape = s.host.tensor_info(tensor)?.shape;
        let [n, k] = shape[..] else {
            return Err(Error::new(format!("tensor {tensor} is no matrix; only matrices are stored in formats")));
        };
        let size = n * k;
        let (code_bytes, has_groups) = match layout.kind {
            FormatKind::Float => (layout.bits / 8, false),
            FormatKind::Int8 | FormatKind::Table { .. } => (1, true),
        };
        let entries = match &layout.kind {
            FormatKind::Table { entries, .. } => entries.len(),
            _ => 0,
        };
        let expected = [
            ("n", n, c.n as usize),
            ("k", k, c.k as usize),
            ("codes", size * code_bytes, c.codes_len),
            ("fields", if has_groups { size / layout.group.max(1) } else { 0 }, c.fields_len),
            ("row_scales", if layout.row_fields.is_some() { n } else { 0 }, c.row_scales_len),
            ("table", if c.table_len == 0 { 0 } else { entries }, c.table_len),
        ];
        for (what, expected, got) in expected {
            if expected != got {
                let problem = format!("{what}: {format} for tensor {tensor} wants {expected}, got {got}");
                return Err(misuse(problem));
            }
        }
        let Ok(shift) = i8::try_from(c.shift) else {
            return Err(misuse(format!("shift: {} is no signed byte", c.shift)));
        };
        let table = list_in("table", c.table, c.table_len, entries)?;
        let encoded = Encoded {
            format,
            n,
            k,
            codes: list_in("codes", c.codes, c.codes_len, c.codes_len)?,
            fields: list_in("fields", c.fields, c.fields_len, c.fields_len)?,
            row_scales: list_in("row_scales", c.row_scales, c.row_scales_len, c.row_scales_len)?,
            table: (!table.is_empty()).then_some((table, shift)),
        };
        s.host.tensor_set_codes(tensor, &encoded)
    }

    fn format_info(name: AttarStr, format: *mut AttarFormat) |s| {
        let f = s.host.format_info(text_in("name", name)?)?;
        let (codes, entries, shift) = match &f.kind {
            FormatKind::Float => (ATTAR_CODES_FLOAT, &[][..], 0),
            FormatKind::Int8 => (ATTAR_CODES_INT8, &[][..], 0),
            FormatKind::Table { entries, shift } => (ATTAR_CODES_TABLE, &entries[..], *shift),
        };
        let scale = match (&f.kind, f.row_fields) {
            (FormatKind::Float, _) => ATTAR_SCALE_NONE,
            (_, Some(_)) => ATTAR_SCALE_ROW_F32_FIELD8,
            (_, None) => ATTAR_SCALE_BF16,
        };
        let (bias, choice_bits) = f.row_fields.unwrap_or((0, 0));
        let out = AttarFormat {
            name: s.text(&f.name),
            source: s.text(&f.source),
            codes,
            bits: f.bits as u32,
            group: f.group as u32,
            scale,
            bias,
            choice_bits,
            entries: s.bytes(entries),
            entries_len: entries.len(),
            shift: i32::from(shift),
        };
        give("format", format, out)
    }

    fn statistics(value: AttarValue, statistics: *mut AttarStatistics) |s| {
        let held = s.host.statistics(Value::from_number(value))?;
        let out = AttarStatistics {
            n_tokens: held.n_tokens,
            width: held.width as u64,
            second_moment: held.second_moment,
            minimum: held.minimum,
            maximum: held.maximum,
            buffer: held.buffer,
        };
        give("statistics", statistics, out)
    }

    fn calibration_window(index: usize, tokens: *mut AttarTokens, count: *mut usize) |s| {
        let (held, windows) = s.host.calibration_window(index)?;
        give("tokens", tokens, tokens_of(held))?;
        give("count", count, windows)
    }

    fn tokenize(text: AttarStr, tokens: *mut AttarTokens) |s| {
        let held = s.host.tokenize(text_in("text", text)?)?;
        give("tokens", tokens, tokens_of(held))
    }

    fn run_model(tokens: *const u32, tokens_len: usize, value: AttarValue, values: *mut AttarFloats) |s| {
        let tokens = list_in("tokens", tokens, tokens_len, MOST_TOKENS)?;
        let value = (value != 0).then_some(Value::from_number(value));
        let held = s.host.run_model(tokens, value)?;
        give("values", values, floats(held))
    }

    fn refused(subject: AttarStr, reason: AttarStr) |s| {
        s.host.refused(text_in("subject", subject)?, text_in("reason", reason)?)
    }

    fn replace_node(node: AttarNode, values: *const AttarValue, values_len: usize) |s| {
        let values = values_in(list_in("values", values, values_len, MOST_LIST)?);
        s.host.replace_node(Node::from_number(node), &values)
    }

    fn remove_unused(node: AttarNode) |s| {
        s.host.remove_unused(Node::from_number(node))
    }

    fn node_evaluate(node: AttarNode, tensor: AttarStr) |s| {
        s.host.node_evaluate(Node::from_number(node), text_in("tensor", tensor)?)
    }

    fn tensor_stack(tensor: AttarStr, parts: *const AttarStr, parts_len: usize, stacked: *mut u32) |s| {
        let mut names = Vec::new();
        for part in list_in("parts", parts, parts_len, MOST_LIST)? {
            names.push(text_in("part", *part)?);
        }
        let done = s.host.tensor_stack(text_in("tensor", tensor)?, &names)?;
        give("stacked", stacked, u32::from(done))
    }
}

fn floats(held: Held<f32>) -> AttarFloats {
    AttarFloats { data: held.data, len: held.len, buffer: held.buffer }
}

fn tokens_of(held: Held<u32>) -> AttarTokens {
    AttarTokens { data: held.data, len: held.len, buffer: held.buffer }
}

/// An attribute of a plugin.
///
/// # Safety
/// As [`list_in`] for what it points to.
unsafe fn attr_in(attr: &AttarAttr) -> Result<Attr> {
    let dim = |d: &i64| match *d {
        ATTAR_DIM_TOKENS => Ok(Dim::Tokens),
        ATTAR_DIM_ROWS => Ok(Dim::Rows),
        ATTAR_DIM_CONTEXT => Ok(Dim::Context),
        n => usize::try_from(n).map(Dim::Fixed).map_err(|_| misuse(format!("{n} is no dimension"))),
    };
    // SAFETY: as the caller promises; so for the next two.
    Ok(match attr.kind {
        ATTAR_ATTR_BOOL => Attr::Bool(attr.integer != 0),
        ATTAR_ATTR_INT => Attr::Int(attr.integer),
        ATTAR_ATTR_FLOAT => Attr::Float(attr.number),
        // SAFETY: as the caller promises; so below.
        ATTAR_ATTR_TEXT => Attr::Text(unsafe { text_in("text of an attribute", attr.text)? }.to_owned()),
        ATTAR_ATTR_FLOATS => {
            // SAFETY: as above.
            Attr::Floats(
                unsafe { list_in("numbers of an attribute", attr.numbers, attr.len, MOST_LIST)? }.to_vec(),
            )
        }
        ATTAR_ATTR_DIMS => {
            // SAFETY: as above.
            let dims = unsafe { list_in("dims of an attribute", attr.dims, attr.len, ATTAR_MAX_RANK)? };
            Attr::Dims(dims.iter().map(dim).collect::<Result<_>>()?)
        }
        other => return Err(misuse(format!("kind of an attribute: {other} is none"))),
    })
}
