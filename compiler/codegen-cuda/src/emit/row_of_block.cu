// A row of `DIM` numbers of f32 that one block of `THREADS` threads has: four neighbours to a thread where the row is made of fours.

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

/// Fours of eight neighbouring lanes, which are a group of 32, as codes.
struct Quantized {
  u32 codes;
  /// Of the group.
  float scale;
  int sum;

  __device__ __forceinline__ void make(const Near &near) {
    const int lane = threadIdx.x % 32;
    float most = 0.f;
    bool bad = false;
#pragma unroll
    for (int i = 0; i < NEAR; ++i) most = fmaxf(most, fabsf(near.v[i])), bad |= !(fabsf(near.v[i]) <= 3.402823466e38f);
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, apart));
    const bool broken = (__ballot_sync(ALL_LANES, bad) >> (lane & 24) & 0xff) != 0;
    const float inverse = most > 0.f ? __fdiv_rn(127.f, most) : 0.f;
    codes = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < NEAR; ++i) {
      float scaled = near.v[i] * inverse;
      float low = scaled > -127.f ? scaled : -127.f;
      int code = __float2int_rn(low < 127.f ? low : 127.f);
      codes |= (u32)(code & 0xff) << (8 * i), sum += code;
    }
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
    scale = broken ? __uint_as_float(0x7fc00000u) : __fdiv_rn(most, 127.f);
  }
};

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
  return block_sum<THREADS / 32>(sum, parts);
}

/// What a row is divided by in an RMS norm, inverted.
__device__ __forceinline__ float inverse_rms(const Row &x, float *parts) {
  float squares = row_sum(x, parts, [](float v) { return v * v; });
  return __fdiv_rn(1.f, __fsqrt_rn(squares / DIM + EPS));
}
