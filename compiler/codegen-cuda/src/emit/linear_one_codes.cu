// y[n] = sum_k x[k] w[n, k] for one row of int8 activations and weights of 2 to 8 bits.
//
// All columns of a product are the one row, so all four threads that hold a channel have its sum. Of four groups each takes one:
// it alone loads and applies that group's scales. Warps of a block share out fours of groups of `BLOCKS` blocks of channels.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
KERNEL(const u8 *__restrict__ x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64, u64) {
  __shared__ float parts[SPLITS][STRIDE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  float sums[2] = {};
  if (index * 16 < W::N) {
    const u8 *block = packed + W::HEADER + (size_t)index * W::BLOCK;
    Table table;
    table.load(packed);
#pragma unroll 1
    for (int first = split * 4; first < W::GROUPS; first += SPLITS * 4) {
      int products[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Past the last group the last one is multiplied again, and not counted.
        int group = W::GROUPS % 4 == 0 ? first + i : min(first + i, W::GROUPS - 1);
        u32 a[4], b0, b1;
        load_weights(a, table, block, group, g, t);
        load_activations(b0, b1, x, group, t);
        int four[4];
        multiply(four, a, b0, b1);
        if (t == i) products[0] = four[0], products[1] = four[2];
      }
      int group = first + t;
      if (W::GROUPS % 4 == 0 || group < W::GROUPS) {
        Fields fields;
        fields.load(table, block, group, g);
        float scale_x = *(const float *)(x + X::SCALES + group * 4);
        int codes_sum = *(const int *)(x + X::SUMS + group * 4);
        sums[0] += fields.part(0, products[0], scale_x, codes_sum);
        sums[1] += fields.part(1, products[1], scale_x, codes_sum);
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], 1);
      sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], 2);
      if constexpr (!W::BF16_SCALES) sums[c] *= ((const float *)block)[2 * g + c];
    }
  }
  if (t == 0) parts[split][local * 16 + 2 * g] = sums[0], parts[split][local * 16 + 2 * g + 1] = sums[1];
  __syncthreads();
  if (threadIdx.x < CHANNELS) {
    float sum = parts[0][threadIdx.x];
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) sum += parts[s][threadIdx.x];
    parts[0][threadIdx.x] = sum;
  }
  __syncthreads();
  finish_tile<CHANNELS, STRIDE, WARPS * 32>(&parts[0][0], 1, 0, blockIdx.x * CHANNELS, BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
