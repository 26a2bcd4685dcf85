// y[m, n] = sum_k x[m, k] w[n, k] for up to 16 rows of int8 activations and weights of 2 to 8 bits.
//
// Rows are the columns of byte-wise products, whose sums over a group are whole numbers p. With a channel's scale w of the group
// and a row's scale x, what a group adds is x w (p + c s): s is the sum of the row's codes, and c what the group's choice adds to
// every weight. Tensor cores count p from 1.5 * 2^23 on, so that its bits are those of a float, and one multiply-add gives w p
// exactly. The terms x w c s of four groups are one product of floats, x s in two parts of 11 bits.
//
// Warps of a block share out fours of groups of `BLOCKS` blocks of channels. While a four is multiplied, the weights of the next
// are on their way; the first are asked for before what other launches leave is waited for.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;
constexpr bool WHOLE = W::GROUPS % 4 == 0;
/// Bytes of a block of channels that are asked for ahead.
constexpr int AHEAD = W::BLOCK / 16 * 16 < 32768 ? W::BLOCK / 16 * 16 : 32768;

struct Shared { float parts[SPLITS][ROWS][STRIDE]; };

/// What a warp loads of the weights for a four of groups; thread `t` of four has the scales of group `t`. Past the last group the
/// last one is multiplied again, by zero.
struct Piece {
  Codes codes[4];
  Fields fields;

  __device__ __forceinline__ void load(const u8 *block, int first, int g, int t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i].load(block, WHOLE ? first + i : min(first + i, W::GROUPS - 1), g, t);
    fields.load(block, WHOLE ? first + t : min(first + t, W::GROUPS - 1), g);
    if (!WHOLE && first + t >= W::GROUPS) fields.clear();
  }
};

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
__device__ __forceinline__ void add_up(Shared &shared, const Table &table, Piece next, const u8 *x, int rows, const u8 *block,
                                       int split, int local) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float sums[TILES][4] = {};
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
    const Piece piece = next;
    if (first + SPLITS * 4 < W::GROUPS) next.load(block, first + SPLITS * 4, g, t);
    float scales[TILES][2][4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) load_scales(scales[tile][c], column[tile][c], first);
      if constexpr (!W::BF16_SCALES) {
        int group = WHOLE ? first + t : min(first + t, W::GROUPS - 1);
        float added = *(const float *)(mine[tile] + X::SCALES + group * 4) * (float)*(const int *)(mine[tile] + X::SUMS + group * 4);
        float high = shortened(added);
        multiply_floats(sums[tile], piece.fields.added(table, 0), piece.fields.added(table, 1), high, added - high);
      }
    }
    const u32 pair = piece.fields.scales();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Weights<SPLIT_SIGNS> weights;
      weights.decode(table, piece.codes[i], t);
      u32 both = __shfl_sync(ALL_LANES, pair, lane & 28 | i);
      float scale[2] = {bits_to_float(both << 16), bits_to_float(both & 0xffff0000u)};
      float start[2] = {-FLOAT_COUNT * scale[0], -FLOAT_COUNT * scale[1]};
      int group = WHOLE ? first + i : min(first + i, W::GROUPS - 1);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        Two eight = activations(mine[tile], group, t);
        int products[4];
        weights.multiply_by(products, eight.x, eight.y, FLOAT_COUNT_BITS);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float product = fmaf(__int_as_float(products[c]), scale[c / 2], start[c / 2]);
          sums[tile][c] = fmaf(product, scales[tile][c % 2][i], sums[tile][c]);
        }
      }
    }
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
  __shared__ Shared shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  const int rows = (int)row_count;
  let_next_launch_begin();
  if (index * 16 < W::N && split * 4 < W::GROUPS) {
    const u8 *block = packed + W::HEADER + (size_t)index * W::BLOCK;
    if (split == 0 && lane == 0) fetch_ahead(block, AHEAD);
    Table table;
    table.load(packed);
    Piece first;
    first.load(block, split * 4, lane / 4, lane % 4);
    wait_for_launches();
    if (table.has_split_signs()) {
      if (rows <= 8) add_up<true, 1>(shared, table, first, x, rows, block, split, local);
      else add_up<true, 2>(shared, table, first, x, rows, block, split, local);
    } else {
      if (rows <= 8) add_up<false, 1>(shared, table, first, x, rows, block, split, local);
      else add_up<false, 2>(shared, table, first, x, rows, block, split, local);
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
