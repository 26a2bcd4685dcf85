// Kernels over rows of f32: one block of 256 threads per row. `OPERATION` and the sizes are generated.

enum { RMS_NORM, LAYER_NORM, SOFTMAX, QUANTIZE, ADD, MUL, SILU, GELU, SLICE };

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

/// Stores a row as f32 or as int8 codes; `value` gives its numbers.
template <typename Value>
__device__ __forceinline__ void store_row(void *out, Value value) {
  if constexpr (INT8) {
    u8 *row = (u8 *)out + blockIdx.x * (size_t)Int8Rows<DIM>::STRIDE;
    for (int group = threadIdx.x / 32; group < DIM / 32; group += 8)
      store_int8_group<DIM>(row, group, value(group * 32 + threadIdx.x % 32));
  } else {
    float *row = (float *)out + blockIdx.x * (size_t)DIM;
    for (int i = threadIdx.x; i < DIM; i += 256) row[i] = value(i);
  }
}

extern "C" __global__ void __launch_bounds__(256) KERNEL(PARAMETERS) {
  __shared__ float parts[8];
  const float *x = a + blockIdx.x * (size_t)DIM;
  if constexpr (OPERATION == RMS_NORM) {
    float squares = 0.f;
    for (int i = threadIdx.x; i < DIM; i += 256) squares = fmaf(x[i], x[i], squares);
    float inverse = __fdiv_rn(1.f, __fsqrt_rn(block_sum<8>(squares, parts) / DIM + EPS));
    store_row(out, [&](int i) { return GAIN ? x[i] * inverse * b[i] : x[i] * inverse; });
  } else if constexpr (OPERATION == LAYER_NORM) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < DIM; i += 256) sum += x[i];
    float mean = block_sum<8>(sum, parts) / DIM, squares = 0.f;
    for (int i = threadIdx.x; i < DIM; i += 256) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    float inverse = __fdiv_rn(1.f, __fsqrt_rn(block_sum<8>(squares, parts) / DIM + EPS));
    store_row(out, [&](int i) { return (x[i] - mean) * inverse * b[i] + c[i]; });
  } else if constexpr (OPERATION == SOFTMAX) {
    float most = -__int_as_float(0x7f800000);
    for (int i = threadIdx.x; i < DIM; i += 256) most = fmaxf(most, x[i]);
    most = block_max<8>(most, parts);
    float sum = 0.f;
    for (int i = threadIdx.x; i < DIM; i += 256) sum += expf(x[i] - most);
    float inverse = __fdiv_rn(1.f, block_sum<8>(sum, parts));
    store_row(out, [&](int i) { return expf(x[i] - most) * inverse; });
  } else if constexpr (OPERATION == SLICE) {
    float *row = (float *)out + blockIdx.x * (size_t)LENGTH;
    for (int i = threadIdx.x; i < LENGTH; i += 256) row[i] = x[START + i];
  } else {
    const float *y = b + blockIdx.x * (size_t)DIM;
    store_row(out, [&](int i) {
      if constexpr (OPERATION == ADD) return x[i] + y[i];
      else if constexpr (OPERATION == MUL) return x[i] * y[i];
      else if constexpr (OPERATION == SILU) return silu(x[i]);
      else if constexpr (OPERATION == GELU) return gelu(x[i]);
      else return x[i];
    });
  }
}
