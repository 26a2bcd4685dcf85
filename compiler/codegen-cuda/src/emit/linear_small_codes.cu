// y[m, n] = sum_k x[m, k] w[n, k] for up to 16 rows of int8 activations and weights of 2 to 8 bits.
//
// Rows are the columns of byte-wise products, whose sums over a group are whole numbers p. With a channel's scale w of the group
// and a row's scale x, what a group adds is x w (p + c s): s is the sum of the row's codes, and c what the group's choice adds to
// every weight. Tensor cores count p from 1.5 * 2^23 on, so that its bits are those of a float, and one multiply-add gives w p
// exactly. The terms x w c s of four groups are one product of floats, x s in two parts of 11 bits.
//
// Warps of a block share out fours of groups of `BLOCKS` blocks of channels. The first weights are asked for before what other
// launches leave is waited for. Of a last four the groups that are not there have scales of zero.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;
struct Shared {
  alignas(16) Ring rings[WARPS];
  float parts[SPLITS][ROWS][STRIDE];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "as much as the launch gives");

/// sums += a b for four groups of 16 channels and 8 columns, `b` in two parts.
__device__ __forceinline__ void multiply_floats(float (&sums)[4], float a0, float a1, float high, float low) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%4,%5}, {%6,%7}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(high)), "r"(__float_as_uint(low)));
}

/// The nearest number of 11 bits.
__device__ __forceinline__ float shortened(float x) {
  u32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits_to_float(bits);
}

/// A row's scales of four groups.
__device__ __forceinline__ void load_scales(float (&scales)[4], const u8 *row, int first) {
  const float *from = (const float *)(row + X::SCALES) + first;
  if constexpr (WHOLE) {
    Four four = *(const Four *)from;
    scales[0] = bits_to_float(four.x), scales[1] = bits_to_float(four.y);
    scales[2] = bits_to_float(four.z), scales[3] = bits_to_float(four.w);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) scales[i] = from[min(i, W::GROUPS - 1 - first)];
  }
}

/// Adds up 16 channels by `TILES` times eight rows, from group `split` * 4 on.
template <bool SPLIT_SIGNS, int TILES>
__device__ __forceinline__ void add_up(Shared &shared, const Table &table, const u8 *x, int rows, const u8 *block, int split,
                                       int local) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Ring &ring = shared.rings[threadIdx.x / 32];
  int stage = 0;
  float sums[TILES][4] = {};
  const int start_bits[4] = {FLOAT_COUNT_BITS, FLOAT_COUNT_BITS, FLOAT_COUNT_BITS, FLOAT_COUNT_BITS};
  // Rows past the last repeat it; their results are not stored.
  const u8 *mine[TILES], *column[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    mine[tile] = x + (size_t)min(tile * 8 + g, rows - 1) * X::STRIDE;
#pragma unroll
    for (int c = 0; c < 2; ++c) column[tile][c] = x + (size_t)min(tile * 8 + 2 * t + c, rows - 1) * X::STRIDE;
  }
#pragma unroll 1
  for (int first = split * 4; first < W::GROUPS; first += SPLITS * 4) {
    ring.wait();
    const u8 *piece = ring.pieces[stage];
    Fields fields;
    fields.load(piece + FIELDS_AT + t * GROUP_FIELDS, g);
    if (!WHOLE && first + t >= W::GROUPS) fields.clear();
    float scales[TILES][2][4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) load_scales(scales[tile][c], column[tile][c], first);
      if constexpr (!W::BF16_SCALES) {
        int group = WHOLE ? first + t : min(first + t, W::GROUPS - 1);
        float added = *(const float *)(mine[tile] + X::SCALES + group * 4) * (float)*(const int *)(mine[tile] + X::SUMS + group * 4);
        float high = shortened(added);
        multiply_floats(sums[tile], fields.added(table, 0), fields.added(table, 1), high, added - high);
      }
    }
    const u32 pair = fields.scales();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Codes codes;
      codes.load(piece + i * GROUP_STRIDE, g, t);
      Weights<SPLIT_SIGNS> weights;
      weights.decode(table, codes, t);
      u32 both = __shfl_sync(ALL_LANES, pair, lane & 28 | i);
      float scale[2] = {bits_to_float(both << 16), bits_to_float(both & 0xffff0000u)};
      float start[2] = {-FLOAT_COUNT * scale[0], -FLOAT_COUNT * scale[1]};
      int group = WHOLE ? first + i : min(first + i, W::GROUPS - 1);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        Two eight = activations(mine[tile], group, t);
        int products[4];
        weights.multiply_by(products, eight.x, eight.y, start_bits);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float product = fmaf(__int_as_float(products[c]), scale[c / 2], start[c / 2]);
          sums[tile][c] = fmaf(product, scales[tile][c % 2][i], sums[tile][c]);
        }
      }
    }
    __syncwarp();
    ring.ask(stage, block, first + STAGES * SPLITS * 4);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  float row_scale[2] = {1.f, 1.f};
  if constexpr (!W::BF16_SCALES) row_scale[0] = ((const float *)block)[2 * g], row_scale[1] = ((const float *)block)[2 * g + 1];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      shared.parts[split][tile * 8 + 2 * t + c % 2][local * 16 + 2 * g + c / 2] = sums[tile][c] * row_scale[c / 2];
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
KERNEL(const u8 *__restrict__ x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  extern __shared__ Four given[];
  Shared &shared = *(Shared *)given;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  const int rows = (int)row_count;
  let_next_launch_begin();
  if (index * 16 < W::N && split * 4 < W::GROUPS) {
    const u8 *block = packed + W::HEADER + (size_t)index * W::BLOCK;
    Table table;
    table.load(packed);
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) shared.rings[warp].ask(stage, block, (split + stage * SPLITS) * 4);
    wait_for_launches();
    if (table.has_split_signs()) {
      if (rows <= 8) add_up<true, 1>(shared, table, x, rows, block, split, local);
      else add_up<true, 2>(shared, table, x, rows, block, split, local);
    } else {
      if (rows <= 8) add_up<false, 1>(shared, table, x, rows, block, split, local);
      else add_up<false, 2>(shared, table, x, rows, block, split, local);
    }
  } else {
    wait_for_launches();
    for (int i = lane; i < ROWS * 16; i += 32) shared.parts[split][i / 16][local * 16 + i % 16] = 0.f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * CHANNELS; i += WARPS * 32) {
    int m = i / CHANNELS, c = i % CHANNELS;
    float sum = shared.parts[0][m][c];
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) sum += shared.parts[s][m][c];
    shared.parts[0][m][c] = sum;
  }
  __syncthreads();
  finish_tile<CHANNELS, STRIDE, WARPS * 32>(&shared.parts[0][0][0], rows, 0, blockIdx.x * CHANNELS, BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
