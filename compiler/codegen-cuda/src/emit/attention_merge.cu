// Joins the partials of a token: one warp per head, four to a block.

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
KERNEL(const float *__restrict__ partials, const int *__restrict__ positions, void *out, u64 span_count) {
  __shared__ float scratch[WARPS][C::HEAD_DIM];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x * WARPS + warp, token = blockIdx.y, spans = (int)span_count;
  if (head >= HEADS) return;
  const int position = positions[token];
  float most = minus_infinity(), total = 0.f, sums[CHUNKS] = {};
  const int last = min((position + SPAN) / SPAN, spans);
  for (int span = first_seen(position) / SPAN; span < last; ++span) {
    const float *from =
        partials + ((((size_t)token * C::KV_HEADS + head / GROUP) * spans + span) * GROUP + head % GROUP) * PARTIAL;
    float later = from[C::HEAD_DIM], joined = fmaxf(most, later);
    float a = exp2f(most - finite(joined)), b = exp2f(later - finite(joined));
    most = joined;
    total = total * a + from[C::HEAD_DIM + 1] * b;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if (lane + 32 * c < C::HEAD_DIM) sums[c] = sums[c] * a + from[lane + 32 * c] * b;
  }
  float y[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) y[c] = __fdiv_rn(sums[c], total);
  store_result(out, token, head, y, scratch[warp]);
}
