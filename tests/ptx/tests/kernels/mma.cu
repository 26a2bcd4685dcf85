// Tensor-core products: 64x64 tiles over a double buffer filled by cp.async, and 8-bit integers.
typedef unsigned short bf16;
__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(void* into, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(into)), "l"(from) : "memory");
}
__device__ __forceinline__ void load4(unsigned (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c[M,N] = a[M,K] b[N,K]^T
extern "C" __global__ void __launch_bounds__(128)
gemm_bf16(const bf16* __restrict__ a, const bf16* __restrict__ b, float* __restrict__ c, int n, int depth) {
  constexpr int tile = 64, step = 32, pitch = 40;
  __shared__ __align__(16) bf16 tile_a[2][tile][pitch];
  __shared__ __align__(16) bf16 tile_b[2][tile][pitch];
  int t = threadIdx.x, lane = t % 32, wm = t / 32 % 2, wn = t / 64;
  int row0 = blockIdx.y * tile, column0 = blockIdx.x * tile;
  float sums[2][4][4] = {};
  auto load = [&](int stage, int k0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int at = t + i * 128, r = at / 4, k = at % 4 * 8;
      copy16(&tile_a[stage][r][k], a + (size_t)(row0 + r) * depth + k0 + k);
      copy16(&tile_b[stage][r][k], b + (size_t)(column0 + r) * depth + k0 + k);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  load(0, 0);
  int steps = depth / step;
  for (int s = 0; s < steps; ++s) {
    if (s + 1 < steps) {
      load((s + 1) % 2, (s + 1) * step);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < step; k += 16) {
      unsigned fa[2][4], fb[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load4(fa[i], &tile_a[s % 2][wm * 32 + i * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load4(fb[j], &tile_b[s % 2][wn * 32 + j * 16 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sums[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int r = row0 + wm * 32 + i * 16 + lane / 4, k = column0 + wn * 32 + j * 8 + lane % 4 * 2;
      *(float2*)&c[(size_t)r * n + k] = make_float2(sums[i][j][0], sums[i][j][1]);
      *(float2*)&c[(size_t)(r + 8) * n + k] = make_float2(sums[i][j][2], sums[i][j][3]);
    }
}

// One warp: c[16,8] = a[16,32] b[8,32]^T of signed bytes, straight from global memory.
extern "C" __global__ void mma_s8(const int* __restrict__ a, const int* __restrict__ b, int* __restrict__ c) {
  int lane = threadIdx.x, row = lane / 4, k = lane % 4;
  int a0 = a[row * 8 + k], a1 = a[(row + 8) * 8 + k], a2 = a[row * 8 + k + 4], a3 = a[(row + 8) * 8 + k + 4];
  int b0 = b[row * 8 + k], b1 = b[row * 8 + k + 4];
  int d0, d1, d2, d3;
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
               : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(7));
  c[row * 8 + k * 2] = d0; c[row * 8 + k * 2 + 1] = d1; c[(row + 8) * 8 + k * 2] = d2; c[(row + 8) * 8 + k * 2 + 1] = d3;
}

// out[8,8] = in[8,8]^T of 16-bit elements, through ldmatrix.trans and stmatrix.
extern "C" __global__ void transpose(const bf16* __restrict__ in, bf16* __restrict__ out) {
  __shared__ __align__(16) bf16 from[8][8];
  __shared__ __align__(16) bf16 into[8][8];
  int lane = threadIdx.x;
  from[lane / 4][lane % 4 * 2] = in[lane * 2];
  from[lane / 4][lane % 4 * 2 + 1] = in[lane * 2 + 1];
  __syncwarp();
  unsigned r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(shared_address(&from[lane % 8][0])) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(&into[lane % 8][0])), "r"(r) : "memory");
#else
  *(unsigned*)&into[lane / 4][lane % 4 * 2] = r;
#endif
  __syncwarp();
  out[lane * 2] = into[lane / 4][lane % 4 * 2];
  out[lane * 2 + 1] = into[lane / 4][lane % 4 * 2 + 1];
}
