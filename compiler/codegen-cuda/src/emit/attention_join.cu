// Partials of a head, joined.

/// Elements `element + lane + 32 c` of a head's result: its partials of spans `first` to `last` stand `apart` floats from each other, the
/// first of all spans at `partials`. Eight spans are loaded at once.
template <int COUNT>
__device__ __forceinline__ void join_partials(const float *partials, size_t apart, int first, int last,
                                              int element, float (&y)[COUNT]) {
  constexpr int AT_ONCE = 8;
  const int lane = threadIdx.x % 32;
  float most = minus_infinity(), total = 0.f;
#pragma unroll
  for (int c = 0; c < COUNT; ++c) y[c] = 0.f;
  for (int span = first; span < last; span += AT_ONCE) {
    float mosts[AT_ONCE], totals[AT_ONCE], sums[AT_ONCE][COUNT];
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s) {
      const bool there = span + s < last;
      const float *from = partials + (size_t)(span + s) * apart;
      mosts[s] = minus_infinity(), totals[s] = 0.f;
      if (there) {
        Two pair = *(const Two *)(from + C::HEAD_DIM);
        mosts[s] = bits_to_float(pair.x), totals[s] = bits_to_float(pair.y);
      }
#pragma unroll
      for (int c = 0; c < COUNT; ++c) {
        const int d = element + lane + 32 * c;
        sums[s][c] = there && (C::HEAD_DIM % 32 == 0 || d < C::HEAD_DIM) ? from[d] : 0.f;
      }
    }
    float joined = most;
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s) joined = fmaxf(joined, mosts[s]);
    const float before = exp2f(most - finite(joined));
    most = joined, total *= before;
#pragma unroll
    for (int c = 0; c < COUNT; ++c) y[c] *= before;
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s) {
      const float factor = exp2f(mosts[s] - finite(joined));
      total = fmaf(totals[s], factor, total);
#pragma unroll
      for (int c = 0; c < COUNT; ++c) y[c] = fmaf(sums[s][c], factor, y[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < COUNT; ++c) y[c] = __fdiv_rn(y[c], total);
}
