// RMSNorm of bf16 rows with a residual; one block per row.
typedef unsigned short bf16;
__device__ __forceinline__ float widen(unsigned half) { return __uint_as_float(half << 16); }
__device__ __forceinline__ unsigned narrow(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

extern "C" __global__ void __launch_bounds__(128)
rms_norm(const bf16* __restrict__ x, const bf16* __restrict__ residual, const bf16* __restrict__ weight,
         bf16* __restrict__ out, float eps) {
  constexpr int width = 1024;
  __shared__ float part[4];
  const size_t row = (size_t)blockIdx.x * width;
  const int at = threadIdx.x * 8;
  float v[8], squares = 0.f;
  uint4 a = *(const uint4*)(x + row + at), b = *(const uint4*)(residual + row + at);
  const unsigned *pa = &a.x, *pb = &b.x;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    unsigned ha = i % 2 ? pa[i / 2] >> 16 : pa[i / 2] & 0xffff, hb = i % 2 ? pb[i / 2] >> 16 : pb[i / 2] & 0xffff;
    v[i] = widen(ha) + widen(hb);
    squares = fmaf(v[i], v[i], squares);
  }
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) squares += __shfl_xor_sync(~0u, squares, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = squares;
  __syncthreads();
  float scale = rsqrtf((part[0] + part[1] + part[2] + part[3]) / width + eps);
  uint4 w = *(const uint4*)(weight + at), o;
  const unsigned* pw = &w.x;
  unsigned* po = &o.x;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    po[i] = narrow(v[2 * i] * scale * widen(pw[i] & 0xffff), v[2 * i + 1] * scale * widen(pw[i] >> 16));
  *(uint4*)(out + row + at) = o;
}
