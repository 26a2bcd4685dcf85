// The row of int8 activations of a product, taken to shared memory.

__device__ __forceinline__ void take_row(Codes8 &to, const u8 *x, float *) {
  wait_for_launches();
  for (int i = threadIdx.x; i < W::K / 16; i += WARPS * 32) {
    const Four four = ((const Four *)x)[i];
    const Two low = ordered({four.x, four.y}), high = ordered({four.z, four.w});
    ((Four *)to.codes)[i] = {low.x, low.y, high.x, high.y};
  }
  for (int i = threadIdx.x; i < W::GROUPS; i += WARPS * 32)
    to.groups[i] = {((const float *)(x + X::SCALES))[i], ((const int *)(x + X::SUMS))[i]};
}
