// out[t, :] = table[tokens[t], :]. One block per token; a thread decodes eight inputs at a time.

extern "C" __global__ void __launch_bounds__(128)
KERNEL(const int *tokens, const u8 *__restrict__ packed, float *out) {
  begin_after_launches();
  const int row = tokens[blockIdx.x];
  if (row < 0 || row >= W::N) return;
  const u8 *block = packed + W::HEADER + (size_t)(row / 16) * W::BLOCK;
  Table table;
  table.load(packed);
  for (int o = threadIdx.x; o < (W::K + 7) / 8; o += 128) {
    float values[8];
    decode_octet(table, block, row % 16, o, values);
    float *to = out + blockIdx.x * (size_t)W::K + 8 * o;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (8 * o + i < W::K) to[i] = values[i];
  }
}
