// y[m, n] = sum_k x[m, k] w[n, k] for a few rows of f32 activations and uncompressed weights, up to 16 by a block.
//
// A warp reads eight 64-byte rows of a block of 16 channels at once: a thread has four channels of one of them. Warps of a
// block share out the rows of codes of `BLOCKS` blocks.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;
constexpr int PER_ROW = 32 / W::BITS;
constexpr int CODE_ROWS = (W::K + PER_ROW - 1) / PER_ROW;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
KERNEL(const float *x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  begin_after_launches();
  __shared__ float parts[SPLITS][ROWS][STRIDE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  const int first_row = blockIdx.y * ROWS, rows = ROWS == 1 ? 1 : min(ROWS, (int)row_count - first_row);
  x += (size_t)first_row * W::K;
  float sums[ROWS][4] = {};
  if (index * 16 < W::N) {
    const u8 *codes = packed + (size_t)index * W::BLOCK + W::CODES + lane % 4 * 16;
#pragma unroll 4
    for (int row = split * 8 + lane / 4; row < CODE_ROWS; row += SPLITS * 8) {
      Four word = *(const Four *)(codes + row * 64);
      u32 words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        if (m < rows) {
          const float *from = x + (size_t)m * W::K + row * PER_ROW;
          if constexpr (W::BITS == 32) {
            float v = from[0];
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[m][c] = fmaf(bits_to_float(words[c]), v, sums[m][c]);
          } else {
            float v = from[0], next = row * 2 + 1 < W::K ? from[1] : 0.f;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              sums[m][c] = fmaf(bits_to_float(words[c] << 16), v, sums[m][c]);
              sums[m][c] = fmaf(bits_to_float(words[c] & 0xffff0000u), next, sums[m][c]);
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
    if (m < rows) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float sum = sums[m][c];
#pragma unroll
        for (int apart = 16; apart >= 4; apart /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
        if (lane < 4) parts[split][m][local * 16 + lane * 4 + c] = sum;
      }
    }
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
  finish_tile<CHANNELS, STRIDE, WARPS * 32>(&parts[0][0][0], rows, first_row, blockIdx.x * CHANNELS, BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
