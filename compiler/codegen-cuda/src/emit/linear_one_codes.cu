// y[n] = sum_k x[k] w[n, k] for one row of int8 activations and weights of 2 to 8 bits; or for a row of f32 that is normalized and
// quantized here first, by every block alike, which saves a launch.
//
// A warp takes four groups at a time, and thread t of four has the weights of group t, eight inputs in each of four products. Columns
// 2t and 2t + 1 of the activations are zero but for those eight inputs that thread t has, so that sums of groups stay apart: thread
// t ends with those of its group, and applies its scales. Warps of a block share out fours of groups of `BLOCKS` blocks of
// channels. The first weights are asked for before what other launches leave is waited for.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;
/// A four of groups, codes and then scales. Codes of neighbouring groups stand so far apart that a row of each of the four lies in
/// other banks.
constexpr int GROUP_STRIDE = GROUP_CODES + 32, FIELDS_AT = 4 * GROUP_STRIDE - 32;
constexpr int PIECE = FIELDS_AT + 4 * GROUP_FIELDS;

/// Where a lane copies its part of a warp's next four of groups from, and where to.
struct Source {
  const u8 *codes, *fields;
  u32 to;

  __device__ __forceinline__ Source(const u8 *block, int first, const u8 *pieces) {
    const int lane = threadIdx.x % 32;
    codes = block + W::CODES + first * GROUP_CODES + lane * 16;
    fields = block + W::FIELDS + first * GROUP_FIELDS + lane * 16;
    to = shared_address(pieces) + place(lane * 16);
  }

  /// Where the `at`th byte of codes goes.
  static __device__ __forceinline__ int place(int at) { return at + at / GROUP_CODES * (GROUP_STRIDE - GROUP_CODES); }

  /// Asks for a four of which `there` groups are there, if there are any.
  __device__ __forceinline__ void ask(int stage, int there) {
    if (there > 0) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int at = 0; at < 4 * GROUP_CODES; at += 512) {
        const int into = 512 % GROUP_CODES == 0 ? place(at) : place(at + lane * 16) - place(lane * 16);
        if (at + 512 <= 4 * GROUP_CODES || at + lane * 16 < 4 * GROUP_CODES)
          copy_async(to + stage * PIECE + into, codes + at, WHOLE || at + lane * 16 < there * GROUP_CODES ? 16 : 0);
      }
      if (lane * 16 < 4 * GROUP_FIELDS)
        copy_async(to - place(lane * 16) + lane * 16 + stage * PIECE + FIELDS_AT, fields, WHOLE || lane * 16 < there * GROUP_FIELDS ? 16 : 0);
    }
    codes += SPLITS * 4 * GROUP_CODES, fields += SPLITS * 4 * GROUP_FIELDS;
    commit_copies();
  }
};

struct Shared {
  alignas(16) u8 pieces[WARPS][STAGES][PIECE];
  Codes8 row;
  float parts[SPLITS][STRIDE];
  float sums[WARPS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "as much as the launch gives");

/// What a warp adds up of 16 channels, from group `split` * 4 on.
template <bool SPLIT_SIGNS>
__device__ __forceinline__ void add_up(float (&sums)[2], const Table &table, const Shared &shared, Source &source, int split) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool has_column = g / 2 == t;
  const Codes8 &row = shared.row;
  const u8 *x = has_column ? row.codes + (split * 4 + t) * 32 : row.zeros;
  const int step = has_column ? SPLITS * 128 : 0;
  const Scaled *groups = row.groups + split * 4 + t;
  const u8 *const pieces = shared.pieces[threadIdx.x / 32][0];
#pragma unroll 1
  for (int left = W::GROUPS - split * 4; left > 0; left -= STAGES * SPLITS * 4) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      const int there = left - stage * SPLITS * 4;
      if (there > 0) {
        wait_for_copies<STAGES - 1>();
        __syncwarp();
        const u8 *piece = pieces + stage * PIECE;
        int lower[4] = {}, upper[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Codes codes;
          codes.load(piece + t * GROUP_STRIDE, g, i);
          Weights<SPLIT_SIGNS> weights;
          weights.decode(table, codes, i);
          const Two eight = *(const Two *)(x + 8 * i);
          multiply(lower, weights.a, eight.x, eight.y, lower);
          if constexpr (W::BITS == 4 && SPLIT_SIGNS) multiply(upper, weights.upper, eight.x, eight.y, upper);
        }
        if constexpr (W::BITS == 4 && SPLIT_SIGNS) lower[0] += upper[0], lower[2] += upper[2];
        Fields fields;
        fields.load(piece + FIELDS_AT + t * GROUP_FIELDS, g);
        const Scaled scaled = *groups;
        sums[0] += fields.part(table, 0, lower[0], scaled.scale, scaled.codes_sum);
        sums[1] += fields.part(table, 1, lower[2], scaled.scale, scaled.codes_sum);
        x += step, groups += SPLITS * 4;
        __syncwarp();
        source.ask(stage, there - STAGES * SPLITS * 4);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, W::BITS != 6 ? 4 : 3)
KERNEL(X_PARAMETERS, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64, u64) {
  extern __shared__ Four given[];
  Shared &shared = *(Shared *)given;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  const bool has_work = index * 16 < W::N && split * 4 < W::GROUPS;
  const u8 *block = packed + W::HEADER + (size_t)(has_work ? index : 0) * W::BLOCK;
  Source source(block, split * 4, shared.pieces[warp][0]);
  let_next_launch_begin();
  Table table;
  table.load(packed);
  float row_scale[2] = {1.f, 1.f};
  if constexpr (!W::BF16_SCALES) row_scale[0] = ((const float *)block)[2 * g], row_scale[1] = ((const float *)block)[2 * g + 1];
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) source.ask(stage, has_work ? W::GROUPS - (split + stage * SPLITS) * 4 : 0);
  if (has_work) fetch_groups_ahead(block, (SPLITS + split) * STAGES * 4, STAGES * 4);
  fill_up(shared.row);
  X_ROW
  // Where the sums go that they multiply.
  float *const own = &shared.parts[split][local * 16 + 2 * g];
  if (t == 0) own[0] = row_scale[0], own[1] = row_scale[1];
  // The residual is on its way while products are.
  const int channel = blockIdx.x * CHANNELS + threadIdx.x;
  const float *from = RESIDUAL_ARGUMENT;
  float before = 0.f;
  if (from && threadIdx.x < CHANNELS && channel < W::N) before = from[channel];
  __syncthreads();
  float sums[2] = {};
  if (has_work) {
    if (table.has_split_signs()) add_up<true>(sums, table, shared, source, split);
    else add_up<false>(sums, table, shared, source, split);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], 1);
      sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], 2);
    }
  }
  if (t == 0) own[0] *= sums[0], own[1] *= sums[1];
  __syncthreads();
  if (threadIdx.x < CHANNELS) {
    float sum = shared.parts[0][threadIdx.x];
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) sum += shared.parts[s][threadIdx.x];
    if constexpr (EPILOGUE == STORE || EPILOGUE == RESIDUAL) {
      const float *added = BIAS_ARGUMENT;
      if (channel < W::N) ((float *)out)[channel] = before + (sum + (added ? added[channel] : 0.f));
    } else {
      shared.parts[0][threadIdx.x] = sum;
    }
  }
  if constexpr (EPILOGUE != STORE && EPILOGUE != RESIDUAL) {
    __syncthreads();
    finish_tile<CHANNELS, STRIDE, WARPS * 32>(&shared.parts[0][0], 1, 0, blockIdx.x * CHANNELS, BIAS_ARGUMENT, nullptr, out);
  }
}
