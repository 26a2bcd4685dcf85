/* Passes that do what they must not; the host is to say what, and to come to no harm. */

#include "attar_plugin.h"
#include <pthread.h>
#include <string.h>

#ifndef MAJOR
#define MAJOR ATTAR_ABI_MAJOR
#endif
#ifndef MINOR
#define MINOR ATTAR_ABI_MINOR
#endif
#ifndef NOTHING
#define NOTHING 0
#endif
#ifndef EXTRA
#define EXTRA 0
#endif

static AttarStr str(const char *text) {
  AttarStr s = {(const uint8_t *)text, strlen(text)};
  return s;
}

static AttarNode first_node(const AttarHost *host, AttarRun run) {
  AttarNode nodes[64];
  size_t count = 0;
  host->nodes(run, nodes, 64, &count);
  return nodes[0];
}

/* Returns ATTAR_OK though the host refused: the pass must fail all the same. */
static AttarStatus garbage_handle(const AttarHost *host, AttarRun run) {
  AttarNodeInfo info;
  host->node_info(run, 0xdeadbeefdeadbeefull, &info);
  return ATTAR_OK;
}

static AttarStatus garbage_run(const AttarHost *host, AttarRun run) {
  uint64_t seed;
  host->seed(run + (7ull << 40), &seed);
  return ATTAR_OK;
}

/* The first node of an op. */
static AttarNode node_of(const AttarHost *host, AttarRun run, const char *op) {
  AttarNode nodes[64];
  size_t count = 0;
  host->nodes(run, nodes, 64, &count);
  for (size_t i = 0; i < count; i++) {
    AttarNodeInfo info;
    host->node_info(run, nodes[i], &info);
    if (info.op.len == strlen(op) && !memcmp(info.op.data, op, info.op.len)) return nodes[i];
  }
  return 0;
}

static AttarStatus replace_by_itself(const AttarHost *host, AttarRun run) {
  AttarNode node = node_of(host, run, "linear");
  AttarValue value;
  host->node_output(run, node, 0, &value);
  return host->replace_node(run, node, &value, 1);
}

/* The linear is gone, its weight is not, since another node takes it. */
static AttarStatus replaced_node(const AttarHost *host, AttarRun run) {
  AttarNode node = node_of(host, run, "linear"), weight = node_of(host, run, "weight"), added;
  AttarValue inputs[2];
  size_t count;
  AttarNodeInfo info;
  host->node_inputs(run, node, inputs, 2, &count);
  host->add_node(run, str("linear"), str("again"), inputs, 2, NULL, 0, &added);
  AttarValue value;
  host->node_output(run, added, 0, &value);
  if (host->replace_node(run, node, &value, 1) != ATTAR_OK || host->node_info(run, weight, &info) != ATTAR_OK)
    return ATTAR_ERROR;
  host->node_info(run, node, &info);
  return ATTAR_OK;
}

static AttarStatus evaluate_early(const AttarHost *host, AttarRun run) {
  return host->node_evaluate(run, node_of(host, run, "linear"), str("early"));
}

static AttarStatus stack_under_its_name(const AttarHost *host, AttarRun run) {
  AttarStr parts[2] = {str("w"), str("w")};
  uint32_t stacked = 7;
  if (host->tensor_stack(run, str("narrow"), parts, 2, &stacked) != ATTAR_OK || stacked != 1) return ATTAR_ERROR;
  return host->tensor_stack(run, str("w"), parts, 2, &stacked);
}

static AttarStatus until_cancelled(const AttarHost *host, AttarRun run) {
  while (host->progress(run, str("waiting"), 0, 1) == ATTAR_OK) {
  }
  return ATTAR_CANCELLED;
}

/* Goes on after the user has stopped it, and changes a tensor. */
static AttarStatus deaf_to_cancelling(const AttarHost *host, AttarRun run) {
  AttarEdit edit;
  until_cancelled(host, run);
  if (host->tensor_edit(run, str("w"), &edit) != ATTAR_OK) return ATTAR_ERROR;
  edit.data[0] = 99.0f;
  return host->tensor_commit(run, edit.buffer);
}

static AttarNode kept_node;
static AttarRun kept_run;

static AttarStatus keep_handle(const AttarHost *host, AttarRun run) {
  kept_node = first_node(host, run);
  kept_run = run;
  return ATTAR_OK;
}

static AttarStatus use_kept_handle(const AttarHost *host, AttarRun run) {
  AttarNodeInfo info;
  host->node_info(run, kept_node, &info);
  return ATTAR_OK;
}

static AttarStatus use_kept_run(const AttarHost *host, AttarRun run) {
  (void)run;
  uint64_t seed;
  host->seed(kept_run, &seed);
  return ATTAR_OK;
}

static AttarStatus null_pointers(const AttarHost *host, AttarRun run) {
  AttarStr nothing = {NULL, 12};
  host->tensor_info(run, nothing, NULL);
  return ATTAR_OK;
}

static AttarStatus no_room(const AttarHost *host, AttarRun run) {
  host->seed(run, NULL);
  return ATTAR_OK;
}

static AttarStatus no_utf8(const AttarHost *host, AttarRun run) {
  AttarNode node;
  host->node_by_name(run, str("\xff\xfe"), &node);
  return ATTAR_OK;
}

static AttarStatus huge_text(const AttarHost *host, AttarRun run) {
  AttarStr text = {(const uint8_t *)"x", SIZE_MAX / 2};
  host->log(run, ATTAR_LOG_INFO, text);
  return ATTAR_OK;
}

static AttarStatus lying_sizes(const AttarHost *host, AttarRun run) {
  static uint8_t codes[16];
  static uint16_t fields[1];
  static float scales[1];
  AttarCodes c;
  memset(&c, 0, sizeof c);
  c.format = str("n4");
  c.n = 4;
  c.k = 32;
  c.codes = codes;
  c.codes_len = sizeof codes; /* 128 are wanted */
  c.fields = fields;
  c.fields_len = 4;
  c.row_scales = scales;
  c.row_scales_len = 4;
  host->tensor_set_codes(run, str("w"), &c);
  return ATTAR_OK;
}

static AttarStatus wrong_importance(const AttarHost *host, AttarRun run) {
  static float importance[3];
  double error;
  host->tensor_set_format(run, str("w"), str("n4"), importance, 3, &error);
  return ATTAR_OK;
}

static AttarStatus release_twice(const AttarHost *host, AttarRun run) {
  AttarFloats values;
  host->tensor_read(run, str("w"), 0, 1, &values);
  host->release(run, values.buffer);
  host->release(run, values.buffer);
  return ATTAR_OK;
}

static AttarStatus commit_a_reading(const AttarHost *host, AttarRun run) {
  AttarFloats values;
  host->tensor_read(run, str("w"), 0, 1, &values);
  host->tensor_commit(run, values.buffer);
  return ATTAR_OK;
}

static AttarStatus removed_node(const AttarHost *host, AttarRun run) {
  AttarValue value;
  AttarNode node;
  AttarNodeInfo info;
  host->add_weight(run, str("w"), &value);
  host->value_node(run, value, &node);
  host->remove_node(run, node);
  host->add_weight(run, str("w"), &value); /* may stand where the other stood */
  host->node_info(run, node, &info);
  return ATTAR_OK;
}

/* Changes that break no rule of a call, and leave a graph that breaks one: it must be found, and taken back. */
static AttarStatus no_outputs(const AttarHost *host, AttarRun run) {
  AttarEdit edit;
  host->tensor_edit(run, str("w"), &edit);
  edit.data[0] = 77.0f;
  host->tensor_commit(run, edit.buffer);
  return host->set_outputs(run, NULL, 0);
}

static AttarStatus wrong_shape(const AttarHost *host, AttarRun run) {
  uint64_t shape[2] = {4, 16};
  AttarEdit edit;
  AttarValue narrow, x, inputs[2];
  AttarNode node;
  size_t count;
  host->tensor_create(run, str("narrow"), shape, 2, &edit);
  host->tensor_commit(run, edit.buffer);
  host->add_weight(run, str("narrow"), &narrow);
  host->inputs(run, &x, 1, &count);
  inputs[0] = x;
  inputs[1] = narrow;
  return host->add_node(run, str("linear"), str(""), inputs, 2, NULL, 0, &node);
}

static AttarStatus not_finite(const AttarHost *host, AttarRun run) {
  AttarEdit edit;
  host->tensor_edit(run, str("w"), &edit);
  volatile float large = 3e38f;
  edit.data[3] = large * large;
  return host->tensor_commit(run, edit.buffer);
}

static AttarStatus fail_with_words(const AttarHost *host, AttarRun run) {
  host->fail(run, str("the moon is not full"));
  return ATTAR_ERROR;
}

static AttarStatus strange_status(const AttarHost *host, AttarRun run) {
  (void)host;
  (void)run;
  return 4711;
}

struct Call {
  const AttarHost *host;
  AttarRun run;
};

static void *elsewhere(void *data) {
  struct Call *call = data;
  uint64_t seed;
  call->host->seed(call->run, &seed);
  return NULL;
}

static AttarStatus other_thread(const AttarHost *host, AttarRun run) {
  struct Call call = {host, run};
  pthread_t thread;
  pthread_create(&thread, NULL, elsewhere, &call);
  pthread_join(thread, NULL);
  return ATTAR_OK;
}

/* Keeps what it read; the host releases it when the run ends. */
static AttarStatus forgets_buffers(const AttarHost *host, AttarRun run) {
  AttarFloats values;
  for (int i = 0; i < 100; i++) {
    AttarStatus status = host->tensor_read(run, str("w"), 0, 4, &values);
    if (status != ATTAR_OK) return status;
  }
  return ATTAR_OK;
}

typedef AttarStatus (*Body)(const AttarHost *, AttarRun);

static AttarStatus run_pass(const void *context, const AttarHost *host, AttarRun run, const AttarOptionValue *options,
                            uintptr_t options_len) {
  (void)options;
  (void)options_len;
  Body body;
  memcpy(&body, context, sizeof body);
  return body(host, run);
}

#define STR(text) {(const uint8_t *)(text), sizeof(text) - 1}
#define BODIES(X)                                                                                                      \
  X(garbage_handle, "garbage-handle") X(garbage_run, "garbage-run") X(keep_handle, "keep-handle")                      \
  X(use_kept_handle, "use-kept-handle") X(use_kept_run, "use-kept-run") X(null_pointers, "null-pointers")              \
  X(no_room, "no-room") X(no_utf8, "no-utf8") X(huge_text, "huge-text") X(lying_sizes, "lying-sizes")                  \
  X(wrong_importance, "wrong-importance") X(release_twice, "release-twice") X(commit_a_reading, "commit-a-reading")    \
  X(removed_node, "removed-node") X(no_outputs, "no-outputs") X(wrong_shape, "wrong-shape")                            \
  X(not_finite, "not-finite") X(fail_with_words, "fail-with-words") X(strange_status, "strange-status")                \
  X(other_thread, "other-thread") X(forgets_buffers, "forgets-buffers") X(replace_by_itself, "replace-by-itself")       \
  X(replaced_node, "replaced-node") X(evaluate_early, "evaluate-early")                                                \
  X(stack_under_its_name, "stack-under-its-name") X(until_cancelled, "until-cancelled")                                \
  X(deaf_to_cancelling, "deaf-to-cancelling")

#define BODY(name, text) static const Body name##_body = name;
BODIES(BODY)

#define PASS(fn, text)                                                                                                 \
  {.name = STR(text), .summary = STR("misuses the interface"), .phase = ATTAR_PHASE_COMPRESS,                          \
   .numerics = ATTAR_NUMERICS_LOSSY, .context = &fn##_body, .run = run_pass},
static const AttarPass PASSES[] = {BODIES(PASS)};

static const struct {
  AttarPlugin plugin;
  uint64_t extra[EXTRA + 1];
} PLUGIN = {{
  .size = sizeof(AttarPlugin) + 8 * EXTRA,
  .abi_major = MAJOR,
  .abi_minor = MINOR,
  .name = STR("misuse"),
  .version = STR("1"),
  .passes = PASSES,
  .passes_len = sizeof PASSES / sizeof PASSES[0],
}, {0}};

const AttarPlugin *attar_plugin_entry(const AttarHost *host) {
  (void)host;
  return NOTHING ? NULL : &PLUGIN.plugin;
}
