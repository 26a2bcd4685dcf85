// Keys and values of some positions of a cache of codes in shared memory: codes as f16, which has them exactly, keys by position and
// values by element; scales beside them. Codes are copied as they stand in the cache, into one of two stages, and then unpacked to
// where all threads have done with those before. Constant: POSITIONS.

// Eight numbers more than there are: rows of eight matrices of 16 bytes then lie in different banks.
constexpr int KEY_STRIDE = C::HEAD_DIM + 8, VALUE_STRIDE = POSITIONS + 8;
constexpr int BITS = C::KIND == KV_INT8 ? 8 : 4;

/// Two codes in the lower halves of whose 16 bits f16 has its lowest: those plus `1024`, less `bias`.
__device__ __forceinline__ u32 code_pair(u32 word, u32 selector, u32 bias) {
  u32 pair, biased = pick(word, 0x64646464, selector);
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(biased), "r"(bias));
  return pair;
}

/// Four bytes as f16, less what they exceed codes by.
__device__ __forceinline__ Two code_quad(u32 bytes) {
  constexpr u32 BIAS = BITS == 8 ? 0x64806480 : 0x64086408;  // 1024 and 128, or 8.
  return {code_pair(bytes, 0x4140, BIAS), code_pair(bytes, 0x4342, BIAS)};
}

__device__ __forceinline__ Four code_octet(u32 low, u32 high) {
  Two a = code_quad(low), b = code_quad(high);
  return {a.x, a.y, b.x, b.y};
}

struct Tiles {
  static constexpr int BYTES = POSITIONS * C::HEAD_DIM * BITS / 8;
  struct Stage { u32 keys[BYTES / 4], values[BYTES / 4]; float key_scales[POSITIONS], value_scales[POSITIONS]; };
  Stage stages[2];
  alignas(16) u16 keys[POSITIONS][KEY_STRIDE];
  u16 values[C::HEAD_DIM][VALUE_STRIDE];
  /// The size of the largest of the values' scales.
  alignas(16) float most;

  __device__ __forceinline__ float largest_scale() const { return most; }

  /// Copies the positions from `start` on, which stand in one page.
  __device__ __forceinline__ void fetch(int into, const u8 *keys, const u8 *values, size_t block, int start, int, int) {
    Stage &stage = stages[into];
    const int thread = threadIdx.x, place = start % C::PAGE_LEN;
    constexpr int PIECES = BYTES / 16, ROW = POSITIONS / 4, SCALES = POSITIONS / 4;
    static_assert(THREADS % ROW == 0 && 2 * SCALES <= THREADS, "whole rows");
    const u32 to_keys = shared_address(&stage.keys[thread * 4]), to_values = shared_address(&stage.values[thread * 4]);
    const u8 *from_keys = keys + block + (thread / ROW * C::PAGE_LEN + place + thread % ROW * 4) * 4;
    const u8 *from_values = values + block + place * C::HEAD_DIM * BITS / 8 + thread * 16;
#pragma unroll
    for (int i = 0; i < PIECES; i += THREADS)
      if (PIECES % THREADS == 0 || i + thread < PIECES) {
        copy_async(to_keys + i * 16, from_keys + i / ROW * C::PAGE_LEN * 4);
        copy_async(to_values + i * 16, from_values + i * 16);
      }
    if (thread < 2 * SCALES)
      copy_async(shared_address(&stage.key_scales[thread * 4]),
                 (thread >= SCALES ? values : keys) + block + C::SCALES + (place + thread % SCALES * 4) * 4);
    commit_copies();
  }

  /// Makes what was fetched ready to be loaded.
  __device__ __forceinline__ void unpack(int from, int start, int low, int high) {
    Stage &stage = stages[from];
    constexpr u32 SIGNS = BITS == 8 ? 0x80808080 : 0, NIBBLES = 0x0f0f0f0f;
    // Eight elements of a position at a time.
    constexpr int KEYS = POSITIONS * C::HEAD_DIM / 8;
#pragma unroll
    for (int i = 0; i < KEYS; i += THREADS) {
      static_assert(THREADS % POSITIONS == 0, "whole rows");
      int p = threadIdx.x % POSITIONS, octet = threadIdx.x / POSITIONS + i / POSITIONS;
      if (KEYS % THREADS == 0 || i + threadIdx.x < KEYS) {
        const u32 *codes = stage.keys + octet * BITS / 4 * POSITIONS + p;
        Four &to = *(Four *)&keys[p][octet * 8];
        if constexpr (BITS == 8) to = code_octet(codes[0] ^ SIGNS, codes[POSITIONS] ^ SIGNS);
        else to = code_octet(codes[0] & NIBBLES, codes[0] >> 4 & NIBBLES);
      }
    }
    // Eight positions of an element at a time; of 4 bits, of two elements.
    constexpr int WIDTH = C::HEAD_DIM * BITS / 8, VALUES = POSITIONS / 8 * WIDTH;
#pragma unroll
    for (int i = 0; i < VALUES; i += THREADS) {
      int at = i + threadIdx.x, d = at % WIDTH, p = at / WIDTH * 8;
      if (VALUES % THREADS == 0 || at < VALUES) {
        const u32 *codes = stage.values + p / 4 * WIDTH + d;
        if constexpr (BITS == 8) {
          *(Four *)&values[d][p] = code_octet(codes[0] ^ SIGNS, codes[WIDTH] ^ SIGNS);
        } else {
          *(Four *)&values[d][p] = code_octet(codes[0] & NIBBLES, codes[WIDTH] & NIBBLES);
          *(Four *)&values[d + WIDTH][p] = code_octet(codes[0] >> 4 & NIBBLES, codes[WIDTH] >> 4 & NIBBLES);
        }
      }
    }
    // Scales of what was never stored may be anything, and have to be zero where weights are.
    if (threadIdx.x < 32) {
      float scale = 0.f;
      if (threadIdx.x < POSITIONS) {
        int position = start + threadIdx.x;
        if (position >= low && position < high) scale = stage.value_scales[threadIdx.x];
        stage.value_scales[threadIdx.x] = scale;
      }
      scale = warp_max(fabsf(scale));
      if (threadIdx.x == 0) most = scale;
    }
    __syncthreads();
  }
};

/// Loads operands from a stage that was unpacked.
struct Operands {
  u32 keys, values;
  const float *scales;

  __device__ __forceinline__ Operands(const Tiles &tiles, int stage) {
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
    keys = shared_address(&tiles.keys[row][column]);
    values = shared_address(&tiles.values[row][column]);
    scales = tiles.stages[stage].key_scales + lane % 4 * 2;
  }

  /// 16 elements from `d` on of 16 positions from `p` on: operands of two products of queries and keys.
  __device__ __forceinline__ void load_keys(u32 (&b)[4], int d, int p) const { load_matrices(b, keys + (p * KEY_STRIDE + d) * 2); }

  /// The same of values: operands of two products of weights and values.
  __device__ __forceinline__ void load_values(u32 (&b)[4], int d, int p) const {
    load_matrices(b, values + (d * VALUE_STRIDE + p) * 2);
  }

  /// Scales of position `p` behind the first that the lane has products of.
  __device__ __forceinline__ float key_scale(int p) const { return scales[p]; }
  __device__ __forceinline__ float value_scale(int p) const { return scales[POSITIONS + p]; }
};
