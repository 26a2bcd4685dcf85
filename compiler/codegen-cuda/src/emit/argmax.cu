// tokens[r] = the largest of logits[r, 0..vocab], the lowest of equals; what is not a number is never chosen as long as a number
// is there, and without any the answer is 0. One block per row.

constexpr int THREADS = 1024;

struct Likeliest {
  float logit;
  u32 token;

  __device__ __forceinline__ void meet(float other, u32 at) {
    if (other > logit || (other == logit && at < token)) logit = other, token = at;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
KERNEL(const float *logits, u32 *tokens, u64 vocab) {
  begin_after_launches();
  __shared__ Likeliest warps[THREADS / 32];
  const float *row = logits + blockIdx.x * vocab;
  const int lane = threadIdx.x % 32;
  Likeliest best = {-__int_as_float(0x7f800000), 0};
  const u32 fours = vocab % 4 == 0 ? (u32)(vocab / 4) : 0;
#pragma unroll 8
  for (u32 i = threadIdx.x; i < fours; i += THREADS) {
    Four four = ((const Four *)row)[i];
    float logits[4] = {bits_to_float(four.x), bits_to_float(four.y), bits_to_float(four.z), bits_to_float(four.w)};
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
      if (logits[j] > best.logit) best.logit = logits[j], best.token = 4 * i + j;
  }
#pragma unroll 4
  for (u32 i = 4 * fours + threadIdx.x; i < vocab; i += THREADS)
    if (row[i] > best.logit) best.logit = row[i], best.token = i;
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2)
    best.meet(__shfl_xor_sync(ALL_LANES, best.logit, apart), __shfl_xor_sync(ALL_LANES, best.token, apart));
  if (lane == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x < 32) {
    best = warps[lane];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2)
      best.meet(__shfl_xor_sync(ALL_LANES, best.logit, apart), __shfl_xor_sync(ALL_LANES, best.token, apart));
    if (lane == 0) tokens[blockIdx.x] = best.token;
  }
}
