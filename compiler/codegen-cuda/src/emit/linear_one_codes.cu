// y[n] = sum_k x[k] w[n, k] for one row of int8 activations and weights of 2 to 8 bits; or for a row of f32 that is normalized and
// quantized here first, by every block alike, which takes less time than a launch.
//
// A warp takes four groups at a time. Columns 2j and 2j + 1 of its products are the activations of group j, so that one load
// brings those of all four; of the products by the weights of group j, thread j of each four keeps its own, and it alone loads
// and applies that group's scales. Warps of a block share out fours of groups of `BLOCKS` blocks of channels. The first weights
// are asked for before what other launches leave is waited for.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;

struct Shared {
  alignas(16) Ring rings[WARPS];
  alignas(16) u8 row[X::STRIDE];
  float parts[SPLITS][STRIDE];
  float sums[WARPS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "as much as the launch gives");

/// What a warp adds up of 16 channels, from group `split` * 4 on.
template <bool SPLIT_SIGNS>
__device__ __forceinline__ void add_up(float (&sums)[2], const Table &table, Ring &ring, const u8 *x, const u8 *block, int split) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int stage = 0;
#pragma unroll 1
  for (int first = split * 4; first < W::GROUPS; first += SPLITS * 4) {
    ring.wait();
    const u8 *piece = ring.pieces[stage];
    const Two eight = activations(x, WHOLE ? first + g / 2 : min(first + g / 2, W::GROUPS - 1), t);
    int products[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Codes codes;
      codes.load(piece + i * GROUP_CODES, g, t);
      Weights<SPLIT_SIGNS> weights;
      weights.decode(table, codes, t);
      int four[4];
      weights.multiply_by(four, eight.x, eight.y, 0);
      if (t == i) products[0] = four[0], products[1] = four[2];
    }
    const int group = first + t;
    if (WHOLE || group < W::GROUPS) {
      Fields fields;
      fields.load(piece + 4 * GROUP_CODES + t * GROUP_FIELDS, g);
      const float scale = *(const float *)(x + X::SCALES + group * 4);
      const int codes_sum = *(const int *)(x + X::SUMS + group * 4);
      sums[0] += fields.part(table, 0, products[0], scale, codes_sum);
      sums[1] += fields.part(table, 1, products[1], scale, codes_sum);
    }
    __syncwarp();
    ring.ask(stage, block, first + STAGES * SPLITS * 4);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
KERNEL(X_PARAMETERS, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64, u64) {
  extern __shared__ Four given[];
  Shared &shared = *(Shared *)given;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  const bool has_work = index * 16 < W::N && split * 4 < W::GROUPS;
  const u8 *block = packed + W::HEADER + (size_t)(has_work ? index : 0) * W::BLOCK;
  Ring &ring = shared.rings[warp];
  let_next_launch_begin();
  Table table;
  table.load(packed);
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) ring.ask(stage, block, has_work ? (split + stage * SPLITS) * 4 : W::GROUPS);
  X_ROW
  __syncthreads();
  float sums[2] = {};
  if (has_work) {
    if (table.has_split_signs()) add_up<true>(sums, table, ring, shared.row, block, split);
    else add_up<false>(sums, table, ring, shared.row, block, split);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], 1);
      sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], 2);
      if constexpr (!W::BF16_SCALES) sums[c] *= ((const float *)block)[2 * g + c];
    }
  }
  if (t == 0) shared.parts[split][local * 16 + 2 * g] = sums[0], shared.parts[split][local * 16 + 2 * g + 1] = sums[1];
  __syncthreads();
  if (threadIdx.x < CHANNELS) {
    float sum = shared.parts[0][threadIdx.x];
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) sum += shared.parts[s][threadIdx.x];
    shared.parts[0][threadIdx.x] = sum;
  }
  __syncthreads();
  finish_tile<CHANNELS, STRIDE, WARPS * 32>(&shared.parts[0][0], 1, 0, blockIdx.x * CHANNELS, BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
