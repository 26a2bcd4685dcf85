// Activations of many rows for products by `wgmma`: f16 or bf16 numbers, in slabs of 64 inputs of all rows, zeros behind the last.
// A slab is what shared memory is to hold: rows of 128 bytes, whose pieces of 16 are swizzled. One block per row.
//
// Within a group of 32, inputs stand where those of the weights do that they meet: a thread of four has `RUN` neighbours at a
// time. f16 rows are normalised by a power of two, and the factors that were taken out, f32, follow the slabs.

constexpr int SLAB = 64;

/// The input at a place of a group; the first of a pair of places has an even one, and the second the next.
__device__ __forceinline__ int input_at(int place) {
  int product = place / 16, half = place / 8 % 2, thread = place / 2 % 4;
  if constexpr (RUN == 8) return 8 * thread + 4 * half + 2 * product + place % 2;
  else if constexpr (RUN == 4) return 16 * product + 4 * thread + 2 * half + place % 2;
  else return place;
}

extern "C" __global__ void __launch_bounds__(256) KERNEL(const u8 *x, u16 *out) {
  begin_after_launches();
  typedef Int8Rows<K> Rows;
  const size_t row = blockIdx.x, rows = gridDim.x;
  const u8 *codes = x + row * Rows::STRIDE;
  const float *scales = (const float *)(codes + Rows::SCALES);
  float normalise = 1.f;
  if constexpr (HALF) {
    // The largest scale comes to 128 to 256, its numbers to no more than 2^15.
    __shared__ float parts[8];
    float most = 0.f;
    for (int i = threadIdx.x; i < K / 32; i += 256) most = fmaxf(most, scales[i]);
    most = block_max<8>(most, parts);
    // Smaller ones would need a factor that is no normal number.
    int exponent = max((int)(__float_as_uint(most) >> 23) - 127, -119);
    normalise = __uint_as_float((u32)(127 + 7 - exponent) << 23);
    if (threadIdx.x == 0) ((float *)(out + rows * PADDED))[row] = __uint_as_float((u32)(127 + exponent - 7) << 23);
  }
  for (int i = threadIdx.x; i < PADDED / 8; i += 256) {
    const int group = i / 4, slab = i / 8, piece = i % 8;
    u32 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int k = group * 32 + input_at(i % 4 * 8 + j * 2);
      if constexpr (INT8) {
        pairs[j] = 0;
        if (group < K / 32) {
          u32 two = *(const u16 *)(codes + k);
          float scale = scales[group] * normalise, low = scale * (float)(i8)two, high = scale * (float)(i8)(two >> 8);
          pairs[j] = HALF ? half_of(low) | (u32)half_of(high) << 16 : bf16_pair(low, high);
        }
      } else {
        const float *from = (const float *)x + row * K;
        pairs[j] = bf16_pair(k < K ? from[k] : 0.f, k + 1 < K ? from[k + 1] : 0.f);
      }
    }
    *(Four *)(out + (slab * rows + row) * SLAB + (piece ^ row % 8) * 8) = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}
