// y[m, n] = sum_k x[m, k] w[n, k] for many rows of f32 by f32 weights, in f32 throughout: tiles of 64 rows by 64 channels.
// An uncompressed artifact computes what its checkpoint does, so nothing is rounded on the way.

constexpr int TILE_ROWS = 64, TILE_CHANNELS = 64, STEP = 16, THREADS = 256;
constexpr int OUT_STRIDE = TILE_CHANNELS + 4;

union Shared {
  struct { float x[STEP][TILE_ROWS + 4]; float w[STEP][TILE_CHANNELS + 4]; } stage;
  float tile[TILE_ROWS][OUT_STRIDE];
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
KERNEL(const float *x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  begin_after_launches();
  __shared__ alignas(16) Shared shared;
  const int thread = threadIdx.x, rows = (int)row_count;
  const int first_row = blockIdx.y * TILE_ROWS, first = blockIdx.x * TILE_CHANNELS;
  const int my_row = thread / 16 * 4, my_channel = thread % 16 * 4;
  float sums[4][4] = {};
  for (int step = 0; step < W::K; step += STEP) {
#pragma unroll
    for (int i = thread; i < STEP * TILE_ROWS; i += THREADS) {
      int r = i / STEP, k = i % STEP;
      bool there = first_row + r < rows && step + k < W::K;
      shared.stage.x[k][r] = there ? x[(size_t)(first_row + r) * W::K + step + k] : 0.f;
    }
#pragma unroll
    for (int i = thread; i < STEP * TILE_CHANNELS; i += THREADS) {
      int k = i / TILE_CHANNELS, c = i % TILE_CHANNELS, block = (first + c) / 16;
      bool there = block * 16 < W::N && step + k < W::K;
      shared.stage.w[k][c] = there ? *(const float *)(packed + (size_t)block * W::BLOCK + (step + k) * 64 + c % 16 * 4) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = shared.stage.x[k][my_row + i], b[i] = shared.stage.w[k][my_channel + i];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) shared.tile[my_row + i][my_channel + j] = sums[i][j];
  __syncthreads();
  finish_tile<TILE_CHANNELS, OUT_STRIDE, THREADS>(&shared.tile[0][0], min(TILE_ROWS, rows - first_row), first_row, first,
                                                   BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
