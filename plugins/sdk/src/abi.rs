//! The C interface between Attar and a plugin. `include/attar_plugin.h` is generated from this file.
//!
//! A plugin is a shared library with one exported function, [`attar_plugin_entry`](crate::entry::attar_plugin_entry). It
//! takes the host's table of functions and returns a description of the plugin. What holds across the boundary:
//!
//! - Both structures begin with their size and version, and that never changes. Majors must be equal; within a major, the
//!   table grows at its end and nothing else changes, so each side checks `size` before it looks at what may not be there.
//! - Nodes, values and buffers are numbers. One that was never given out, or whose run has ended, is answered with
//!   [`ATTAR_MISUSE`]; it never does harm.
//! - Texts are UTF-8 with a length and without a zero at the end. What the plugin passes is read during the call and not kept,
//!   the description excepted, which must stay as long as the library is loaded. What the host gives lives until the
//!   run ends, or, where it comes with a buffer, until that is released.
//! - Functions return a status. Whatever is not [`ATTAR_OK`] has a message, see [`AttarHost::last_error`]; what a function gives
//!   is then not written. No function unwinds or aborts.
//! - All functions are to be called on the thread that runs the pass, while it runs.

use std::ffi::c_void;

/// Version of this interface: plugins and hosts of different majors do not work together.
pub const ATTAR_ABI_MAJOR: u16 = 1;
/// Number of times the table has grown within the major.
pub const ATTAR_ABI_MINOR: u16 = 1;

/// What a call came to.
pub type AttarStatus = i32;
/// It was done.
pub const ATTAR_OK: AttarStatus = 0;
/// It cannot be done; the message says why. A pass may go on.
pub const ATTAR_ERROR: AttarStatus = 1;
/// The plugin is wrong: a handle, a length or a pointer that cannot be. The pass fails, whatever it returns.
pub const ATTAR_MISUSE: AttarStatus = 2;
/// The user stops the compile; the pass is to return this status soon.
pub const ATTAR_CANCELLED: AttarStatus = 3;
/// What was asked for is not there in this compile: calibration, a tokenizer, or a function of a newer host.
pub const ATTAR_UNAVAILABLE: AttarStatus = 4;
/// The plugin, or the host, panicked.
pub const ATTAR_PANIC: AttarStatus = 5;

/// Dimensions of the largest shape.
pub const ATTAR_MAX_RANK: usize = 8;

/// The run of a pass. Over when the pass returns.
pub type AttarRun = u64;
/// A node of the graph. 0 is none.
pub type AttarNode = u64;
/// One output of a node. 0 is none.
pub type AttarValue = u64;
/// Memory of the host that the plugin may look at until it releases it. 0 is none.
pub type AttarBuffer = u64;

/// UTF-8 of a length, without a zero at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarStr {
    pub data: *const u8,
    pub len: usize,
}

/// Tokens in a step, as a dimension.
pub const ATTAR_DIM_TOKENS: i64 = -1;
/// Rows whose logits are wanted, as a dimension.
pub const ATTAR_DIM_ROWS: i64 = -2;
/// Length of the context, as a dimension.
pub const ATTAR_DIM_CONTEXT: i64 = -3;

/// Type of a value: an element (`f32`, `i32`, or a weight format) and dimensions, outermost first; negative ones are symbols.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarType {
    pub elem: AttarStr,
    pub rank: u32,
    pub dims: [i64; ATTAR_MAX_RANK],
}

/// `integer` is 0 or 1.
pub const ATTAR_ATTR_BOOL: u32 = 0;
/// `integer` holds the value.
pub const ATTAR_ATTR_INT: u32 = 1;
/// `number` holds the value.
pub const ATTAR_ATTR_FLOAT: u32 = 2;
/// `text` holds the value.
pub const ATTAR_ATTR_TEXT: u32 = 3;
/// `numbers` and `len` hold the value.
pub const ATTAR_ATTR_FLOATS: u32 = 4;
/// `dims` and `len` hold the value.
pub const ATTAR_ATTR_DIMS: u32 = 5;

/// An attribute of an op: a name and one of six kinds of value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarAttr {
    pub name: AttarStr,
    /// One of `ATTAR_ATTR_…`.
    pub kind: u32,
    pub integer: i64,
    pub number: f64,
    pub text: AttarStr,
    pub numbers: *const f64,
    pub dims: *const i64,
    pub len: usize,
}

/// What a node is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarNodeInfo {
    /// Name of the op, as the text form spells it: `linear`, `rms_norm`, `weight`, …
    pub op: AttarStr,
    /// Name of the node.
    pub name: AttarStr,
    /// The weight's name for a `weight` node, the custom op's for a `custom` node; else empty.
    pub target: AttarStr,
    pub inputs: u32,
    pub outputs: u32,
    pub attrs: u32,
}

/// A place where a value is taken.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarUse {
    pub node: AttarNode,
    pub slot: u32,
}

/// What is known of a weight tensor without reading it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarTensorInfo {
    /// `f32` until a pass has encoded it, then the name of its format.
    pub elem: AttarStr,
    /// The type in the checkpoint.
    pub stored_as: AttarStr,
    pub rank: u32,
    /// 1 when the recipe names the tensor without a wildcard: then what cannot be done is to be an error.
    pub is_explicit: u32,
    pub shape: [u64; ATTAR_MAX_RANK],
}

/// Numbers that the plugin may read.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarFloats {
    pub data: *const f32,
    pub len: usize,
    pub buffer: AttarBuffer,
}

/// Numbers that the plugin may change until it commits or releases them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarEdit {
    pub data: *mut f32,
    pub len: usize,
    pub buffer: AttarBuffer,
}

/// Tokens that the plugin may read.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarTokens {
    pub data: *const u32,
    pub len: usize,
    pub buffer: AttarBuffer,
}

/// Second moments and ranges of the rows `X` `[n_tokens, width]` that reach a value on calibration text.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarStatistics {
    pub n_tokens: u64,
    pub width: u64,
    /// `H = XᵀX`, `[width, width]`, symmetric; the sum over rows, not their mean.
    pub second_moment: *const f32,
    /// Least value of each column.
    pub minimum: *const f32,
    /// Greatest value of each column.
    pub maximum: *const f32,
    pub buffer: AttarBuffer,
}

/// `count` holds the value.
pub const ATTAR_METRIC_COUNT: u32 = 0;
/// `number` holds the value.
pub const ATTAR_METRIC_NUMBER: u32 = 1;
/// `text` holds the value.
pub const ATTAR_METRIC_TEXT: u32 = 2;

/// One measured value. The unit stands in its name.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarMetric {
    pub name: AttarStr,
    /// One of `ATTAR_METRIC_…`.
    pub kind: u32,
    pub count: u64,
    pub number: f64,
    pub text: AttarStr,
}

/// A matrix `[n, k]` in a format's codes, row by row.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarCodes {
    pub format: AttarStr,
    pub n: u64,
    pub k: u64,
    /// `[n, k]` codes, one byte each.
    pub codes: *const u8,
    pub codes_len: usize,
    /// `[n, k / group]` scale fields: the bits of a bf16, or a field byte.
    pub fields: *const u16,
    pub fields_len: usize,
    /// `[n]` scales of rows, for formats that have them; else none.
    pub row_scales: *const f32,
    pub row_scales_len: usize,
    /// The tensor's own table, `1 << bits` entries; none for the format's default.
    pub table: *const i8,
    pub table_len: usize,
    /// Added to each entry as often as a group's choice says; heeded with a table of its own.
    pub shift: i32,
}

/// Codes are signed bytes in -127..=127.
pub const ATTAR_CODES_INT8: u32 = 0;
/// Codes are indices of a table of signed bytes.
pub const ATTAR_CODES_TABLE: u32 = 1;
/// Elements are floating-point numbers, without scales.
pub const ATTAR_CODES_FLOAT: u32 = 2;

/// No scales.
pub const ATTAR_SCALE_NONE: u32 = 0;
/// One bf16 per group: `w = scale * code`.
pub const ATTAR_SCALE_BF16: u32 = 1;
/// One f32 per row and one byte per group, `field = (s << choice_bits) | choice`:
/// `w = row_scale * (s - bias) * (table[code] + choice * shift)`.
pub const ATTAR_SCALE_ROW_F32_FIELD8: u32 = 2;

/// The layout of a weight format: from it follow its size, encoder, decoder and kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarFormat {
    /// Lower-case letters, digits and `_`.
    pub name: AttarStr,
    /// Where the idea comes from.
    pub source: AttarStr,
    /// One of `ATTAR_CODES_…`.
    pub codes: u32,
    /// Bits of a code; 2 to 6 for tables.
    pub bits: u32,
    /// Weights along K that share a scale.
    pub group: u32,
    /// One of `ATTAR_SCALE_…`.
    pub scale: u32,
    /// Of [`ATTAR_SCALE_ROW_F32_FIELD8`].
    pub bias: i32,
    /// Of [`ATTAR_SCALE_ROW_F32_FIELD8`].
    pub choice_bits: u32,
    /// Of tables: `1 << bits` entries, ascending.
    pub entries: *const i8,
    pub entries_len: usize,
    pub shift: i32,
}

/// `integer` is 0 or 1.
pub const ATTAR_OPTION_BOOL: u32 = 0;
/// `integer` holds the value.
pub const ATTAR_OPTION_INT: u32 = 1;
/// `number` holds the value.
pub const ATTAR_OPTION_FLOAT: u32 = 2;
/// `text` holds the value, one of a list of words.
pub const ATTAR_OPTION_CHOICE: u32 = 3;
/// `text` holds the value, any text of one line.
pub const ATTAR_OPTION_TEXT: u32 = 4;

/// Value of an option, checked against its declaration.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarOptionValue {
    pub name: AttarStr,
    /// One of `ATTAR_OPTION_…`.
    pub kind: u32,
    pub integer: i64,
    pub number: f64,
    pub text: AttarStr,
}

/// Declaration of an option.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarOption {
    pub name: AttarStr,
    /// One sentence without a full stop.
    pub doc: AttarStr,
    /// One of `ATTAR_OPTION_…`.
    pub kind: u32,
    /// 0 for a choice that a recipe must make.
    pub has_default: u32,
    pub default_integer: i64,
    pub default_number: f64,
    pub default_text: AttarStr,
    pub min_integer: i64,
    pub max_integer: i64,
    pub min_number: f64,
    pub max_number: f64,
    pub choices: *const AttarStr,
    pub choices_len: usize,
}

/// Cleaning up without changing meaning.
pub const ATTAR_PHASE_CANONICALIZE: u32 = 0;
/// Making weights smaller.
pub const ATTAR_PHASE_COMPRESS: u32 = 1;
/// Joining ops that one kernel can do.
pub const ATTAR_PHASE_FUSE: u32 = 2;

/// Bit for bit the same values.
pub const ATTAR_NUMERICS_EXACT: u32 = 0;
/// The same function of real numbers, rounded otherwise.
pub const ATTAR_NUMERICS_ROUNDING: u32 = 1;
/// Another function, close to the first.
pub const ATTAR_NUMERICS_LOSSY: u32 = 2;

/// A pass of a plugin.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarPass {
    /// Verb first, with dashes.
    pub name: AttarStr,
    /// One sentence without a full stop.
    pub summary: AttarStr,
    /// Source file, or empty.
    pub file: AttarStr,
    /// One of `ATTAR_PHASE_…`.
    pub phase: u32,
    /// One of `ATTAR_NUMERICS_…`.
    pub numerics: u32,
    /// 1 when a recipe may say which tensors the pass concerns.
    pub takes_tensors: u32,
    pub options: *const AttarOption,
    pub options_len: usize,
    /// Given to `run` as it is.
    pub context: *const c_void,
    /// Runs the pass. `host` is the table that the entry function was given, `options` one value for each declared option, in
    /// order.
    pub run: Option<
        unsafe extern "C" fn(
            context: *const c_void,
            host: *const AttarHost,
            run: AttarRun,
            options: *const AttarOptionValue,
            options_len: usize,
        ) -> AttarStatus,
    >,
}

/// What a plugin is. Its entry function returns one that stays as long as the library is loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarPlugin {
    /// `sizeof(AttarPlugin)` where the plugin was compiled.
    pub size: u32,
    /// `ATTAR_ABI_MAJOR` where the plugin was compiled.
    pub abi_major: u16,
    /// `ATTAR_ABI_MINOR` where the plugin was compiled.
    pub abi_minor: u16,
    pub name: AttarStr,
    pub version: AttarStr,
    pub passes: *const AttarPass,
    pub passes_len: usize,
    pub formats: *const AttarFormat,
    pub formats_len: usize,
}

/// For developers.
pub const ATTAR_LOG_DEBUG: u32 = 0;
/// For users.
pub const ATTAR_LOG_INFO: u32 = 1;
/// For users who may want to do something about it.
pub const ATTAR_LOG_WARNING: u32 = 2;

/// The functions of the host. Where a function writes a list, it writes at most `capacity` elements and says in `count` how many
/// there are.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttarHost {
    /// `sizeof(AttarHost)` where the host was compiled: functions behind it are not there.
    pub size: u32,
    pub abi_major: u16,
    pub abi_minor: u16,

    /// Message of the last call on this thread that was not `ATTAR_OK`; valid until the next such call.
    pub last_error: Option<unsafe extern "C" fn(message: *mut AttarStr) -> AttarStatus>,
    /// Says why the pass is about to fail. The pass then returns `ATTAR_ERROR`.
    pub fail: Option<unsafe extern "C" fn(run: AttarRun, message: AttarStr) -> AttarStatus>,
    /// Tells the user something; `level` is one of `ATTAR_LOG_…`.
    pub log: Option<unsafe extern "C" fn(run: AttarRun, level: u32, message: AttarStr) -> AttarStatus>,
    /// Tells the user that the pass is at `what`, `done` of `total`. `ATTAR_CANCELLED` when the user wants it to stop.
    pub progress:
        Option<unsafe extern "C" fn(run: AttarRun, what: AttarStr, done: u64, total: u64) -> AttarStatus>,
    /// Records measured values about a subject; they end up in the report and in the certificate.
    pub metric: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            subject: AttarStr,
            values: *const AttarMetric,
            values_len: usize,
        ) -> AttarStatus,
    >,
    /// Asks leave for a rewrite and counts it. When `allowed` is 0, the site is to be left alone.
    pub rewrite:
        Option<unsafe extern "C" fn(run: AttarRun, site: AttarStr, allowed: *mut u32) -> AttarStatus>,
    /// A seed for random numbers: differs between the steps of a recipe, not between compiles.
    pub seed: Option<unsafe extern "C" fn(run: AttarRun, seed: *mut u64) -> AttarStatus>,
    /// Gives a buffer back. Those that are left when the pass returns are released then.
    pub release: Option<unsafe extern "C" fn(run: AttarRun, buffer: AttarBuffer) -> AttarStatus>,

    /// The graph in its text form, `.air`.
    pub graph_text: Option<unsafe extern "C" fn(run: AttarRun, text: *mut AttarStr) -> AttarStatus>,
    /// All nodes, each after those it takes values from.
    pub nodes: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            nodes: *mut AttarNode,
            capacity: usize,
            count: *mut usize,
        ) -> AttarStatus,
    >,
    /// The graph's inputs: `tokens`, `positions`, `rows`.
    pub inputs: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            values: *mut AttarValue,
            capacity: usize,
            count: *mut usize,
        ) -> AttarStatus,
    >,
    /// The graph's outputs; logits come first.
    pub outputs: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            values: *mut AttarValue,
            capacity: usize,
            count: *mut usize,
        ) -> AttarStatus,
    >,
    /// Makes other values the graph's outputs.
    pub set_outputs:
        Option<unsafe extern "C" fn(run: AttarRun, values: *const AttarValue, len: usize) -> AttarStatus>,
    /// The node of that name.
    pub node_by_name:
        Option<unsafe extern "C" fn(run: AttarRun, name: AttarStr, node: *mut AttarNode) -> AttarStatus>,
    /// What a node is.
    pub node_info:
        Option<unsafe extern "C" fn(run: AttarRun, node: AttarNode, info: *mut AttarNodeInfo) -> AttarStatus>,
    /// What a node takes, in order.
    pub node_inputs: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            node: AttarNode,
            values: *mut AttarValue,
            capacity: usize,
            count: *mut usize,
        ) -> AttarStatus,
    >,
    /// An output of a node, from 0.
    pub node_output: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            node: AttarNode,
            slot: u32,
            value: *mut AttarValue,
        ) -> AttarStatus,
    >,
    /// An attribute of a node, from 0.
    pub node_attr: Option<
        unsafe extern "C" fn(run: AttarRun, node: AttarNode, index: u32, attr: *mut AttarAttr) -> AttarStatus,
    >,
    /// The node that a value is an output of.
    pub value_node:
        Option<unsafe extern "C" fn(run: AttarRun, value: AttarValue, node: *mut AttarNode) -> AttarStatus>,
    /// Type of a value.
    pub value_type:
        Option<unsafe extern "C" fn(run: AttarRun, value: AttarValue, ty: *mut AttarType) -> AttarStatus>,
    /// Where a value is taken; outputs of the graph are not among them.
    pub value_uses: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            value: AttarValue,
            uses: *mut AttarUse,
            capacity: usize,
            count: *mut usize,
        ) -> AttarStatus,
    >,
    /// Adds a node. Its output types are inferred and the op's rules checked. `name` may be empty.
    pub add_node: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            op: AttarStr,
            name: AttarStr,
            inputs: *const AttarValue,
            inputs_len: usize,
            attrs: *const AttarAttr,
            attrs_len: usize,
            node: *mut AttarNode,
        ) -> AttarStatus,
    >,
    /// Adds a reference to a weight tensor.
    pub add_weight:
        Option<unsafe extern "C" fn(run: AttarRun, tensor: AttarStr, value: *mut AttarValue) -> AttarStatus>,
    /// Makes whatever takes `old` take `new`, which has the same type.
    pub replace_uses:
        Option<unsafe extern "C" fn(run: AttarRun, old: AttarValue, new: AttarValue) -> AttarStatus>,
    /// Removes a node that nothing uses.
    pub remove_node: Option<unsafe extern "C" fn(run: AttarRun, node: AttarNode) -> AttarStatus>,
    /// Begins a custom op of that name over `inputs`: gives as many values that stand for them in its body. Nodes added over
    /// these belong to the body.
    pub custom_begin: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            name: AttarStr,
            inputs: *const AttarValue,
            inputs_len: usize,
            body_inputs: *mut AttarValue,
        ) -> AttarStatus,
    >,
    /// Ends the custom op, whose outputs are values of its body, and adds a node of it. The body is what the op means: it
    /// is decomposed into it before kernels are chosen.
    pub custom_end: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            outputs: *const AttarValue,
            outputs_len: usize,
            node: *mut AttarNode,
        ) -> AttarStatus,
    >,

    /// Names of the weight tensors the recipe means, or with `all` of every tensor the graph uses, by first use.
    pub tensors: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            all: u32,
            names: *mut AttarStr,
            capacity: usize,
            count: *mut usize,
        ) -> AttarStatus,
    >,
    /// What is known of a tensor without reading it.
    pub tensor_info: Option<
        unsafe extern "C" fn(run: AttarRun, tensor: AttarStr, info: *mut AttarTensorInfo) -> AttarStatus,
    >,
    /// Values of some rows (for vectors: elements) of a tensor, decoded. `rows` beyond the last are left out. Not
    /// copied where the host has them in memory.
    pub tensor_read: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            tensor: AttarStr,
            first: u64,
            rows: u64,
            values: *mut AttarFloats,
        ) -> AttarStatus,
    >,
    /// All values of an uncompressed tensor, to be changed where they are and committed.
    pub tensor_edit:
        Option<unsafe extern "C" fn(run: AttarRun, tensor: AttarStr, values: *mut AttarEdit) -> AttarStatus>,
    /// Zeros of a shape, to become a new tensor of that name when they are committed.
    pub tensor_create: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            tensor: AttarStr,
            shape: *const u64,
            rank: usize,
            values: *mut AttarEdit,
        ) -> AttarStatus,
    >,
    /// Makes edited values the tensor's own, and releases the buffer. Values must be finite.
    pub tensor_commit: Option<unsafe extern "C" fn(run: AttarRun, buffer: AttarBuffer) -> AttarStatus>,
    /// Stores a matrix in a weight format, and says with which relative error. `importance` is what a squared error in each
    /// column counts, `[k]`, or none; heeded in formats that plugins describe.
    pub tensor_set_format: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            tensor: AttarStr,
            format: AttarStr,
            importance: *const f32,
            importance_len: usize,
            relative_error: *mut f64,
        ) -> AttarStatus,
    >,
    /// Stores a matrix as codes the plugin has chosen.
    pub tensor_set_codes: Option<
        unsafe extern "C" fn(run: AttarRun, tensor: AttarStr, codes: *const AttarCodes) -> AttarStatus,
    >,
    /// Layout of a weight format.
    pub format_info:
        Option<unsafe extern "C" fn(run: AttarRun, name: AttarStr, format: *mut AttarFormat) -> AttarStatus>,

    /// What reaches a value on calibration text. Asking in the order of the graph costs one run over the model in all.
    pub statistics: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            value: AttarValue,
            statistics: *mut AttarStatistics,
        ) -> AttarStatus,
    >,
    /// A window of calibration text, from 0, and how many there are. An index beyond the last gives no tokens.
    pub calibration_window: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            index: usize,
            tokens: *mut AttarTokens,
            count: *mut usize,
        ) -> AttarStatus,
    >,
    /// Tokens of a text.
    pub tokenize:
        Option<unsafe extern "C" fn(run: AttarRun, text: AttarStr, tokens: *mut AttarTokens) -> AttarStatus>,
    /// Runs the model as it is now over tokens and gives a value, `[tokens, …]`; for value 0 the logits of all tokens.
    /// Further values of the same tokens cost least in the order of the graph.
    pub run_model: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            tokens: *const u32,
            tokens_len: usize,
            value: AttarValue,
            values: *mut AttarFloats,
        ) -> AttarStatus,
    >,

    /// Since 1.1. Records why something was not done; ends up in the report, not in the certificate.
    pub refused:
        Option<unsafe extern "C" fn(run: AttarRun, subject: AttarStr, reason: AttarStr) -> AttarStatus>,
    /// Since 1.1. Puts values in the place of a node's outputs, one for each, and removes the node with whatever fed only it. A
    /// node that was added without a name inherits that of the one it replaces.
    pub replace_node: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            node: AttarNode,
            values: *const AttarValue,
            values_len: usize,
        ) -> AttarStatus,
    >,
    /// Since 1.1. Removes a node, if nothing uses it, and then whatever fed only it. The graph's inputs stay, and so does
    /// `attention`, which extends the KV cache.
    pub remove_unused: Option<unsafe extern "C" fn(run: AttarRun, node: AttarNode) -> AttarStatus>,
    /// Since 1.1. Computes a node of one output whose inputs are uncompressed weights, and keeps the result as a new tensor of that
    /// name.
    pub node_evaluate:
        Option<unsafe extern "C" fn(run: AttarRun, node: AttarNode, tensor: AttarStr) -> AttarStatus>,
    /// Since 1.1. Makes a new tensor of that name of the rows of others, stacked in order, whatever format they have. `stacked` is 0,
    /// and nothing is made, when they differ in format, in width or in the table of their codes. The parts are to be left as they
    /// are from then on.
    pub tensor_stack: Option<
        unsafe extern "C" fn(
            run: AttarRun,
            tensor: AttarStr,
            parts: *const AttarStr,
            parts_len: usize,
            stacked: *mut u32,
        ) -> AttarStatus,
    >,
}
