// y[m, n] = sum_k x[m, k] w[n, k] for a few rows of int8 activations and weights of 2 to 8 bits, up to 16 by a block.
//
// Rows are the columns of byte-wise products, whose sums over a group are whole numbers p. With a channel's scale w of the group
// and a row's scale x, what a group adds is x w (p + c s): s is the sum of the row's codes, and c what the group's choice adds to
// every weight. Tensor cores count p from 1.5 * 2^23 on, so that its bits are those of a float, and one multiply-add gives w p
// exactly. The terms x w c s of four groups are one product of floats, x s in two parts of 11 bits.
//
// A warp has `OWN` blocks of channels, which share the rows that it loads; warps of a thread block share out fours of groups. Both
// are copied to shared memory by the warp that needs them, `STAGES` fours ahead, weights before what other launches leave is
// waited for. What is not there, rows or groups, is zeros, or has scales of zero. Blocks of the same channels follow each other, so that
// weights are in the L2 cache when they are asked for again.

constexpr int COLUMNS = BLOCKS / OWN, SPLITS = WARPS / COLUMNS;
constexpr int CHANNELS = 16 * BLOCKS;
constexpr int STRIDE = CHANNELS + 1;

/// A row's activations of four groups. Rows are so far apart that four of them lie in different banks.
struct alignas(16) Slice {
  u8 codes[128];
  float scales[4];
  int codes_sums[4];
};
/// A four of groups of a block of channels.
struct Piece {
  u8 codes[4][GROUP_CODES];
  u8 fields[4][GROUP_FIELDS];
};
struct Stage {
  alignas(16) Piece pieces[OWN];
  Slice rows[TILES_OF_ROWS * 8];
};
struct Shared {
  union {
    Stage stages[WARPS][STAGES];
    float parts[SPLITS][ROWS][STRIDE];
  };
  /// By which sums of a channel are multiplied.
  float channel_scales[CHANNELS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "as much as the launch gives");

/// A word of 4 bytes, or zero.
__device__ __forceinline__ void copy_word_async(u32 to, const void *from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}

/// What a warp copies fours of groups from.
struct Source {
  const u8 *x;
  int rows;
  /// The first of its blocks of channels that are there, and how many are.
  const u8 *block;
  int owned;

  __device__ __forceinline__ Source(const u8 *packed, const u8 *x, int rows, int first_block) : x(x), rows(rows) {
    owned = min(OWN, (W::N + 15) / 16 - first_block);
    block = packed + W::HEADER + (size_t)(owned > 0 ? first_block : 0) * W::BLOCK;
  }

  /// Asks for the weights of the four that begins with group `first`.
  __device__ __forceinline__ void ask_for_weights(const Stage &stage, int first) const {
    const int lane = threadIdx.x % 32, there = W::GROUPS - first;
    const u32 to = shared_address(&stage) + lane * 16;
    const u8 *codes = block + W::CODES + lane * 16 + first * GROUP_CODES, *fields = block + W::FIELDS + lane * 16 + first * GROUP_FIELDS;
#pragma unroll
    for (int own = 0; own < OWN; ++own) {
      const int bytes = W::N % CHANNELS == 0 || own < owned ? 16 : 0;
#pragma unroll
      for (int at = 0; at < 4 * GROUP_CODES; at += 512) {
        if (at + 512 <= 4 * GROUP_CODES || at + lane * 16 < 4 * GROUP_CODES)
          copy_async(to + own * sizeof(Piece) + at, codes + own * W::BLOCK + at, WHOLE || at + lane * 16 < there * GROUP_CODES ? bytes : 0);
      }
      if (lane * 16 < 4 * GROUP_FIELDS)
        copy_async(to + own * sizeof(Piece) + 4 * GROUP_CODES, fields + own * W::BLOCK, WHOLE || lane * 16 < there * GROUP_FIELDS ? bytes : 0);
    }
  }

  /// Asks for what rows, up to `TILES` times eight, have there.
  template <int TILES>
  __device__ __forceinline__ void ask_for_rows(const Stage &stage, int first) const {
    const int lane = threadIdx.x % 32, there = W::GROUPS - first;
    const u32 to = shared_address(stage.rows);
    // Eight lanes have the codes of a row.
    const u8 *codes = x + (lane / 8 * X::STRIDE + lane % 8 * 16 + first * 32);
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      const bool has = i * 4 + lane / 8 < rows && (WHOLE || lane % 8 < 2 * there);
      copy_async(to + (i * 4 + lane / 8) * sizeof(Slice) + lane % 8 * 16, codes + i * 4 * X::STRIDE, has ? 16 : 0);
    }
    constexpr int SCALES_AT = sizeof(Slice::codes);
    if constexpr (WHOLE) {
      // Two have its scales and sums.
      const u8 *scales = x + (lane / 2 * X::STRIDE + (lane % 2 ? X::SUMS : X::SCALES) + first * 4);
      if (TILES == 2 || lane < 16)
        copy_async(to + lane / 2 * sizeof(Slice) + SCALES_AT + lane % 2 * 16, scales, lane / 2 < rows ? 16 : 0);
    } else {
      // Sums need not begin at a multiple of 16 bytes.
      const u8 *scales = x + (lane / 8 * X::STRIDE + (lane % 8 / 4 ? X::SUMS : X::SCALES) + (first + lane % 4) * 4);
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i)
        copy_word_async(to + (i * 4 + lane / 8) * sizeof(Slice) + SCALES_AT + lane % 8 * 4, scales + i * 4 * X::STRIDE,
                        i * 4 + lane / 8 < rows && lane % 4 < there);
    }
  }
};

/// sums += a b for four groups of 16 channels and 8 columns, `b` in two parts.
__device__ __forceinline__ void multiply_floats(float (&sums)[4], float a0, float a1, float high, float low) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%4,%5}, {%6,%7}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(high)), "r"(__float_as_uint(low)));
}

/// The nearest number of 11 bits.
__device__ __forceinline__ float shortened(float x) {
  u32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits_to_float(bits);
}

/// What a warp adds up of its channels by `TILES` times eight rows.
template <int TILES>
struct Sums { float of[OWN][TILES][4]; };

/// Adds the four of groups `stage`, of which `there` are there.
template <bool SPLIT_SIGNS, int TILES>
__device__ __forceinline__ void add(Sums<TILES> &sums, const Table &table, const Stage &stage, int there) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int start_bits[4] = {FLOAT_COUNT_BITS, FLOAT_COUNT_BITS, FLOAT_COUNT_BITS, FLOAT_COUNT_BITS};
  u32 pair[OWN];
  Fields fields[OWN];
#pragma unroll
  for (int own = 0; own < OWN; ++own) {
    fields[own].load(stage.pieces[own].fields[t], g);
    if (!WHOLE && t >= there) fields[own].clear();
    pair[own] = fields[own].scales();
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    if constexpr (!W::BF16_SCALES) {
      const Slice &row = stage.rows[tile * 8 + g];
      const float added = row.scales[t] * (float)row.codes_sums[t], high = shortened(added);
#pragma unroll
      for (int own = 0; own < OWN; ++own)
        multiply_floats(sums.of[own][tile], fields[own].added(table, 0), fields[own].added(table, 1), high, added - high);
    }
  }
  // Of two groups at a time.
  Two scales[TILES][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i % 2 == 0) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int c = 0; c < 2; ++c) scales[tile][c] = *(const Two *)(stage.rows[tile * 8 + 2 * t + c].scales + i);
    }
    Two eight[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) eight[tile] = activations(stage.rows[tile * 8 + g].codes, i, t);
#pragma unroll
    for (int own = 0; own < OWN; ++own) {
      Codes codes;
      codes.load(stage.pieces[own].codes[i], g, t);
      Weights<SPLIT_SIGNS> weights;
      weights.decode(table, codes, t);
      const u32 both = __shfl_sync(ALL_LANES, pair[own], lane & 28 | i);
      const float scale[2] = {bits_to_float(both << 16), bits_to_float(both & 0xffff0000u)};
      const float start[2] = {-FLOAT_COUNT * scale[0], -FLOAT_COUNT * scale[1]};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        int products[4];
        weights.multiply_by(products, eight[tile].x, eight[tile].y, start_bits);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float product = fmaf(__int_as_float(products[c]), scale[c / 2], start[c / 2]);
          const Two &both_scales = scales[tile][c % 2];
          sums.of[own][tile][c] = fmaf(product, bits_to_float(i % 2 ? both_scales.y : both_scales.x), sums.of[own][tile][c]);
        }
      }
    }
  }
}

/// All of a warp's products, from group `split` * 4 on, which it leaves where stages were. The weights of the first stages are
/// asked for already.
template <bool SPLIT_SIGNS, int TILES>
__device__ __forceinline__ void multiply_all(Shared &shared, const Table &table, const Source &source) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = warp / COLUMNS, column = warp % COLUMNS;
  Stage *const stages = shared.stages[warp];
  Sums<TILES> sums = {};
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) {
    const int first = (split + stage * SPLITS) * 4;
    if (first < W::GROUPS) source.ask_for_rows<TILES>(stages[stage], first);
    commit_copies();
  }
  int at = 0;
#pragma unroll 1
  for (int first = split * 4; first < W::GROUPS; first += SPLITS * 4) {
    Stage &stage = stages[at];
    wait_for_copies<STAGES - 1>();
    __syncwarp();
    add<SPLIT_SIGNS, TILES>(sums, table, stage, W::GROUPS - first);
    __syncwarp();
    if (const int next = first + STAGES * SPLITS * 4; next < W::GROUPS) {
      source.ask_for_weights(stage, next);
      source.ask_for_rows<TILES>(stage, next);
    }
    commit_copies();
    at = at + 1 == STAGES ? 0 : at + 1;
  }
  __syncthreads();
#pragma unroll
  for (int own = 0; own < OWN; ++own)
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = tile * 8 + 2 * t + c % 2, channel = (column * OWN + own) * 16 + 2 * g + c / 2;
        if (ROWS % 8 == 0 || row < ROWS) shared.parts[split][row][channel] = sums.of[own][tile][c];
      }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
KERNEL(const u8 *x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  extern __shared__ Four given[];
  Shared &shared = *(Shared *)given;
  const int warp = threadIdx.x / 32;
  const int id = blockIdx.y * gridDim.x + blockIdx.x, tile = id / gridDim.y, first_row = id % gridDim.y * ROWS;
  const int rows = min(ROWS, (int)row_count - first_row), first_channel = tile * CHANNELS;
  let_next_launch_begin();
  Table table;
  table.load(packed);
  const int first_block = tile * BLOCKS + warp % COLUMNS * OWN, split = warp / COLUMNS;
  const Source source(packed, x + (size_t)first_row * X::STRIDE, rows, first_block);
  // A thread finishes one channel, of one row after the other.
  static_assert(WARPS * 32 % CHANNELS == 0, "the same channel each time");
  const int c = threadIdx.x % CHANNELS, n = first_channel + c;
  const bool brings_scale = !W::BF16_SCALES && threadIdx.x < CHANNELS;
  float channel_scale = 0.f;
  if (brings_scale && n < W::N) channel_scale = ((const float *)(packed + W::HEADER + (size_t)(n / 16) * W::BLOCK))[n % 16];
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) {
    const int first = (split + stage * SPLITS) * 4;
    if (first < W::GROUPS) source.ask_for_weights(shared.stages[warp][stage], first);
  }
#pragma unroll
  for (int own = 0; own < OWN; ++own)
    if (own < source.owned && first_row == 0) fetch_groups_ahead(source.block + own * W::BLOCK, (SPLITS + split) * STAGES * 4, STAGES * 4);
  if (brings_scale) shared.channel_scales[c] = channel_scale;
  wait_for_launches();
  // The residual is on its way while products are.
  constexpr int TIMES = (ROWS * CHANNELS + WARPS * 32 - 1) / (WARPS * 32);
  const float *from = RESIDUAL_ARGUMENT;
  float before[TIMES] = {};
  if (from) {
#pragma unroll
    for (int time = 0; time < TIMES; ++time) {
      const int m = (time * WARPS * 32 + threadIdx.x) / CHANNELS;
      if (m < rows && n < W::N) before[time] = from[(size_t)(first_row + m) * W::N + n];
    }
  }
  if (table.has_split_signs()) {
    if (TILES_OF_ROWS == 1 || rows <= 8) multiply_all<true, 1>(shared, table, source);
    else multiply_all<true, TILES_OF_ROWS>(shared, table, source);
  } else {
    if (TILES_OF_ROWS == 1 || rows <= 8) multiply_all<false, 1>(shared, table, source);
    else multiply_all<false, TILES_OF_ROWS>(shared, table, source);
  }
#pragma unroll
  for (int time = 0; time < TIMES; ++time) {
    const int m = (time * WARPS * 32 + threadIdx.x) / CHANNELS;
    if (m >= rows) break;
    float sum = shared.parts[0][m][c];
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) sum += shared.parts[s][m][c];
    if (!W::BF16_SCALES) sum *= shared.channel_scales[c];
    if constexpr (EPILOGUE == STORE || EPILOGUE == RESIDUAL) {
      const float *added = BIAS_ARGUMENT;
      if (n < W::N) ((float *)out)[(size_t)(first_row + m) * W::N + n] = before[time] + (sum + (added ? added[n] : 0.f));
    } else {
      shared.parts[0][m][c] = sum;
    }
  }
  if constexpr (EPILOGUE != STORE && EPILOGUE != RESIDUAL) {
    __syncthreads();
    finish_tile<CHANNELS, STRIDE, WARPS * 32>(&shared.parts[0][0][0], rows, first_row, first_channel, BIAS_ARGUMENT, nullptr, out);
  }
}
