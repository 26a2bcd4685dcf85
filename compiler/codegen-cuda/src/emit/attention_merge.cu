// Joins the partials of a token: one warp per head, four to a block.

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
KERNEL(const float *__restrict__ partials, const int *__restrict__ positions, void *out, u64 span_count) {
  __shared__ float scratch[WARPS][C::HEAD_DIM];
  begin_after_launches();
  const int warp = threadIdx.x / 32;
  const int head = blockIdx.x * WARPS + warp, token = blockIdx.y, spans = (int)span_count;
  if (head >= HEADS) return;
  const int position = positions[token];
  const float *from =
      partials + (((size_t)token * C::KV_HEADS + head / GROUP) * spans * GROUP + head % GROUP) * PARTIAL;
  float y[CHUNKS];
  join_partials(from, GROUP * PARTIAL, first_seen(position) / SPAN, min((position + SPAN) / SPAN, spans), 0, y);
  store_result(out, token, head, y, scratch[warp]);
}
