/*
The C interface between Attar and a plugin. `include/attar_plugin.h` is generated from this file.
 * 
 * A plugin is a shared library with one exported function, attar_plugin_entry. It
 * takes the host's table of functions and returns a description of the plugin. What holds across the boundary:
 * 
 * - Both structures begin with their size and version, and that never changes. Majors must be equal; within a major, the
 *   table grows at its end and nothing else changes, so each side checks `size` before it looks at what may not be there.
 * - Nodes, values and buffers are numbers. One that was never given out, or whose run has ended, is answered with
 *   `ATTAR_MISUSE`; it never does harm.
 * - Texts are UTF-8 with a length and without a zero at the end. What the plugin passes is read during the call and not kept,
 *   the description excepted, which must stay as long as the library is loaded. What the host gives lives until the
 *   run ends, or, where it comes with a buffer, until that is released.
 * - Functions return a status. Whatever is not `ATTAR_OK` has a message, see `AttarHost::last_error`; what a function gives
 *   is then not written. No function unwinds or aborts.
 * - All functions are to be called on the thread that runs the pass, while it runs.
 */

#ifndef ATTAR_PLUGIN_H
#define ATTAR_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

/**
 * Version of this interface: plugins and hosts of different majors do not work together.
 */
#define ATTAR_ABI_MAJOR 1

/**
 * Number of times the table has grown within the major.
 */
#define ATTAR_ABI_MINOR 1

/**
 * Dimensions of the largest shape.
 */
#define ATTAR_MAX_RANK 8

/**
 * Tokens in a step, as a dimension.
 */
#define ATTAR_DIM_TOKENS -1

/**
 * Rows whose logits are wanted, as a dimension.
 */
#define ATTAR_DIM_ROWS -2

/**
 * Length of the context, as a dimension.
 */
#define ATTAR_DIM_CONTEXT -3

/**
 * `integer` is 0 or 1.
 */
#define ATTAR_ATTR_BOOL 0

/**
 * `integer` holds the value.
 */
#define ATTAR_ATTR_INT 1

/**
 * `number` holds the value.
 */
#define ATTAR_ATTR_FLOAT 2

/**
 * `text` holds the value.
 */
#define ATTAR_ATTR_TEXT 3

/**
 * `numbers` and `len` hold the value.
 */
#define ATTAR_ATTR_FLOATS 4

/**
 * `dims` and `len` hold the value.
 */
#define ATTAR_ATTR_DIMS 5

/**
 * `count` holds the value.
 */
#define ATTAR_METRIC_COUNT 0

/**
 * `number` holds the value.
 */
#define ATTAR_METRIC_NUMBER 1

/**
 * `text` holds the value.
 */
#define ATTAR_METRIC_TEXT 2

/**
 * Codes are signed bytes in -127..=127.
 */
#define ATTAR_CODES_INT8 0

/**
 * Codes are indices of a table of signed bytes.
 */
#define ATTAR_CODES_TABLE 1

/**
 * Elements are floating-point numbers, without scales.
 */
#define ATTAR_CODES_FLOAT 2

/**
 * No scales.
 */
#define ATTAR_SCALE_NONE 0

/**
 * One bf16 per group: `w = scale * code`.
 */
#define ATTAR_SCALE_BF16 1

/**
 * One f32 per row and one byte per group, `field = (s << choice_bits) | choice`:
 * `w = row_scale * (s - bias) * (table[code] + choice * shift)`.
 */
#define ATTAR_SCALE_ROW_F32_FIELD8 2

/**
 * `integer` is 0 or 1.
 */
#define ATTAR_OPTION_BOOL 0

/**
 * `integer` holds the value.
 */
#define ATTAR_OPTION_INT 1

/**
 * `number` holds the value.
 */
#define ATTAR_OPTION_FLOAT 2

/**
 * `text` holds the value, one of a list of words.
 */
#define ATTAR_OPTION_CHOICE 3

/**
 * `text` holds the value, any text of one line.
 */
#define ATTAR_OPTION_TEXT 4

/**
 * Cleaning up without changing meaning.
 */
#define ATTAR_PHASE_CANONICALIZE 0

/**
 * Making weights smaller.
 */
#define ATTAR_PHASE_COMPRESS 1

/**
 * Joining ops that one kernel can do.
 */
#define ATTAR_PHASE_FUSE 2

/**
 * Bit for bit the same values.
 */
#define ATTAR_NUMERICS_EXACT 0

/**
 * The same function of real numbers, rounded otherwise.
 */
#define ATTAR_NUMERICS_ROUNDING 1

/**
 * Another function, close to the first.
 */
#define ATTAR_NUMERICS_LOSSY 2

/**
 * For developers.
 */
#define ATTAR_LOG_DEBUG 0

/**
 * For users.
 */
#define ATTAR_LOG_INFO 1

/**
 * For users who may want to do something about it.
 */
#define ATTAR_LOG_WARNING 2

/**
 * What a call came to.
 */
typedef int32_t AttarStatus;

/**
 * UTF-8 of a length, without a zero at the end.
 */
typedef struct AttarStr {
  const uint8_t *data;
  uintptr_t len;
} AttarStr;

/**
 * The run of a pass. Over when the pass returns.
 */
typedef uint64_t AttarRun;

/**
 * One measured value. The unit stands in its name.
 */
typedef struct AttarMetric {
  struct AttarStr name;
  /**
   * One of `ATTAR_METRIC_…`.
   */
  uint32_t kind;
  uint64_t count;
  double number;
  struct AttarStr text;
} AttarMetric;

/**
 * Memory of the host that the plugin may look at until it releases it. 0 is none.
 */
typedef uint64_t AttarBuffer;

/**
 * A node of the graph. 0 is none.
 */
typedef uint64_t AttarNode;

/**
 * One output of a node. 0 is none.
 */
typedef uint64_t AttarValue;

/**
 * What a node is.
 */
typedef struct AttarNodeInfo {
  /**
   * Name of the op, as the text form spells it: `linear`, `rms_norm`, `weight`, …
   */
  struct AttarStr op;
  /**
   * Name of the node.
   */
  struct AttarStr name;
  /**
   * The weight's name for a `weight` node, the custom op's for a `custom` node; else empty.
   */
  struct AttarStr target;
  uint32_t inputs;
  uint32_t outputs;
  uint32_t attrs;
} AttarNodeInfo;

/**
 * An attribute of an op: a name and one of six kinds of value.
 */
typedef struct AttarAttr {
  struct AttarStr name;
  /**
   * One of `ATTAR_ATTR_…`.
   */
  uint32_t kind;
  int64_t integer;
  double number;
  struct AttarStr text;
  const double *numbers;
  const int64_t *dims;
  uintptr_t len;
} AttarAttr;

/**
 * Type of a value: an element (`f32`, `i32`, or a weight format) and dimensions, outermost first; negative ones are symbols.
 */
typedef struct AttarType {
  struct AttarStr elem;
  uint32_t rank;
  int64_t dims[ATTAR_MAX_RANK];
} AttarType;

/**
 * A place where a value is taken.
 */
typedef struct AttarUse {
  AttarNode node;
  uint32_t slot;
} AttarUse;

/**
 * What is known of a weight tensor without reading it.
 */
typedef struct AttarTensorInfo {
  /**
   * `f32` until a pass has encoded it, then the name of its format.
   */
  struct AttarStr elem;
  /**
   * The type in the checkpoint.
   */
  struct AttarStr stored_as;
  uint32_t rank;
  /**
   * 1 when the recipe names the tensor without a wildcard: then what cannot be done is to be an error.
   */
  uint32_t is_explicit;
  uint64_t shape[ATTAR_MAX_RANK];
} AttarTensorInfo;

/**
 * Numbers that the plugin may read.
 */
typedef struct AttarFloats {
  const float *data;
  uintptr_t len;
  AttarBuffer buffer;
} AttarFloats;

/**
 * Numbers that the plugin may change until it commits or releases them.
 */
typedef struct AttarEdit {
  float *data;
  uintptr_t len;
  AttarBuffer buffer;
} AttarEdit;

/**
 * A matrix `[n, k]` in a format's codes, row by row.
 */
typedef struct AttarCodes {
  struct AttarStr format;
  uint64_t n;
  uint64_t k;
  /**
   * `[n, k]` codes, one byte each.
   */
  const uint8_t *codes;
  uintptr_t codes_len;
  /**
   * `[n, k / group]` scale fields: the bits of a bf16, or a field byte.
   */
  const uint16_t *fields;
  uintptr_t fields_len;
  /**
   * `[n]` scales of rows, for formats that have them; else none.
   */
  const float *row_scales;
  uintptr_t row_scales_len;
  /**
   * The tensor's own table, `1 << bits` entries; none for the format's default.
   */
  const int8_t *table;
  uintptr_t table_len;
  /**
   * Added to each entry as often as a group's choice says; heeded with a table of its own.
   */
  int32_t shift;
} AttarCodes;

/**
 * The layout of a weight format: from it follow its size, encoder, decoder and kernels.
 */
typedef struct AttarFormat {
  /**
   * Lower-case letters, digits and `_`.
   */
  struct AttarStr name;
  /**
   * Where the idea comes from.
   */
  struct AttarStr source;
  /**
   * One of `ATTAR_CODES_…`.
   */
  uint32_t codes;
  /**
   * Bits of a code; 2 to 6 for tables.
   */
  uint32_t bits;
  /**
   * Weights along K that share a scale.
   */
  uint32_t group;
  /**
   * One of `ATTAR_SCALE_…`.
   */
  uint32_t scale;
  /**
   * Of `ATTAR_SCALE_ROW_F32_FIELD8`.
   */
  int32_t bias;
  /**
   * Of `ATTAR_SCALE_ROW_F32_FIELD8`.
   */
  uint32_t choice_bits;
  /**
   * Of tables: `1 << bits` entries, ascending.
   */
  const int8_t *entries;
  uintptr_t entries_len;
  int32_t shift;
} AttarFormat;

/**
 * Second moments and ranges of the rows `X` `[n_tokens, width]` that reach a value on calibration text.
 */
typedef struct AttarStatistics {
  uint64_t n_tokens;
  uint64_t width;
  /**
   * `H = XᵀX`, `[width, width]`, symmetric; the sum over rows, not their mean.
   */
  const float *second_moment;
  /**
   * Least value of each column.
   */
  const float *minimum;
  /**
   * Greatest value of each column.
   */
  const float *maximum;
  AttarBuffer buffer;
} AttarStatistics;

/**
 * Tokens that the plugin may read.
 */
typedef struct AttarTokens {
  const uint32_t *data;
  uintptr_t len;
  AttarBuffer buffer;
} AttarTokens;

/**
 * The functions of the host. Where a function writes a list, it writes at most `capacity` elements and says in `count` how many
 * there are.
 */
typedef struct AttarHost {
  /**
   * `sizeof(AttarHost)` where the host was compiled: functions behind it are not there.
   */
  uint32_t size;
  uint16_t abi_major;
  uint16_t abi_minor;
  /**
   * Message of the last call on this thread that was not `ATTAR_OK`; valid until the next such call.
   */
  AttarStatus (*last_error)(struct AttarStr *message);
  /**
   * Says why the pass is about to fail. The pass then returns `ATTAR_ERROR`.
   */
  AttarStatus (*fail)(AttarRun run, struct AttarStr message);
  /**
   * Tells the user something; `level` is one of `ATTAR_LOG_…`.
   */
  AttarStatus (*log)(AttarRun run, uint32_t level, struct AttarStr message);
  /**
   * Tells the user that the pass is at `what`, `done` of `total`. `ATTAR_CANCELLED` when the user wants it to stop.
   */
  AttarStatus (*progress)(AttarRun run, struct AttarStr what, uint64_t done, uint64_t total);
  /**
   * Records measured values about a subject; they end up in the report and in the certificate.
   */
  AttarStatus (*metric)(AttarRun run,
                        struct AttarStr subject,
                        const struct AttarMetric *values,
                        uintptr_t values_len);
  /**
   * Asks leave for a rewrite and counts it. When `allowed` is 0, the site is to be left alone.
   */
  AttarStatus (*rewrite)(AttarRun run, struct AttarStr site, uint32_t *allowed);
  /**
   * A seed for random numbers: differs between the steps of a recipe, not between compiles.
   */
  AttarStatus (*seed)(AttarRun run, uint64_t *seed);
  /**
   * Gives a buffer back. Those that are left when the pass returns are released then.
   */
  AttarStatus (*release)(AttarRun run, AttarBuffer buffer);
  /**
   * The graph in its text form, `.air`.
   */
  AttarStatus (*graph_text)(AttarRun run, struct AttarStr *text);
  /**
   * All nodes, each after those it takes values from.
   */
  AttarStatus (*nodes)(AttarRun run, AttarNode *nodes, uintptr_t capacity, uintptr_t *count);
  /**
   * The graph's inputs: `tokens`, `positions`, `rows`.
   */
  AttarStatus (*inputs)(AttarRun run, AttarValue *values, uintptr_t capacity, uintptr_t *count);
  /**
   * The graph's outputs; logits come first.
   */
  AttarStatus (*outputs)(AttarRun run, AttarValue *values, uintptr_t capacity, uintptr_t *count);
  /**
   * Makes other values the graph's outputs.
   */
  AttarStatus (*set_outputs)(AttarRun run, const AttarValue *values, uintptr_t len);
  /**
   * The node of that name.
   */
  AttarStatus (*node_by_name)(AttarRun run, struct AttarStr name, AttarNode *node);
  /**
   * What a node is.
   */
  AttarStatus (*node_info)(AttarRun run, AttarNode node, struct AttarNodeInfo *info);
  /**
   * What a node takes, in order.
   */
  AttarStatus (*node_inputs)(AttarRun run,
                             AttarNode node,
                             AttarValue *values,
                             uintptr_t capacity,
                             uintptr_t *count);
  /**
   * An output of a node, from 0.
   */
  AttarStatus (*node_output)(AttarRun run, AttarNode node, uint32_t slot, AttarValue *value);
  /**
   * An attribute of a node, from 0.
   */
  AttarStatus (*node_attr)(AttarRun run, AttarNode node, uint32_t index, struct AttarAttr *attr);
  /**
   * The node that a value is an output of.
   */
  AttarStatus (*value_node)(AttarRun run, AttarValue value, AttarNode *node);
  /**
   * Type of a value.
   */
  AttarStatus (*value_type)(AttarRun run, AttarValue value, struct AttarType *ty);
  /**
   * Where a value is taken; outputs of the graph are not among them.
   */
  AttarStatus (*value_uses)(AttarRun run,
                            AttarValue value,
                            struct AttarUse *uses,
                            uintptr_t capacity,
                            uintptr_t *count);
  /**
   * Adds a node. Its output types are inferred and the op's rules checked. `name` may be empty.
   */
  AttarStatus (*add_node)(AttarRun run,
                          struct AttarStr op,
                          struct AttarStr name,
                          const AttarValue *inputs,
                          uintptr_t inputs_len,
                          const struct AttarAttr *attrs,
                          uintptr_t attrs_len,
                          AttarNode *node);
  /**
   * Adds a reference to a weight tensor.
   */
  AttarStatus (*add_weight)(AttarRun run, struct AttarStr tensor, AttarValue *value);
  /**
   * Makes whatever takes `old` take `new`, which has the same type.
   */
  AttarStatus (*replace_uses)(AttarRun run, AttarValue old, AttarValue new);
  /**
   * Removes a node that nothing uses.
   */
  AttarStatus (*remove_node)(AttarRun run, AttarNode node);
  /**
   * Begins a custom op of that name over `inputs`: gives as many values that stand for them in its body. Nodes added over
   * these belong to the body.
   */
  AttarStatus (*custom_begin)(AttarRun run,
                              struct AttarStr name,
                              const AttarValue *inputs,
                              uintptr_t inputs_len,
                              AttarValue *body_inputs);
  /**
   * Ends the custom op, whose outputs are values of its body, and adds a node of it. The body is what the op means: it
   * is decomposed into it before kernels are chosen.
   */
  AttarStatus (*custom_end)(AttarRun run,
                            const AttarValue *outputs,
                            uintptr_t outputs_len,
                            AttarNode *node);
  /**
   * Names of the weight tensors the recipe means, or with `all` of every tensor the graph uses, by first use.
   */
  AttarStatus (*tensors)(AttarRun run,
                         uint32_t all,
                         struct AttarStr *names,
                         uintptr_t capacity,
                         uintptr_t *count);
  /**
   * What is known of a tensor without reading it.
   */
  AttarStatus (*tensor_info)(AttarRun run, struct AttarStr tensor, struct AttarTensorInfo *info);
  /**
   * Values of some rows (for vectors: elements) of a tensor, decoded. `rows` beyond the last are left out. Not
   * copied where the host has them in memory.
   */
  AttarStatus (*tensor_read)(AttarRun run,
                             struct AttarStr tensor,
                             uint64_t first,
                             uint64_t rows,
                             struct AttarFloats *values);
  /**
   * All values of an uncompressed tensor, to be changed where they are and committed.
   */
  AttarStatus (*tensor_edit)(AttarRun run, struct AttarStr tensor, struct AttarEdit *values);
  /**
   * Zeros of a shape, to become a new tensor of that name when they are committed.
   */
  AttarStatus (*tensor_create)(AttarRun run,
                               struct AttarStr tensor,
                               const uint64_t *shape,
                               uintptr_t rank,
                               struct AttarEdit *values);
  /**
   * Makes edited values the tensor's own, and releases the buffer. Values must be finite.
   */
  AttarStatus (*tensor_commit)(AttarRun run, AttarBuffer buffer);
  /**
   * Stores a matrix in a weight format, and says with which relative error. `importance` is what a squared error in each
   * column counts, `[k]`, or none; heeded in formats that plugins describe.
   */
  AttarStatus (*tensor_set_format)(AttarRun run,
                                   struct AttarStr tensor,
                                   struct AttarStr format,
                                   const float *importance,
                                   uintptr_t importance_len,
                                   double *relative_error);
  /**
   * Stores a matrix as codes the plugin has chosen.
   */
  AttarStatus (*tensor_set_codes)(AttarRun run,
                                  struct AttarStr tensor,
                                  const struct AttarCodes *codes);
  /**
   * Layout of a weight format.
   */
  AttarStatus (*format_info)(AttarRun run, struct AttarStr name, struct AttarFormat *format);
  /**
   * What reaches a value on calibration text. Asking in the order of the graph costs one run over the model in all.
   */
  AttarStatus (*statistics)(AttarRun run, AttarValue value, struct AttarStatistics *statistics);
  /**
   * A window of calibration text, from 0, and how many there are. An index beyond the last gives no tokens.
   */
  AttarStatus (*calibration_window)(AttarRun run,
                                    uintptr_t index,
                                    struct AttarTokens *tokens,
                                    uintptr_t *count);
  /**
   * Tokens of a text.
   */
  AttarStatus (*tokenize)(AttarRun run, struct AttarStr text, struct AttarTokens *tokens);
  /**
   * Runs the model as it is now over tokens and gives a value, `[tokens, …]`; for value 0 the logits of all tokens.
   * Further values of the same tokens cost least in the order of the graph.
   */
  AttarStatus (*run_model)(AttarRun run,
                           const uint32_t *tokens,
                           uintptr_t tokens_len,
                           AttarValue value,
                           struct AttarFloats *values);
  /**
   * Since 1.1. Records why something was not done; ends up in the report, not in the certificate.
   */
  AttarStatus (*refused)(AttarRun run, struct AttarStr subject, struct AttarStr reason);
  /**
   * Since 1.1. Puts values in the place of a node's outputs, one for each, and removes the node with whatever fed only it. A
   * node that was added without a name inherits that of the one it replaces.
   */
  AttarStatus (*replace_node)(AttarRun run,
                              AttarNode node,
                              const AttarValue *values,
                              uintptr_t values_len);
  /**
   * Since 1.1. Removes a node, if nothing uses it, and then whatever fed only it. The graph's inputs stay, and so does
   * `attention`, which extends the KV cache.
   */
  AttarStatus (*remove_unused)(AttarRun run, AttarNode node);
  /**
   * Since 1.1. Computes a node of one output whose inputs are uncompressed weights, and keeps the result as a new tensor of that
   * name.
   */
  AttarStatus (*node_evaluate)(AttarRun run, AttarNode node, struct AttarStr tensor);
  /**
   * Since 1.1. Makes a new tensor of that name of the rows of others, stacked in order, whatever format they have. `stacked` is 0,
   * and nothing is made, when they differ in format, in width or in the table of their codes. The parts are to be left as they
   * are from then on.
   */
  AttarStatus (*tensor_stack)(AttarRun run,
                              struct AttarStr tensor,
                              const struct AttarStr *parts,
                              uintptr_t parts_len,
                              uint32_t *stacked);
} AttarHost;

/**
 * Declaration of an option.
 */
typedef struct AttarOption {
  struct AttarStr name;
  /**
   * One sentence without a full stop.
   */
  struct AttarStr doc;
  /**
   * One of `ATTAR_OPTION_…`.
   */
  uint32_t kind;
  /**
   * 0 for a choice that a recipe must make.
   */
  uint32_t has_default;
  int64_t default_integer;
  double default_number;
  struct AttarStr default_text;
  int64_t min_integer;
  int64_t max_integer;
  double min_number;
  double max_number;
  const struct AttarStr *choices;
  uintptr_t choices_len;
} AttarOption;

/**
 * Value of an option, checked against its declaration.
 */
typedef struct AttarOptionValue {
  struct AttarStr name;
  /**
   * One of `ATTAR_OPTION_…`.
   */
  uint32_t kind;
  int64_t integer;
  double number;
  struct AttarStr text;
} AttarOptionValue;

/**
 * A pass of a plugin.
 */
typedef struct AttarPass {
  /**
   * Verb first, with dashes.
   */
  struct AttarStr name;
  /**
   * One sentence without a full stop.
   */
  struct AttarStr summary;
  /**
   * Source file, or empty.
   */
  struct AttarStr file;
  /**
   * One of `ATTAR_PHASE_…`.
   */
  uint32_t phase;
  /**
   * One of `ATTAR_NUMERICS_…`.
   */
  uint32_t numerics;
  /**
   * 1 when a recipe may say which tensors the pass concerns.
   */
  uint32_t takes_tensors;
  const struct AttarOption *options;
  uintptr_t options_len;
  /**
   * Given to `run` as it is.
   */
  const void *context;
  /**
   * Runs the pass. `host` is the table that the entry function was given, `options` one value for each declared option, in
   * order.
   */
  AttarStatus (*run)(const void *context,
                     const struct AttarHost *host,
                     AttarRun run,
                     const struct AttarOptionValue *options,
                     uintptr_t options_len);
} AttarPass;

/**
 * What a plugin is. Its entry function returns one that stays as long as the library is loaded.
 */
typedef struct AttarPlugin {
  /**
   * `sizeof(AttarPlugin)` where the plugin was compiled.
   */
  uint32_t size;
  /**
   * `ATTAR_ABI_MAJOR` where the plugin was compiled.
   */
  uint16_t abi_major;
  /**
   * `ATTAR_ABI_MINOR` where the plugin was compiled.
   */
  uint16_t abi_minor;
  struct AttarStr name;
  struct AttarStr version;
  const struct AttarPass *passes;
  uintptr_t passes_len;
  const struct AttarFormat *formats;
  uintptr_t formats_len;
} AttarPlugin;

/**
 * It was done.
 */
#define ATTAR_OK 0

/**
 * It cannot be done; the message says why. A pass may go on.
 */
#define ATTAR_ERROR 1

/**
 * The plugin is wrong: a handle, a length or a pointer that cannot be. The pass fails, whatever it returns.
 */
#define ATTAR_MISUSE 2

/**
 * The user stops the compile; the pass is to return this status soon.
 */
#define ATTAR_CANCELLED 3

/**
 * What was asked for is not there in this compile: calibration, a tokenizer, or a function of a newer host.
 */
#define ATTAR_UNAVAILABLE 4

/**
 * The plugin, or the host, panicked.
 */
#define ATTAR_PANIC 5

#endif  /* ATTAR_PLUGIN_H */

#ifdef __cplusplus
extern "C" {
#endif

/**
 * The one function that a plugin exports. `host` stays valid for as long as the library is loaded; `NULL` refuses to work.
 */
const AttarPlugin *attar_plugin_entry(const AttarHost *host);

#ifdef __cplusplus
}
#endif
