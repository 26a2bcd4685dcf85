// out[r, :] = x[rows[r], :]. One block per row.

extern "C" __global__ void __launch_bounds__(256)
KERNEL(const float *x, const int *rows, float *out) {
  begin_after_launches();
  const float *from = x + (size_t)rows[blockIdx.x] * DIM;
  for (int i = threadIdx.x; i < DIM; i += 256) out[blockIdx.x * (size_t)DIM + i] = from[i];
}
