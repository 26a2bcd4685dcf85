// Rotates heads: one block per token.

extern "C" __global__ void __launch_bounds__(256)
KERNEL(const float *x, const float *rope, float *out) {
  begin_after_launches();
  constexpr int HALF = HEAD_DIM / 2;
  const size_t token = blockIdx.x;
  const float *cosines = rope + token * HEAD_DIM, *sines = cosines + HALF;
  for (int i = threadIdx.x; i < HEADS * HALF; i += 256) {
    size_t at = (token * HEADS + i / HALF) * HEAD_DIM + i % HALF;
    float a = x[at], b = x[at + HALF], cosine = cosines[i % HALF], sine = sines[i % HALF];
    out[at] = a * cosine - b * sine;
    out[at + HALF] = b * cosine + a * sine;
  }
}
