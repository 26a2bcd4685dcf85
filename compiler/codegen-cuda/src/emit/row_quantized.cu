// The row of int8 activations of a product, copied to shared memory.

__device__ __forceinline__ void take_row(u8 *to, const u8 *x, float *) {
  wait_for_launches();
  for (int i = threadIdx.x; i < W::K / 16; i += WARPS * 32) ((Four *)to)[i] = ((const Four *)x)[i];
  for (int i = threadIdx.x; i < 2 * W::GROUPS; i += WARPS * 32)
    ((u32 *)(to + X::SCALES))[i] = ((const u32 *)(x + X::SCALES))[i];
}
