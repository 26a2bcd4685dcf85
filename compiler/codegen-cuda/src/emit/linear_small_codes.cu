// y[m, n] = sum_k x[m, k] w[n, k] for up to 16 rows of int8 activations and weights of 2 to 8 bits.
//
// A warp multiplies 16 channels by 8 rows, a group of 32 inputs at a time, with one byte-wise tensor-core product: sums of a
// group are exact integers, and each row's are added up over the groups in f32. Warps of a block share out the groups of
// `BLOCKS` blocks of channels. Channel 2g and 2g + 1 of a block are rows g and g + 8 of the product, so that a thread loads
// both with one instruction; thread t of four has the inputs 8t to 8t + 7.

constexpr int SPLITS = WARPS / BLOCKS;
constexpr int COLUMNS = ROWS == 1 ? 1 : 2;  // of the two that a thread holds of a product
constexpr int TILES = ROWS <= 8 ? 1 : 2;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;
typedef Int8Rows<W::K> X;

__device__ __forceinline__ void multiply(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
KERNEL(const u8 *__restrict__ x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  __shared__ float parts[SPLITS][ROWS][STRIDE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = warp / BLOCKS, local = warp % BLOCKS;
  const int index = blockIdx.x * BLOCKS + local;
  const int rows = ROWS == 1 ? 1 : (int)row_count;
  float sums[TILES][2][COLUMNS] = {};
  if (index * 16 < W::N) {
    const u8 *block = packed + W::HEADER + (size_t)index * W::BLOCK;
    Table table;
    table.load(packed);
    // Rows past the last repeat it; their results are not stored.
    const u8 *mine[TILES], *column[TILES][COLUMNS];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      mine[tile] = x + (size_t)min(tile * 8 + g, rows - 1) * X::STRIDE;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) column[tile][c] = x + (size_t)min(tile * 8 + 2 * t + c, rows - 1) * X::STRIDE;
    }
#pragma unroll UNROLL
    for (int group = split; group < W::GROUPS; group += SPLITS) {
      const u8 *codes = block + W::CODES + group * W::GROUP_ROWS * 64 + 8 * g;
      u32 a[4];
      if constexpr (W::BITS == 8) {
        Two even = *(const Two *)(codes + 2 * t * 64), odd = *(const Two *)(codes + (2 * t + 1) * 64);
        a[0] = even.x, a[1] = even.y, a[2] = odd.x, a[3] = odd.y;
      } else {
        Two low = *(const Two *)(codes + (W::PLANE_ROW + plane_row<W::PLANE_WIDTH>(t)) * 64);
        Two high = {0, 0};
        if constexpr (W::HIGH_WIDTH > 0) {
          high = *(const Two *)(codes + (W::HIGH_ROW + plane_row<W::HIGH_WIDTH>(t)) * 64);
          high.x = plane_bits<W::HIGH_WIDTH>(high.x, t), high.y = plane_bits<W::HIGH_WIDTH>(high.y, t);
        }
        Octet first = look_up<W::BITS>(table, plane_bits<W::PLANE_WIDTH>(low.x, t), high.x);
        Octet second = look_up<W::BITS>(table, plane_bits<W::PLANE_WIDTH>(low.y, t), high.y);
        a[0] = first.first, a[1] = second.first, a[2] = first.second, a[3] = second.second;
      }
      // Both channels' fields.
      float scale[2];
      int signed_scale[2], added[2];
      if constexpr (W::BITS == 8) {
        u32 both = *(const u32 *)(block + W::FIELDS + (group * 16 + 2 * g) * 2);
        scale[0] = bits_to_float(both << 16), scale[1] = bits_to_float(both & 0xffff0000u);
      } else {
        u32 both = *(const u16 *)(block + W::FIELDS + group * 16 + 2 * g);
        signed_scale[0] = field_scale(both & 0xff), signed_scale[1] = field_scale(both >> 8);
        added[0] = field_choice(both & 0xff) * table.shift, added[1] = field_choice(both >> 8) * table.shift;
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        if (tile == 0 || rows > 8) {
          Two eight = *(const Two *)(mine[tile] + group * 32 + 8 * t);
          u32 b0 = eight.x, b1 = eight.y;
          if constexpr (W::BITS < 8) b0 = pick(eight.x, eight.y, OCTET_FIRST), b1 = pick(eight.x, eight.y, OCTET_SECOND);
          int products[4];
          multiply(products, a, b0, b1);
#pragma unroll
          for (int c = 0; c < COLUMNS; ++c) {
            float scale_x = *(const float *)(column[tile][c] + X::SCALES + group * 4);
            if constexpr (W::BITS == 8) {
              sums[tile][0][c] += (float)products[c] * (scale[0] * scale_x);
              sums[tile][1][c] += (float)products[2 + c] * (scale[1] * scale_x);
            } else {
              int codes_sum = *(const int *)(column[tile][c] + X::SUMS + group * 4);
              sums[tile][0][c] += (float)((products[c] + added[0] * codes_sum) * signed_scale[0]) * scale_x;
              sums[tile][1][c] += (float)((products[2 + c] + added[1] * codes_sum) * signed_scale[1]) * scale_x;
            }
          }
        }
      }
    }
    float row_scale[2] = {1.f, 1.f};
    if constexpr (W::BITS < 8) row_scale[0] = ((const float *)block)[2 * g], row_scale[1] = ((const float *)block)[2 * g + 1];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        int m = tile * 8 + 2 * t + c;
        if (m < ROWS) {
          parts[split][m][local * 16 + 2 * g] = sums[tile][0][c] * row_scale[0];
          parts[split][m][local * 16 + 2 * g + 1] = sums[tile][1][c] * row_scale[1];
        }
      }
  } else {
    for (int i = lane; i < ROWS * 16; i += 32) parts[split][i / 16][local * 16 + i % 16] = 0.f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * CHANNELS; i += WARPS * 32) {
    int m = i / CHANNELS, c = i % CHANNELS;
    float sum = parts[0][m][c];
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) sum += parts[s][m][c];
    parts[0][m][c] = sum;
  }
  __syncthreads();
  finish_tile<CHANNELS, STRIDE, WARPS * 32>(&parts[0][0][0], rows, 0, blockIdx.x * CHANNELS, BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
