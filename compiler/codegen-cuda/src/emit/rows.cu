// Kernels over rows of f32: one block of `THREADS` threads per row. `OPERATION` and the sizes are generated.

enum { RMS_NORM, LAYER_NORM, SOFTMAX, QUANTIZE, ADD, MUL, SILU, GELU, SLICE };

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

/// Stores a row as f32 or as int8 codes; `value` gives its numbers, of its time and place.
template <typename Value>
__device__ __forceinline__ void store_row(void *out, Value value) {
  if constexpr (INT8) {
    typedef Int8Rows<DIM> Rows;
    u8 *row = (u8 *)out + blockIdx.x * (size_t)Rows::STRIDE;
    quantize_row(value, [&](int time, const u32 *codes, float scale, int sum) {
      const int at = place(time);
      if (is_in_row(at)) {
        static_assert(!INT8 || NEAR == 4, "a word of codes for each thread");
        *(u32 *)(row + at) = codes[0];
        if (at % 32 == 0) {
          *(float *)(row + Rows::SCALES + at / 32 * 4) = scale;
          *(int *)(row + Rows::SUMS + at / 32 * 4) = sum;
        }
      }
    });
  } else {
#pragma unroll
    for (int time = 0; time < TIMES; ++time) {
      const int at = place(time);
      const Near near = value(time);
      if (is_in_row(at)) {
        float *to = (float *)out + blockIdx.x * (size_t)DIM + at;
        u32 bits[4];
#pragma unroll
        for (int i = 0; i < NEAR; ++i) bits[i] = __float_as_uint(near.v[i]);
        if constexpr (NEAR == 4) *(Four *)to = *(const Four *)bits;
        else *(u32 *)to = bits[0];
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(PARAMETERS) {
  __shared__ float parts[2][THREADS / 32];
  const float *x = a + blockIdx.x * (size_t)(OPERATION == SLICE ? WHOLE : DIM);
  let_next_launch_begin();
  if constexpr (OPERATION == RMS_NORM || OPERATION == LAYER_NORM) {
    Row gain, bias, row;
    if (OPERATION == LAYER_NORM || GAIN) gain.begin<true>(b);
    if (OPERATION == LAYER_NORM) bias.begin<true>(c);
    wait_for_launches();
    row.begin(x);
    float mean = 0.f;
    if (OPERATION == LAYER_NORM) mean = row_sum(row, parts[0], [](float v) { return v; }) / DIM;
    float squares = row_sum(row, parts[1], [&](float v) { return (v - mean) * (v - mean); });
    float inverse = __fdiv_rn(1.f, __fsqrt_rn(squares / DIM + EPS));
    store_row(out, [&](int time) {
      Near near = row.get(time), factor = {}, added = {};
      if (OPERATION == LAYER_NORM || GAIN) factor = gain.get(time);
      if (OPERATION == LAYER_NORM) added = bias.get(time);
#pragma unroll
      for (int i = 0; i < NEAR; ++i) {
        near.v[i] = (near.v[i] - mean) * inverse;
        if (OPERATION == LAYER_NORM || GAIN) near.v[i] *= factor.v[i];
        if (OPERATION == LAYER_NORM) near.v[i] += added.v[i];
      }
      return near;
    });
  } else if constexpr (OPERATION == SOFTMAX) {
    wait_for_launches();
    Row row;
    row.begin(x);
    float most = -__int_as_float(0x7f800000);
#pragma unroll
    for (int time = 0; time < TIMES; ++time) {
      const Near near = row.get(time);
      if (is_in_row(place(time)))
#pragma unroll
        for (int i = 0; i < NEAR; ++i) most = fmaxf(most, near.v[i]);
    }
    most = block_max<THREADS / 32>(most, parts[0]);
    float inverse = __fdiv_rn(1.f, row_sum(row, parts[1], [&](float v) { return expf(v - most); }));
    store_row(out, [&](int time) {
      Near near = row.get(time);
#pragma unroll
      for (int i = 0; i < NEAR; ++i) near.v[i] = expf(near.v[i] - most) * inverse;
      return near;
    });
  } else {
    wait_for_launches();
    const float *y = b + blockIdx.x * (size_t)DIM;
    store_row(out, [&](int time) {
      Near near = {}, other = {};
      if constexpr (OPERATION == SLICE) {
        // A part of a row begins anywhere.
#pragma unroll
        for (int i = 0; i < NEAR; ++i)
          if (place(time) + i < DIM) near.v[i] = x[START + place(time) + i];
      } else {
        near = load(x, time);
      }
      if constexpr (OPERATION == ADD || OPERATION == MUL) other = load(y, time);
#pragma unroll
      for (int i = 0; i < NEAR; ++i) {
        if constexpr (OPERATION == ADD) near.v[i] += other.v[i];
        else if constexpr (OPERATION == MUL) near.v[i] *= other.v[i];
        else if constexpr (OPERATION == SILU) near.v[i] = silu(near.v[i]);
        else if constexpr (OPERATION == GELU) near.v[i] = gelu(near.v[i]);
      }
      return near;
    });
  }
}
