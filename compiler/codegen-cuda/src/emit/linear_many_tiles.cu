// y[m, n] = sum_k x[m, k] w[n, k] for many rows: tiles of 128 rows by 64 channels, multiplied as bf16 by tensor cores.
//
// Activations are bf16 rows of `PADDED` numbers, copied to shared memory asynchronously. Weights are decoded there, eight inputs
// of a channel by a thread, scales folded in before rounding to bf16. Two stages: while one is multiplied, the next is fetched.

constexpr int TILE_ROWS = 128, TILE_CHANNELS = 64, STEP = 32;
constexpr int STRIDE = STEP + 8;  // Rows of eight matrices of 16 bytes then lie in different banks.
constexpr int THREADS = 256;
constexpr int STEPS = PADDED / STEP;
constexpr int OUT_STRIDE = TILE_CHANNELS + 4;

struct Stage { u16 x[TILE_ROWS][STRIDE]; u16 w[TILE_CHANNELS][STRIDE]; };
union Shared { Stage stages[2]; float tile[TILE_ROWS][OUT_STRIDE]; };

__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void *p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
KERNEL(const u16 *x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  begin_after_launches();
  __shared__ alignas(128) Shared shared;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int rows = (int)row_count, first_row = blockIdx.y * TILE_ROWS, first = blockIdx.x * TILE_CHANNELS;
  // A thread decodes pair of quads `t` of one channel of each group.
  const int channel = thread / 64 * 16 + thread % 16, t = thread / 16 % 4;
  const bool has_block = first + thread / 64 * 16 < W::N;
  const u8 *block = packed + W::HEADER + (size_t)(has_block ? first / 16 + thread / 64 : 0) * W::BLOCK;
  Table table;
  table.load(packed);

  float weights[8] = {};
  auto fetch_x = [&](int stage, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int at = thread + i * THREADS, r = at / 4, k = at % 4 * 8;
      bool there = first_row + r < rows;
      copy_async(shared_address(&shared.stages[stage].x[r][k]), x + (size_t)(there ? first_row + r : 0) * PADDED + step * STEP + k, there ? 16 : 0);
    }
    commit_copies();
  };
  auto store_w = [&](int stage) {
    Four four;
    four.x = bf16_pair(weights[0], weights[1]), four.y = bf16_pair(weights[2], weights[3]);
    four.z = bf16_pair(weights[4], weights[5]), four.w = bf16_pair(weights[6], weights[7]);
    *(Four *)&shared.stages[stage].w[channel][8 * t] = four;
  };

  float sums[2][4][4] = {};
  const int warp_row = warp % 4 * 32, warp_channel = warp / 4 * 32;
  fetch_x(0, 0);
  decode_octet(table, block, thread % 16, t, weights);
  store_w(0);
  for (int step = 0; step < STEPS; ++step) {
    const int now = step % 2;
    const bool more = step + 1 < STEPS;
    wait_for_copies<0>();
    __syncthreads();
    if (more) {
      fetch_x(1 - now, step + 1);
      decode_octet(table, block, thread % 16, (step + 1) * 4 + t, weights);
    }
    const Stage &stage = shared.stages[now];
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
      u32 a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_matrices(a[i], &stage.x[warp_row + i * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrices(b[j], &stage.w[warp_channel + j * 16 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
    if (more) store_w(1 - now);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int r = warp_row + i * 16 + lane / 4, c = warp_channel + j * 8 + lane % 4 * 2;
      shared.tile[r][c] = sums[i][j][0], shared.tile[r][c + 1] = sums[i][j][1];
      shared.tile[r + 8][c] = sums[i][j][2], shared.tile[r + 8][c + 1] = sums[i][j][3];
    }
  __syncthreads();
  finish_tile<TILE_CHANNELS, OUT_STRIDE, THREADS>(&shared.tile[0][0], min(TILE_ROWS, rows - first_row), first_row, first,
                                                   BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
