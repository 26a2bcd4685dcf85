// Attention of any number of tokens in f32, where attention_mma.cu does not serve. Rows are the query heads of one KV head, token by
// token; 16 to a block.

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
KERNEL(const float *__restrict__ q, const int *__restrict__ positions, const int *__restrict__ sequences,
       const u32 *__restrict__ tables, u64 stride, const u8 *__restrict__ keys, const u8 *__restrict__ values, void *out,
       u64 token_count) {
  begin_after_launches();
  __shared__ Queries shared[WARPS];
  const int warp = threadIdx.x / 32, kv_head = blockIdx.x;
  const int tokens = (int)token_count;
  // Later tokens see most and come first.
  const int first = ((int)gridDim.y - 1 - (int)blockIdx.y) * WARPS * ROWS + warp * ROWS;
  if (first >= tokens * GROUP) return;
  Queries &queries = shared[warp];
  const Paging paging = {positions, sequences, tables, stride};
  int from[ROWS], to[ROWS], sequence[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    // Rows past the last repeat it; their results are not stored.
    int row = min(first + r, tokens * GROUP - 1), token = row / GROUP;
    int position = positions[token];
    from[r] = first_seen(position), to[r] = position + 1, sequence[r] = sequences[token];
    queries.load(r, q + ((size_t)token * HEADS + kv_head * GROUP + row % GROUP) * C::HEAD_DIM);
  }
  Gathered all;
  all.clear();
  // Rows of one sequence walk its pages together.
  bool done[ROWS] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (done[r]) continue;
    int low = from[r], high = to[r], mine[ROWS], until[ROWS];
#pragma unroll
    for (int o = 0; o < ROWS; ++o) {
      bool same = o >= r && !done[o] && sequence[o] == sequence[r];
      mine[o] = from[o], until[o] = same ? to[o] : 0;
      if (same) low = min(low, from[o]), high = max(high, to[o]), done[o] = true;
    }
    for (int position = low / 32 * 32; position < high; position += 32) {
      size_t block = block_offset(paging.page(sequence[r], position), kv_head);
      gather(all, queries, keys + block, values + block, position % C::PAGE_LEN, position, mine, until);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    int row = first + r;
    if (row < tokens * GROUP) {
      float y[CHUNKS];
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) y[c] = __fdiv_rn(all.sums[r][c], all.total[r]);
      store_result(out, row / GROUP, kv_head * GROUP + row % GROUP, y, queries.q[r]);
    }
  }
}
