/* clip-weights: a plugin in C.
 *
 * Clips the weights of each row at a number of standard deviations of the row. A few weights far out make the scale of all
 * their neighbours coarse; without them, formats with few bits have smaller errors.
 *
 *     gcc -std=c11 -O2 -shared -fPIC -I plugins/sdk/include clip_weights.c -o libclip_weights.so -lm
 *     attar compile MODEL --plugin ./libclip_weights.so --pass clip-weights=deviations:4 --quantize n4 -o model.attar
 */

#include "attar_plugin.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

static AttarStr str(const char *text) {
  AttarStr s = {(const uint8_t *)text, strlen(text)};
  return s;
}

/* Statuses other than ATTAR_OK are handed on: the host knows which call it was and what was wrong. */
#define TRY(call)                      \
  do {                                 \
    AttarStatus status_ = (call);      \
    if (status_ != ATTAR_OK) return status_; \
  } while (0)

static uint64_t clip_row(float *row, size_t width, double deviations) {
  double sum = 0.0, squares = 0.0;
  for (size_t i = 0; i < width; i++) {
    sum += row[i];
    squares += (double)row[i] * row[i];
  }
  double mean = sum / (double)width;
  double deviation = sqrt(fmax(squares / (double)width - mean * mean, 0.0));
  float low = (float)(mean - deviations * deviation), high = (float)(mean + deviations * deviation);
  uint64_t clipped = 0;
  for (size_t i = 0; i < width; i++) {
    float kept = fminf(fmaxf(row[i], low), high);
    clipped += kept != row[i];
    row[i] = kept;
  }
  return clipped;
}

static AttarStatus clip_tensor(const AttarHost *host, AttarRun run, AttarStr name, double deviations) {
  AttarTensorInfo info;
  TRY(host->tensor_info(run, name, &info));
  int is_matrix = info.rank == 2 && info.elem.len == 3 && memcmp(info.elem.data, "f32", 3) == 0;
  if (!is_matrix) {
    return ATTAR_OK;
  }
  AttarEdit edit;
  TRY(host->tensor_edit(run, name, &edit));
  size_t width = (size_t)info.shape[1];
  uint64_t clipped = 0;
  for (size_t row = 0; row < (size_t)info.shape[0]; row++) {
    clipped += clip_row(edit.data + row * width, width, deviations);
  }
  uint32_t allowed = 0;
  if (clipped > 0) {
    TRY(host->rewrite(run, name, &allowed));
  }
  if (!allowed) {
    return host->release(run, edit.buffer);
  }
  TRY(host->tensor_commit(run, edit.buffer));
  AttarMetric metric = {.name = str("clipped"), .kind = ATTAR_METRIC_COUNT, .count = clipped};
  return host->metric(run, name, &metric, 1);
}

static AttarStatus run_pass(const void *context, const AttarHost *host, AttarRun run,
                            const AttarOptionValue *options, uintptr_t options_len) {
  (void)context;
  if (options_len != 1) {
    return ATTAR_MISUSE;
  }
  double deviations = options[0].number;
  AttarStr names[4096];
  size_t count = 0;
  TRY(host->tensors(run, 0, names, sizeof names / sizeof names[0], &count));
  if (count > sizeof names / sizeof names[0]) {
    host->fail(run, str("more than 4096 tensors"));
    return ATTAR_ERROR;
  }
  for (size_t i = 0; i < count; i++) {
    TRY(host->progress(run, names[i], i, count));
    TRY(clip_tensor(host, run, names[i], deviations));
  }
  return ATTAR_OK;
}

/* Texts of constant expressions: what str() does, before the program runs. */
#define STR(text) {(const uint8_t *)(text), sizeof(text) - 1}

static const AttarOption OPTIONS[] = {{
    .name = STR("deviations"),
    .doc = STR("standard deviations of a row at which its weights are clipped"),
    .kind = ATTAR_OPTION_FLOAT,
    .has_default = 1,
    .default_number = 4.0,
    .min_number = 1.0,
    .max_number = 100.0,
}};

static const AttarPass PASSES[] = {{
    .name = STR("clip-weights"),
    .summary = STR("clips the weights of each row at a number of standard deviations"),
    .file = STR("clip_weights.c"),
    .phase = ATTAR_PHASE_COMPRESS,
    .numerics = ATTAR_NUMERICS_LOSSY,
    .takes_tensors = 1,
    .options = OPTIONS,
    .options_len = 1,
    .run = run_pass,
}};

static const AttarPlugin PLUGIN = {
    .size = sizeof(AttarPlugin),
    .abi_major = ATTAR_ABI_MAJOR,
    .abi_minor = ATTAR_ABI_MINOR,
    .name = STR("clip-weights-c"),
    .version = STR("0.1.0"),
    .passes = PASSES,
    .passes_len = 1,
};

const AttarPlugin *attar_plugin_entry(const AttarHost *host) {
  /* A host of another major would not call PLUGIN's passes, so there is nothing to check here. */
  (void)host;
  return &PLUGIN;
}
