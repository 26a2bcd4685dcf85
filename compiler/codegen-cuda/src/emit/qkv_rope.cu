// What follows the product of q, k and v: norm of heads, rotary embedding, store of keys and values in the cache. One warp per
// head, four to a block.

extern "C" __global__ void __launch_bounds__(128)
KERNEL(const float *__restrict__ y GAIN_PARAMETERS, const float *__restrict__ rope, const int *__restrict__ positions,
       const int *__restrict__ sequences, const u32 *__restrict__ tables, u64 stride, u8 *keys, u8 *values,
       float *__restrict__ q) {
  begin_after_launches();
  constexpr int ALL_HEADS = HEADS + 2 * C::KV_HEADS, HALF = C::HEAD_DIM / 2;
  __shared__ float heads[4][C::HEAD_DIM];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int item = blockIdx.x * 4 + warp, token = blockIdx.y;
  if (item >= ALL_HEADS) return;
  float *head = heads[warp];
  const float *from = y + ((size_t)token * ALL_HEADS + item) * C::HEAD_DIM;
  for (int d = lane; d < C::HEAD_DIM; d += 32) head[d] = from[d];
  const bool is_value = item >= HEADS + C::KV_HEADS;
  if (!is_value) {
    if constexpr (QK_NORM) {
      float squares = 0.f;
      for (int d = lane; d < C::HEAD_DIM; d += 32) squares = fmaf(head[d], head[d], squares);
      float inverse = __fdiv_rn(1.f, __fsqrt_rn(warp_sum(squares) / C::HEAD_DIM + EPS));
      const float *gain = item < HEADS ? Q_GAIN : K_GAIN;
      for (int d = lane; d < C::HEAD_DIM; d += 32) head[d] *= inverse * gain[d];
    }
    __syncwarp();
    const float *cosines = rope + (size_t)token * C::HEAD_DIM, *sines = cosines + HALF;
    for (int i = lane; i < HALF; i += 32) {
      float a = head[i], b = head[i + HALF];
      head[i] = a * cosines[i] - b * sines[i];
      head[i + HALF] = b * cosines[i] + a * sines[i];
    }
  }
  __syncwarp();
  if (item < HEADS) {
    float *to = q + ((size_t)token * HEADS + item) * C::HEAD_DIM;
    for (int d = lane; d < C::HEAD_DIM; d += 32) to[d] = head[d];
    return;
  }
  const Paging paging = {positions, sequences, tables, stride};
  const int position = positions[token];
  const size_t block = block_offset(paging.page(sequences[token], position), (item - HEADS) % C::KV_HEADS);
  if (is_value) store_head<true>(values + block, position % C::PAGE_LEN, head);
  else store_head<false>(keys + block, position % C::PAGE_LEN, head);
}
