// A row of `DIM` numbers of f32 that one block of `THREADS` threads has, `NEAR` neighbours to a thread, of which rows are made: one, four
// or eight.

/// How many times a thread has so many neighbours.
constexpr int TIMES = (DIM + NEAR * THREADS - 1) / (NEAR * THREADS);

struct Near { float v[NEAR]; };

/// Whether a place is one of the row's.
__device__ __forceinline__ bool is_in_row(int at) { return DIM % (NEAR * THREADS) == 0 || at < DIM; }

/// First of the numbers that a thread has the `time`th time.
__device__ __forceinline__ int place(int time) { return (time * THREADS + threadIdx.x) * NEAR; }

/// What stands there, zeros behind the end; `NOW` as of [`load_now`].
template <bool NOW = false>
__device__ __forceinline__ Near load(const float *row, int time) {
  const int at = place(time);
  Near near = {};
  if (is_in_row(at)) {
    if constexpr (NEAR % 4 == 0) {
#pragma unroll
      for (int i = 0; i < NEAR; i += 4) {
        const Four *from = (const Four *)(row + at + i);
        const Four four = NOW ? load_now(from) : *from;
        near.v[i] = bits_to_float(four.x), near.v[i + 1] = bits_to_float(four.y);
        near.v[i + 2] = bits_to_float(four.z), near.v[i + 3] = bits_to_float(four.w);
      }
    } else {
      near.v[0] = row[at];
    }
  }
  return near;
}

/// A row that is read more than once: kept in registers if it is not too long.
struct Row {
  static constexpr bool KEPT = NEAR * TIMES <= 16;
  const float *from;
  Near kept[KEPT ? TIMES : 1];

  /// `NOW`: before what is waited for next.
  template <bool NOW = false>
  __device__ __forceinline__ void begin(const float *row) {
    from = row;
    if constexpr (KEPT)
#pragma unroll
      for (int time = 0; time < TIMES; ++time) kept[time] = load<NOW>(row, time);
  }
  __device__ __forceinline__ Near get(int time) const {
    if constexpr (KEPT) return kept[time];
    else return load(from, time);
  }
};

/// What neighbouring lanes have, 32 numbers, as codes; `COUNT` such groups, which do not wait for each other.
template <int COUNT>
struct Quantized {
  static constexpr int LANES = 32 / NEAR, WORDS = NEAR < 4 ? 1 : NEAR / 4;
  /// A thread's own.
  u32 codes[COUNT][WORDS];
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
      broken[c] = (__ballot_sync(ALL_LANES, bad) >> (lane & (32 - LANES)) & ((1u << (LANES - 1) << 1) - 1)) != 0;
    }
#pragma unroll
    for (int apart = 1; apart < LANES; apart *= 2)
#pragma unroll
      for (int c = 0; c < COUNT; ++c) most[c] = fmaxf(most[c], __shfl_xor_sync(ALL_LANES, most[c], apart));
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const float factor = code_factor(most[c]);
      sums[c] = 0;
#pragma unroll
      for (int word = 0; word < WORDS; ++word) {
        float scaled[4] = {};
#pragma unroll
        for (int i = 0; i < 4 && i < NEAR; ++i) scaled[i] = near[c].v[4 * word + i] * factor;
        codes[c][word] = codes_of(scaled);
        sums[c] = __dp4a((int)codes[c][word], 0x01010101, sums[c]);
      }
      scales[c] = broken[c] ? __uint_as_float(0x7fc00000u) : code_scale(most[c]);
    }
    // Two sums, of 13 bits each, travel together.
#pragma unroll
    for (int c = 0; c < COUNT; c += 2) {
      int both = c + 1 < COUNT ? sums[c] + (sums[c + 1] << 16) : sums[c];
#pragma unroll
      for (int apart = 1; apart < LANES; apart *= 2) both += __shfl_xor_sync(ALL_LANES, both, apart);
      sums[c] = (int)(short)both;
      if (c + 1 < COUNT) sums[c + 1] = (both - sums[c]) >> 16;
    }
  }
};

/// Quantizes a row of which `value` gives the numbers of a time; `take` gets a time's codes, their scale and their sum.
template <typename Value, typename Take>
__device__ __forceinline__ void quantize_row(Value value, Take take) {
  constexpr int MOST = NEAR == 8 ? 2 : 4, COUNT = TIMES < MOST ? TIMES : MOST;
  // A row that is kept has no more than are quantized at once.
#pragma unroll 1
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

/// A sum over the row of what `term` makes of its numbers, zeros behind the end not counted; see [`block_sum_once`].
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
  return block_sum_once<THREADS / 32>(sum, parts);
}

/// What a row is divided by in an RMS norm, inverted.
__device__ __forceinline__ float inverse_rms(const Row &x, float *parts) {
  float squares = row_sum(x, parts, [](float v) { return v * v; });
  return __fdiv_rn(1.f, __fsqrt_rn(squares / DIM + EPS));
}
