// The part that one span of the context has in a token's attention: a block per token, KV head and span. Its warps share out the
// positions, and what they gathered is joined in shared memory.

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
KERNEL(const float *__restrict__ q, const int *__restrict__ positions, const int *__restrict__ sequences,
       const u32 *__restrict__ tables, u64 stride, const u8 *__restrict__ keys, const u8 *__restrict__ values,
       float *__restrict__ partials, u64 span_count) {
  begin_after_launches();
  __shared__ Queries queries;
  __shared__ float parts[WARPS][ROWS][C::HEAD_DIM + 2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int spans = (int)span_count, span = blockIdx.x % spans, row = blockIdx.x / spans;
  const int token = row / C::KV_HEADS, kv_head = row % C::KV_HEADS;
  const int position = positions[token], sequence = sequences[token];
  const int low = max(first_seen(position), span * SPAN), high = min(position + 1, (span + 1) * SPAN);
  if (low >= high) return;
  const Paging paging = {positions, sequences, tables, stride};
  for (int first = 0; first < GROUP; first += ROWS) {
    int from[ROWS], to[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) from[r] = low, to[r] = first + r < GROUP ? high : 0;
    static_assert(WARPS == ROWS, "each warp loads a row and joins one");
    const int head = kv_head * GROUP + min(first + warp, GROUP - 1);
    queries.load(warp, q + ((size_t)token * HEADS + head) * C::HEAD_DIM);
    __syncthreads();
    Gathered all;
    all.clear();
    for (int at = low / 32 * 32 + warp * 32; at < high; at += WARPS * 32) {
      size_t block = block_offset(paging.page(sequence, at), kv_head);
      gather(all, queries, keys + block, values + block, at % C::PAGE_LEN, at, from, to);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        if (lane + 32 * c < C::HEAD_DIM) parts[warp][r][lane + 32 * c] = all.sums[r][c];
      if (lane == 0) parts[warp][r][C::HEAD_DIM] = all.most[r], parts[warp][r][C::HEAD_DIM + 1] = all.total[r];
    }
    __syncthreads();
    if (first + warp < GROUP) {
      float most = minus_infinity(), factors[WARPS], total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) most = fmaxf(most, parts[w][warp][C::HEAD_DIM]);
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        factors[w] = exp2f(parts[w][warp][C::HEAD_DIM] - finite(most));
        total += parts[w][warp][C::HEAD_DIM + 1] * factors[w];
      }
      float *to_partial = partials + ((size_t)blockIdx.x * GROUP + first + warp) * PARTIAL;
      for (int d = lane; d < C::HEAD_DIM; d += 32) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += parts[w][warp][d] * factors[w];
        to_partial[d] = sum;
      }
      if (lane == 0) to_partial[C::HEAD_DIM] = most, to_partial[C::HEAD_DIM + 1] = total;
    }
    __syncthreads();
  }
}
