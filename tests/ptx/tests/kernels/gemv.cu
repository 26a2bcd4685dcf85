// y = W x for weights of 4 bits: eight to a word, biased by 8, one f16 scale for 128. A warp computes a row. A word
// holds weights 0, 2, 4, 6 in its low half and 1, 3, 5, 7 in its high half, so that masks give pairs.
typedef unsigned short f16;

__device__ __forceinline__ float wide(f16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ unsigned fma2(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ unsigned sub2(unsigned a, unsigned b) {
  unsigned d;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ unsigned masked(unsigned a, unsigned mask, unsigned bits) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}

extern "C" __global__ void __launch_bounds__(128)
gemv_4bit(const unsigned* __restrict__ w, const f16* __restrict__ scales, const f16* __restrict__ x,
          float* __restrict__ y, int rows) {
  constexpr int depth = 2048;
  __shared__ __align__(16) f16 shared_x[depth];
  for (int i = threadIdx.x; i < depth / 8; i += 128) ((uint4*)shared_x)[i] = ((const uint4*)x)[i];
  __syncthreads();
  int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const uint4* words = (const uint4*)(w + (size_t)row * (depth / 8));
  float sum = 0.f;
#pragma unroll
  for (int step = 0; step < depth / 1024; ++step) {
    int at = step * 32 + lane;
    uint4 q = words[at];
    const unsigned* pq = &q.x;
    float part = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned* px = (const unsigned*)(shared_x + at * 32 + j * 8);
      unsigned both = 0;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        // 1024 + q as f16, then less 1032.
        unsigned pair = sub2(masked(pq[j] >> (4 * p), 0x000f000fu, 0x64006400u), 0x64086408u);
        both = fma2(pair, px[p], both);
      }
      part += wide((f16)both) + wide((f16)(both >> 16));
    }
    sum = fmaf(part, wide(scales[(size_t)row * (depth / 128) + at / 4]), sum);
  }
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) sum += __shfl_down_sync(~0u, sum, o);
  if (lane == 0) y[row] = sum;
}
