// What follows the product of q, k and v: norm of heads, rotary embedding, store of keys and values in the cache. One warp per
// head, four to a block. A lane rotates elements `lane + 32 p` of both halves of a head.

extern "C" __global__ void __launch_bounds__(128)
KERNEL(const float *y GAIN_PARAMETERS, const float *rope, const int *positions, const int *sequences, const u32 *tables,
       u64 stride, u8 *keys, u8 *values, float *q) {
  constexpr int ALL_HEADS = HEADS + 2 * C::KV_HEADS, HALF = C::HEAD_DIM / 2, PAIRS = (HALF + 31) / 32;
  __shared__ float heads[4][C::HEAD_DIM];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int item = blockIdx.x * 4 + warp, token = blockIdx.y;
  let_next_launch_begin();
  if (item >= ALL_HEADS) return;
  const bool is_query = item < HEADS, is_value = item >= HEADS + C::KV_HEADS;
  const int kv_head = (item - HEADS) % C::KV_HEADS;
  const float *from = y + ((size_t)token * ALL_HEADS + item) * C::HEAD_DIM;
  const float *angles = rope + (size_t)token * C::HEAD_DIM;
  const float *gain = is_query ? Q_GAIN : K_GAIN;
  // What no launch of the step has written is asked for at once, and before those have ended.
  int sequence = 0, position = 0;
  if (!is_query) sequence = load_now(sequences + token), position = load_now(positions + token);
  float low[PAIRS], high[PAIRS], cosines[PAIRS], sines[PAIRS], low_gains[PAIRS], high_gains[PAIRS];
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = lane + 32 * p;
    const bool there = HALF % 32 == 0 || i < HALF;
    cosines[p] = there ? angles[i] : 0.f, sines[p] = there ? angles[i + HALF] : 0.f;
    if (QK_NORM) low_gains[p] = there ? gain[i] : 0.f, high_gains[p] = there ? gain[i + HALF] : 0.f;
  }
  size_t block = 0;
  if (!is_query) {
    const Paging paging = {positions, sequences, tables, stride};
    block = block_offset(paging.page(sequence, position), kv_head);
  }
  wait_for_launches();
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = lane + 32 * p;
    const bool there = HALF % 32 == 0 || i < HALF;
    low[p] = there ? from[i] : 0.f, high[p] = there ? from[i + HALF] : 0.f;
  }
  if (!is_value) {
    if constexpr (QK_NORM) {
      float squares = 0.f;
#pragma unroll
      for (int p = 0; p < PAIRS; ++p) squares = fmaf(low[p], low[p], fmaf(high[p], high[p], squares));
      const float inverse = __fdiv_rn(1.f, __fsqrt_rn(warp_sum(squares) / C::HEAD_DIM + EPS));
#pragma unroll
      for (int p = 0; p < PAIRS; ++p) low[p] *= inverse * low_gains[p], high[p] *= inverse * high_gains[p];
    }
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const float a = low[p], b = high[p];
      low[p] = a * cosines[p] - b * sines[p];
      high[p] = b * cosines[p] + a * sines[p];
    }
  }
  if (is_query) {
    const size_t at = ((size_t)token * HEADS + item) * C::HEAD_DIM;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const int i = lane + 32 * p;
      if (HALF % 32 == 0 || i < HALF) q[at + i] = low[p], q[at + i + HALF] = high[p];
    }
    return;
  }
  float *head = heads[warp];
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = lane + 32 * p;
    if (HALF % 32 == 0 || i < HALF) head[i] = low[p], head[i + HALF] = high[p];
  }
  if (is_value) store_head<true>(values + block, position % C::PAGE_LEN, head);
  else store_head<false>(keys + block, position % C::PAGE_LEN, head);
}
