// Kernels over rows of f32: one block of `THREADS` threads per row, four neighbouring numbers to a thread where the row is made
// of fours. `OPERATION` and the sizes are generated.

enum { RMS_NORM, LAYER_NORM, SOFTMAX, QUANTIZE, ADD, MUL, SILU, GELU, SLICE };

constexpr int WARPS = THREADS / 32;
/// Neighbours that a thread has, and how many times it has so many.
constexpr int NEAR = DIM % 4 == 0 ? 4 : 1;
constexpr int TIMES = (DIM + NEAR * THREADS - 1) / (NEAR * THREADS);

struct Near { float v[NEAR]; };

/// First of the numbers that a thread has the `time`th time.
__device__ __forceinline__ int place(int time) { return (time * THREADS + threadIdx.x) * NEAR; }

/// What stands there, zeros behind the end.
__device__ __forceinline__ Near load(const float *row, int time) {
  const int at = place(time);
  Near near = {};
  if (at < DIM) {
    u32 bits[4];
    if constexpr (NEAR == 4) *(Four *)bits = *(const Four *)(row + at);
    else bits[0] = *(const u32 *)(row + at);
#pragma unroll
    for (int i = 0; i < NEAR; ++i) near.v[i] = bits_to_float(bits[i]);
  }
  return near;
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

/// A row that is read more than once: kept in registers if it is not too long.
struct Row {
  static constexpr bool KEPT = NEAR * TIMES <= 16;
  const float *from;
  Near kept[KEPT ? TIMES : 1];

  __device__ __forceinline__ void begin(const float *row) {
    from = row;
    if constexpr (KEPT)
#pragma unroll
      for (int time = 0; time < TIMES; ++time) kept[time] = load(row, time);
  }
  __device__ __forceinline__ Near get(int time) const {
    if constexpr (KEPT) return kept[time];
    else return load(from, time);
  }
};

/// Quantizes the fours of eight neighbouring lanes, which are a group of 32.
__device__ __forceinline__ void store_int8_four(u8 *row, int at, const Near &near) {
  typedef Int8Rows<DIM> Rows;
  const int lane = threadIdx.x % 32;
  float most = 0.f;
  bool bad = false;
#pragma unroll
  for (int i = 0; i < NEAR; ++i) most = fmaxf(most, fabsf(near.v[i])), bad |= !(fabsf(near.v[i]) <= 3.402823466e38f);
#pragma unroll
  for (int apart = 1; apart < 8; apart *= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, apart));
  const bool broken = (__ballot_sync(ALL_LANES, bad) >> (lane & 24) & 0xff) != 0;
  float inverse = most > 0.f ? __fdiv_rn(127.f, most) : 0.f;
  u32 codes = 0;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < NEAR; ++i) {
    float scaled = near.v[i] * inverse;
    float low = scaled > -127.f ? scaled : -127.f;
    int code = __float2int_rn(low < 127.f ? low : 127.f);
    codes |= (u32)(code & 0xff) << (8 * i), sum += code;
  }
#pragma unroll
  for (int apart = 1; apart < 8; apart *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
  if (at < DIM) {
    *(u32 *)(row + at) = codes;
    if (lane % 8 == 0) {
      *(float *)(row + Rows::SCALES + at / 32 * 4) = broken ? __uint_as_float(0x7fc00000u) : __fdiv_rn(most, 127.f);
      *(int *)(row + Rows::SUMS + at / 32 * 4) = sum;
    }
  }
}

/// Stores a row as f32 or as int8 codes; `value` gives its numbers, of its time and place.
template <typename Value>
__device__ __forceinline__ void store_row(void *out, Value value) {
#pragma unroll
  for (int time = 0; time < TIMES; ++time) {
    const int at = place(time);
    const Near near = value(time);
    if constexpr (INT8) {
      store_int8_four((u8 *)out + blockIdx.x * (size_t)Int8Rows<DIM>::STRIDE, at, near);
    } else if (at < DIM) {
      float *to = (float *)out + blockIdx.x * (size_t)DIM + at;
      u32 bits[4];
#pragma unroll
      for (int i = 0; i < NEAR; ++i) bits[i] = __float_as_uint(near.v[i]);
      if constexpr (NEAR == 4) *(Four *)to = *(const Four *)bits;
      else *(u32 *)to = bits[0];
    }
  }
}

/// A sum over the row of what `term` makes of its numbers, zeros behind the end not counted.
template <typename Term>
__device__ __forceinline__ float row_sum(const Row &x, float *parts, Term term) {
  float sum = 0.f;
#pragma unroll
  for (int time = 0; time < TIMES; ++time) {
    const Near near = x.get(time);
    if (place(time) < DIM)
#pragma unroll
      for (int i = 0; i < NEAR; ++i) sum += term(near.v[i]);
  }
  return block_sum<WARPS>(sum, parts);
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(PARAMETERS) {
  __shared__ float parts[WARPS];
  const float *x = a + blockIdx.x * (size_t)(OPERATION == SLICE ? WHOLE : DIM);
  let_next_launch_begin();
  if constexpr (OPERATION == RMS_NORM || OPERATION == LAYER_NORM) {
    Row gain, bias, row;
    if (OPERATION == LAYER_NORM || GAIN) gain.begin(b);
    if (OPERATION == LAYER_NORM) bias.begin(c);
    wait_for_launches();
    row.begin(x);
    float mean = 0.f;
    if (OPERATION == LAYER_NORM) mean = row_sum(row, parts, [](float v) { return v; }) / DIM;
    float squares = row_sum(row, parts, [&](float v) { return (v - mean) * (v - mean); });
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
      if (place(time) < DIM)
#pragma unroll
        for (int i = 0; i < NEAR; ++i) most = fmaxf(most, near.v[i]);
    }
    most = block_max<WARPS>(most, parts);
    float inverse = __fdiv_rn(1.f, row_sum(row, parts, [&](float v) { return expf(v - most); }));
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
