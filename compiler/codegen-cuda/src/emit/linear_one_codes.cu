// y[n] = sum_k x[k] w[n, k] for one row of int8 activations and weights of 2 to 8 bits.
//
// A warp takes four groups at a time. Columns 2j and 2j + 1 of its products are the activations of group j, so that one load
// brings those of all four; of the products by the weights of group j, thread j of each four keeps its own, and it alone loads
// and applies that group's scales. Warps of a block share out fours of groups of `BLOCKS` blocks of channels. While a four is
// multiplied, the next is on its way; the first is asked for before what other launches leave is waited for.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;
constexpr bool WHOLE = W::GROUPS % 4 == 0;
/// Bytes of a block of channels that are asked for ahead.
constexpr int AHEAD = W::BLOCK / 16 * 16 < 32768 ? W::BLOCK / 16 * 16 : 32768;

/// What a warp loads of the weights for a four of groups. Past the last group the last one is multiplied again, and not counted.
struct Piece {
  Codes codes[4];
  Fields fields;

  __device__ __forceinline__ void load(const u8 *block, int first, int g, int t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i].load(block, WHOLE ? first + i : min(first + i, W::GROUPS - 1), g, t);
    fields.load(block, WHOLE ? first + t : min(first + t, W::GROUPS - 1), g);
  }
};

/// What it loads of the activations.
struct Row {
  Two eight;
  float scale;
  int codes_sum;

  __device__ __forceinline__ void load(const u8 *x, int first, int g, int t) {
    eight = activations(x, WHOLE ? first + g / 2 : min(first + g / 2, W::GROUPS - 1), t);
    int group = WHOLE ? first + t : min(first + t, W::GROUPS - 1);
    scale = *(const float *)(x + X::SCALES + group * 4);
    codes_sum = *(const int *)(x + X::SUMS + group * 4);
  }
};

/// What a warp adds up of 16 channels, from group `split` * 4 on.
template <bool SPLIT_SIGNS>
__device__ __forceinline__ void add_up(float (&sums)[2], const Table &table, Piece next, const u8 *x, const u8 *block, int split, int g, int t) {
  Row next_row;
  next_row.load(x, split * 4, g, t);
#pragma unroll 2
  for (int first = split * 4; first < W::GROUPS; first += SPLITS * 4) {
    const Piece piece = next;
    const Row row = next_row;
    if (const int after = first + SPLITS * 4; after < W::GROUPS) {
      next.load(block, after, g, t);
      next_row.load(x, after, g, t);
    }
    int products[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Weights<SPLIT_SIGNS> weights;
      weights.decode(table, piece.codes[i], t);
      int four[4];
      weights.multiply_by(four, row.eight.x, row.eight.y, 0);
      if (t == i) products[0] = four[0], products[1] = four[2];
    }
    if (WHOLE || first + t < W::GROUPS) {
      sums[0] += piece.fields.part(table, 0, products[0], row.scale, row.codes_sum);
      sums[1] += piece.fields.part(table, 1, products[1], row.scale, row.codes_sum);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3)
KERNEL(const u8 *__restrict__ x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64, u64) {
  __shared__ float parts[SPLITS][STRIDE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  const bool has_work = index * 16 < W::N && split * 4 < W::GROUPS;
  const u8 *block = packed + W::HEADER + (size_t)(has_work ? index : 0) * W::BLOCK;
  float sums[2] = {};
  let_next_launch_begin();
  if (!has_work) {
    wait_for_launches();
  } else {
    if (split == 0 && lane == 0) fetch_ahead(block, AHEAD);
    Table table;
    table.load(packed);
    Piece first;
    first.load(block, split * 4, g, t);
    wait_for_launches();
    if (table.has_split_signs()) add_up<true>(sums, table, first, x, block, split, g, t);
    else add_up<false>(sums, table, first, x, block, split, g, t);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], 1);
      sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], 2);
      if constexpr (!W::BF16_SCALES) sums[c] *= ((const float *)block)[2 * g + c];
    }
  }
  if (t == 0) parts[split][local * 16 + 2 * g] = sums[0], parts[split][local * 16 + 2 * g + 1] = sums[1];
  __syncthreads();
  if (threadIdx.x < CHANNELS) {
    float sum = parts[0][threadIdx.x];
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) sum += parts[s][threadIdx.x];
    parts[0][threadIdx.x] = sum;
  }
  __syncthreads();
  finish_tile<CHANNELS, STRIDE, WARPS * 32>(&parts[0][0], 1, 0, blockIdx.x * CHANNELS, BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
