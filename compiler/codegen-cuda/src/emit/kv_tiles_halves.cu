// Keys and values of some positions of an f16 cache in shared memory, as they stand in the cache: keys by element, values by
// position. Both are the right operand of products when they are loaded transposed. Constant: POSITIONS.

// Eight numbers more than there are: rows of eight matrices of 16 bytes then lie in different banks.
constexpr int VALUE_STRIDE = C::HEAD_DIM + 8;
// So they do in rows of so few pieces of 16 bytes that several are 128 bytes, if pieces of the rows after change places.
constexpr int KEY_PIECES = POSITIONS / 8;
static_assert(KEY_PIECES == 2 || KEY_PIECES == 4, "rows of keys of 32 or 64 bytes");

/// Where piece `p` of the keys' elements `d` stands.
__device__ __forceinline__ int place_of_piece(int d, int p) { return p ^ d / (8 / KEY_PIECES) % KEY_PIECES; }

struct Tiles {
  struct Stage { u16 keys[C::HEAD_DIM][POSITIONS]; u16 values[POSITIONS][VALUE_STRIDE]; };
  alignas(128) Stage stages[2];

  /// Copies the positions from `start` on, which stand in one page.
  __device__ __forceinline__ void fetch(int into, const u8 *keys, const u8 *values, size_t block, int start, int low, int high) {
    Stage &stage = stages[into];
    const u16 *from_keys = (const u16 *)(keys + block) + start % C::PAGE_LEN;
    const u16 *from_values = (const u16 *)(values + block) + start % C::PAGE_LEN * C::HEAD_DIM;
    constexpr int PIECES = C::HEAD_DIM * POSITIONS / 8;
#pragma unroll
    for (int i = 0; i < PIECES; i += THREADS) {
      int d = threadIdx.x / KEY_PIECES, p = threadIdx.x % KEY_PIECES;
      u16 *to = &stage.keys[d][place_of_piece(d, p) * 8];
      static_assert(THREADS / KEY_PIECES % 8 == 0, "pieces change places alike");
      d = i / KEY_PIECES;
      if (PIECES % THREADS == 0 || i + threadIdx.x < PIECES)
        copy_async(to + d * POSITIONS, from_keys + (threadIdx.x / KEY_PIECES + d) * C::PAGE_LEN + p * 8);
    }
    // What was never stored may be anything, and has to be zero where weights are.
#pragma unroll
    for (int i = 0; i < PIECES; i += THREADS) {
      constexpr int ROW = C::HEAD_DIM / 8;
      constexpr bool WHOLE = THREADS % ROW == 0;
      int p = WHOLE ? threadIdx.x / ROW + i / ROW : (i + threadIdx.x) / ROW;
      int d = (WHOLE ? threadIdx.x % ROW : (i + threadIdx.x) % ROW) * 8;
      if (PIECES % THREADS == 0 || i + threadIdx.x < PIECES)
        copy_async(&stage.values[p][d], from_values + p * C::HEAD_DIM + d, start + p >= low && start + p < high);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  /// Makes what was fetched ready to be loaded.
  __device__ __forceinline__ void unpack(int, int, int, int) {}

  __device__ __forceinline__ float largest_scale() const { return 1.f; }
};

/// Loads operands from a stage.
struct Operands {
  u32 keys, values;

  __device__ __forceinline__ Operands(const Tiles &tiles, int stage) {
    const int row = threadIdx.x % 16, column = threadIdx.x % 32 / 16 * 8;
    keys = shared_address(&tiles.stages[stage].keys[row][place_of_piece(row, column / 8) * 8]);
    values = shared_address(&tiles.stages[stage].values[row][column]);
  }

  /// 16 elements from `d` on of 16 positions from `p` on: operands of two products of queries and keys.
  __device__ __forceinline__ void load_keys(u32 (&b)[4], int d, int p) const { load_transposed(b, (keys ^ p * 2) + d * POSITIONS * 2); }

  /// The same of values: operands of two products of weights and values.
  __device__ __forceinline__ void load_values(u32 (&b)[4], int d, int p) const {
    load_transposed(b, values + (p * VALUE_STRIDE + d) * 2);
  }

  __device__ __forceinline__ float key_scale(int) const { return 1.f; }
  __device__ __forceinline__ float value_scale(int) const { return 1.f; }
};
