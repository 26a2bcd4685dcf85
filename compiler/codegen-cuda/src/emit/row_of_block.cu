// A row of `DIM` numbers of f32 that one block of `THREADS` threads has: four neighbours to a thread where the row is made of fours.

/// Neighbours that a thread has, and how many times it has so many.
constexpr int NEAR = DIM % 4 == 0 ? 4 : 1;
constexpr int TIMES = (DIM + NEAR * THREADS - 1) / (NEAR * THREADS);

struct Near { float v[NEAR]; };

/// Whether a place is one of the row's.
__device__ __forceinline__ bool is_in_row(int at) { return DIM % (NEAR * THREADS) == 0 || at < DIM; }

/// First of the numbers that a thread has the `time`th time.
__device__ __forceinline__ int place(int time) { return (time * THREADS + threadIdx.x) * NEAR; }

/// What stands there, zeros behind the end.
__device__ __forceinline__ Near load(const float *row, int time) {
  const int at = place(time);
  Near near = {};
  if (is_in_row(at)) {
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

/// Fours of eight neighbouring lanes, which are a group of 32, as codes; `COUNT` such groups, which do not wait for each other.
template <int COUNT>
struct Quantized {
  u32 codes[COUNT];
  /// Of the group.
  float scales[COUNT];
  int sums[COUNT];

  __device__ __forceinline__ void make(const Near (&near)[COUNT]) {
    const int lane = threadIdx.x % 32;
    float most[COUNT];
    bool broken[COUNT];
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      most[c] = 0.f;
      bool bad = false;
#pragma unroll
      for (int i = 0; i < NEAR; ++i) most[c] = fmaxf(most[c], fabsf(near[c].v[i])), bad |= !(fabsf(near[c].v[i]) <= MOST_FLOAT);
      broken[c] = (__ballot_sync(ALL_LANES, bad) >> (lane & 24) & 0xff) != 0;
    }
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2)
#pragma unroll
      for (int c = 0; c < COUNT; ++c) most[c] = fmaxf(most[c], __shfl_xor_sync(ALL_LANES, most[c], apart));
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const float factor = code_factor(most[c]);
      float scaled[4] = {};
#pragma unroll
      for (int i = 0; i < NEAR; ++i) scaled[i] = near[c].v[i] * factor;
      codes[c] = codes_of(scaled);
      scales[c] = broken[c] ? __uint_as_float(0x7fc00000u) : code_scale(most[c]);
      sums[c] = __dp4a((int)codes[c], 0x01010101, 0);
    }
    // Two sums, of 13 bits each, travel together.
#pragma unroll
    for (int c = 0; c < COUNT; c += 2) {
      int both = c + 1 < COUNT ? sums[c] + (sums[c + 1] << 16) : sums[c];
#pragma unroll
      for (int apart = 1; apart < 8; apart *= 2) both += __shfl_xor_sync(ALL_LANES, both, apart);
      sums[c] = (int)(short)both;
      if (c + 1 < COUNT) sums[c + 1] = (both - sums[c]) >> 16;
    }
  }
};

/// Quantizes a row of which `value` gives the numbers of a time; `take` gets a time's codes, their scale and their sum.
template <typename Value, typename Take>
__device__ __forceinline__ void quantize_row(Value value, Take take) {
  constexpr int COUNT = TIMES < 4 ? TIMES : 4;
#pragma unroll
  for (int first = 0; first < TIMES; first += COUNT) {
    Near near[COUNT] = {};
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (first + i < TIMES) near[i] = value(first + i);
    Quantized<COUNT> quantized;
    quantized.make(near);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (first + i < TIMES) take(first + i, quantized.codes[i], quantized.scales[i], quantized.sums[i]);
  }
}

/// A sum over the row of what `term` makes of its numbers, zeros behind the end not counted.
template <typename Term>
__device__ __forceinline__ float row_sum(const Row &x, float *parts, Term term) {
  float sum = 0.f;
#pragma unroll
  for (int time = 0; time < TIMES; ++time) {
    const Near near = x.get(time);
    if (is_in_row(place(time)))
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
