// Activations of many rows as bf16, with which tensor cores multiply: rows of `PADDED` numbers, zeros behind the last.
// One block per row.

extern "C" __global__ void __launch_bounds__(256) KERNEL(const u8 *x, u32 *out) {
  begin_after_launches();
  const size_t row = blockIdx.x;
  for (int i = threadIdx.x; i < PADDED / 2; i += 256) {
    float pair[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int k = 2 * i + j;
      pair[j] = 0.f;
      if (k < K) {
        if constexpr (INT8) {
          const u8 *from = x + row * Int8Rows<K>::STRIDE;
          pair[j] = *(const float *)(from + Int8Rows<K>::SCALES + k / 32 * 4) * (float)(i8)from[k];
        } else {
          pair[j] = ((const float *)x)[row * K + k];
        }
      }
    }
    out[row * (PADDED / 2) + i] = bf16_pair(pair[0], pair[1]);
  }
}
