// Stores keys and values of every token: one warp per head of keys or values, four to a block.

extern "C" __global__ void __launch_bounds__(128)
KERNEL(const float *k, const float *v, const int *positions,
       const int *sequences, const u32 *tables, u64 stride, u8 *keys, u8 *values) {
  begin_after_launches();
  __shared__ float heads[4][C::HEAD_DIM];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int item = blockIdx.x * 4 + warp, token = blockIdx.y;
  if (item >= 2 * C::KV_HEADS) return;
  const int head = item % C::KV_HEADS;
  const bool is_value = item >= C::KV_HEADS;
  const float *from = (is_value ? v : k) + ((size_t)token * C::KV_HEADS + head) * C::HEAD_DIM;
  for (int d = lane; d < C::HEAD_DIM; d += 32) heads[warp][d] = from[d];
  const Paging paging = {positions, sequences, tables, stride};
  const int position = positions[token];
  const size_t block = block_offset(paging.page(sequences[token], position), head);
  if (is_value) store_head<true>(values + block, position % C::PAGE_LEN, heads[warp]);
  else store_head<false>(keys + block, position % C::PAGE_LEN, heads[warp]);
}
