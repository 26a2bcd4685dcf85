// The row of int8 activations of a product, taken to shared memory.

__device__ __forceinline__ void take_row(Codes8 &to, const u8 *x, float *) {
  // Pieces of 16 codes, two of which are a group. So many that registers hold are asked for before any is waited for.
  constexpr int THREADS = WARPS * 32, PIECES = W::K / 16;
  constexpr int TIMES = PIECES > 2 * THREADS ? 4 : PIECES > THREADS ? 2 : 1, GROUP_TIMES = (TIMES + 1) / 2;
  wait_for_launches();
#pragma unroll 1
  for (int base = 0; base < PIECES; base += TIMES * THREADS) {
    const int piece = base + threadIdx.x, group = base / 2 + threadIdx.x;
    const int last_group = min(W::GROUPS, (base + TIMES * THREADS) / 2);
    Four pieces[TIMES];
    Scaled groups[GROUP_TIMES];
#pragma unroll
    for (int i = 0; i < TIMES; ++i)
      if (piece + i * THREADS < PIECES) pieces[i] = ((const Four *)x)[piece + i * THREADS];
#pragma unroll
    for (int i = 0; i < GROUP_TIMES; ++i)
      if (const int at = group + i * THREADS; at < last_group)
        groups[i] = {((const float *)(x + X::SCALES))[at], ((const int *)(x + X::SUMS))[at]};
#pragma unroll
    for (int i = 0; i < TIMES; ++i) {
      if (piece + i * THREADS < PIECES) {
        const Two low = ordered({pieces[i].x, pieces[i].y}), high = ordered({pieces[i].z, pieces[i].w});
        ((Four *)to.codes)[piece + i * THREADS] = {low.x, low.y, high.x, high.y};
      }
    }
#pragma unroll
    for (int i = 0; i < GROUP_TIMES; ++i)
      if (const int at = group + i * THREADS; at < last_group) to.groups[at] = groups[i];
  }
}
