// y[m, n] = sum_k x[m, k] w[n, k] for up to 16 rows of int8 activations and weights of 2 to 8 bits.
//
// Rows are the columns of byte-wise products; each row's sums of groups are added up in f32. Warps of a block share out the
// groups of `BLOCKS` blocks of channels.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int TILES = ROWS / 8;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;
extern "C" __global__ void __launch_bounds__(WARPS * 32)
KERNEL(const u8 *__restrict__ x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  __shared__ float parts[SPLITS][ROWS][STRIDE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  const int rows = (int)row_count;
  float sums[TILES][2][2] = {};
  if (index * 16 < W::N) {
    const u8 *block = packed + W::HEADER + (size_t)index * W::BLOCK;
    Table table;
    table.load(packed);
    // Rows past the last repeat it; their results are not stored.
    const u8 *mine[TILES], *column[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      mine[tile] = x + (size_t)min(tile * 8 + g, rows - 1) * X::STRIDE;
#pragma unroll
      for (int c = 0; c < 2; ++c) column[tile][c] = x + (size_t)min(tile * 8 + 2 * t + c, rows - 1) * X::STRIDE;
    }
#pragma unroll 2
    for (int group = split; group < W::GROUPS; group += SPLITS) {
      u32 a[4];
      load_weights(a, table, block, group, g, t);
      Fields fields;
      fields.load(table, block, group, g);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        if (tile == 0 || rows > 8) {
          u32 b0, b1;
          load_activations(b0, b1, mine[tile], group, t);
          int products[4];
          multiply(products, a, b0, b1);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float scale_x = *(const float *)(column[tile][c] + X::SCALES + group * 4);
            int codes_sum = *(const int *)(column[tile][c] + X::SUMS + group * 4);
            sums[tile][0][c] += fields.part(0, products[c], scale_x, codes_sum);
            sums[tile][1][c] += fields.part(1, products[2 + c], scale_x, codes_sum);
          }
        }
      }
    }
    float row_scale[2] = {1.f, 1.f};
    if constexpr (!W::BF16_SCALES) row_scale[0] = ((const float *)block)[2 * g], row_scale[1] = ((const float *)block)[2 * g + 1];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int m = tile * 8 + 2 * t + c;
        parts[split][m][local * 16 + 2 * g] = sums[tile][0][c] * row_scale[0];
        parts[split][m][local * 16 + 2 * g + 1] = sums[tile][1][c] * row_scale[1];
      }
  } else {
    for (int i = lane; i < ROWS * 16; i += 32) parts[split][i / 16][local * 16 + i % 16] = 0.f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * CHANNELS; i += WARPS * 32) {
    int m = i / CHANNELS, c = i % CHANNELS;
    float sum = parts[0][m][c];
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) sum += parts[s][m][c];
    parts[0][m][c] = sum;
  }
  __syncthreads();
  finish_tile<CHANNELS, STRIDE, WARPS * 32>(&parts[0][0][0], rows, 0, blockIdx.x * CHANNELS, BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
