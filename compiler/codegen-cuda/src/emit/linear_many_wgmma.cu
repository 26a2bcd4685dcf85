// y[m, n] = sum_k x[m, k] w[n, k] for many rows: tiles of 256 rows by 128 channels, multiplied as bf16 by `wgmma`.
//
// Both operands lie in shared memory in rows of 64 numbers, whose pieces of 16 bytes are swizzled as the hardware expects.
// Activations are bf16 rows of `PADDED` numbers, copied there asynchronously. Weights are decoded there once for all 256 rows,
// a group of 32 inputs of a channel by a thread, scales folded in before rounding to bf16.
//
// Three stages: while a step is multiplied, the next is fetched and decoded; where that goes, the step before the last was read,
// which every warp has waited for before the barrier.

constexpr int TILE_ROWS = 256, TILE_CHANNELS = 128, STEP = 64, STAGES = 3;
constexpr int THREADS = 256;  // Two warpgroups; each multiplies 64 rows of either half of the tile.
constexpr int HALF = TILE_ROWS / 2;
constexpr int STEPS = (PADDED + STEP - 1) / STEP;
constexpr int OUT_STRIDE = TILE_CHANNELS + 4;

struct Stage { u16 x[TILE_ROWS][STEP]; u16 w[TILE_CHANNELS][STEP]; };
union Shared { Stage stages[STAGES]; float tile[HALF][OUT_STRIDE]; };
constexpr int SWIZZLE_ALIGN = 1024;
static_assert(sizeof(Shared) + SWIZZLE_ALIGN == SHARED_BYTES, "as much as the launch gives");

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/// Piece `p`, of eight numbers, of a row.
__device__ __forceinline__ u16 *piece(u16 (*rows)[STEP], int row, int p) { return &rows[row][(p ^ row % 8) * 8]; }

/// 16 bytes, or zeros instead.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

/// What `wgmma` takes for a matrix of rows of 128 swizzled bytes: eight rows are 1024 bytes apart from the next eight.
__device__ __forceinline__ u64 descriptor(const u16 *p) {
  return (u64)(shared_address(p) >> 4 & 0x3fff) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

#define SUMS_8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])

/// c += a b for 64 rows by 128 channels by 16 inputs.
__device__ __forceinline__ void multiply(float (&c)[64], u64 a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
      "%62,%63}, %64, %65, 1, 1, 1, 0, 0;"
      : SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24), SUMS_8(32), SUMS_8(40), SUMS_8(48), SUMS_8(56)
      : "l"(a), "l"(b)
      : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const u16 *__restrict__ x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  begin_after_launches();
  extern __shared__ u8 given[];
  Shared &shared = *(Shared *)(given + (SWIZZLE_ALIGN - shared_address(given) % SWIZZLE_ALIGN) % SWIZZLE_ALIGN);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warpgroup = thread / 128;
  const int rows = (int)row_count, first_row = blockIdx.y * TILE_ROWS, first = blockIdx.x * TILE_CHANNELS;
  // A warp decodes a block of 16 channels, half of it the first group of a step and half the second.
  const bool has_block = first + warp * 16 < W::N;
  const u8 *block = packed + W::HEADER + (size_t)(has_block ? first / 16 + warp : 0) * W::BLOCK;
  Table table;
  table.load(packed);

  auto fetch_x = [&](Stage &stage, int step) {
#pragma unroll
    for (int i = 0; i < TILE_ROWS * 8 / THREADS; ++i) {
      int at = thread + i * THREADS, r = at / 8, p = at % 8;
      bool there = first_row + r < rows;
      // Of a last step of 32 inputs the second half is not multiplied.
      if (PADDED % STEP == 0 || step * STEP + p * 8 < PADDED)
        copy_async(piece(stage.x, r, p), x + (size_t)(there ? first_row + r : 0) * PADDED + step * STEP + p * 8, there);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  auto decode_w = [&](Stage &stage, int step) {
    const int group = step * 2 + lane / 16;
    if (PADDED % STEP == 0 || group * 32 < PADDED) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float weights[8];
        decode_octet(table, block, lane % 16, group * 4 + t, weights);
        Four four;
        four.x = bf16_pair(weights[0], weights[1]), four.y = bf16_pair(weights[2], weights[3]);
        four.z = bf16_pair(weights[4], weights[5]), four.w = bf16_pair(weights[6], weights[7]);
        *(Four *)piece(stage.w, warp * 16 + lane % 16, lane / 16 * 4 + t) = four;
      }
    }
  };

  float sums[2][64] = {};
  auto multiply_16 = [&](const Stage &stage, int k) {
    u64 b = descriptor(&stage.w[0][k]);
#pragma unroll
    for (int half = 0; half < 2; ++half) multiply(sums[half], descriptor(&stage.x[half * HALF + warpgroup * 64][k]), b);
  };
  fetch_x(shared.stages[0], 0);
  decode_w(shared.stages[0], 0);
  for (int step = 0; step < STEPS; ++step) {
    const Stage &now = shared.stages[step % STAGES];
    // What threads and their copies wrote is for the hardware to read.
    asm volatile("cp.async.wait_group 0;\nfence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    multiply_16(now, 0), multiply_16(now, 16);
    if (PADDED % STEP == 0 || step + 1 < STEPS) multiply_16(now, 32), multiply_16(now, 48);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (step + 1 < STEPS) {
      Stage &next = shared.stages[(step + 1) % STAGES];
      fetch_x(next, step + 1);
      decode_w(next, step + 1);
    }
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Before: products have read all there was, and the first half is stored.
    __syncthreads();
    if (first_row + half * HALF >= rows) break;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      shared.tile[thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[half][i];
    __syncthreads();
    const int from = first_row + half * HALF;
    finish_tile<TILE_CHANNELS, OUT_STRIDE, THREADS>(&shared.tile[0][0], min(HALF, rows - from), from, first, BIAS_ARGUMENT,
                                                     RESIDUAL_ARGUMENT, out);
  }
}
