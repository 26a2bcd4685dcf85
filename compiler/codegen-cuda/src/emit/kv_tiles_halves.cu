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
    // Places of a thread's first pieces; the others are so many bytes behind them.
    const int thread = threadIdx.x, place = start % C::PAGE_LEN;
    constexpr int PIECES = C::HEAD_DIM * POSITIONS / 8, VALUE_PIECES = C::HEAD_DIM / 8;
    const int d = thread / KEY_PIECES, p = thread % KEY_PIECES;
    static_assert(THREADS / KEY_PIECES % 8 == 0, "pieces change places alike");
    const u32 to_keys = shared_address(&stages[into].keys[d][place_of_piece(d, p) * 8]);
    const u8 *from_keys = keys + block + (d * C::PAGE_LEN + place + p * 8) * 2;
#pragma unroll
    for (int i = 0; i < PIECES; i += THREADS)
      if (PIECES % THREADS == 0 || i + thread < PIECES)
        copy_async(to_keys + i / KEY_PIECES * POSITIONS * 2, from_keys + i / KEY_PIECES * C::PAGE_LEN * 2);
    // What was never stored may be anything, and has to be zero where weights are.
    const u8 *from_values = values + block + place * C::HEAD_DIM * 2 + thread * 16;
    if constexpr (THREADS % VALUE_PIECES == 0) {
      const int position = start + thread / VALUE_PIECES;
      const u32 to_values = shared_address(&stages[into].values[thread / VALUE_PIECES][thread % VALUE_PIECES * 8]);
#pragma unroll
      for (int i = 0; i < PIECES; i += THREADS) {
        const int behind = i / VALUE_PIECES;
        if (PIECES % THREADS == 0 || i + thread < PIECES)
          copy_async(to_values + behind * VALUE_STRIDE * 2, from_values + i * 16, position + behind >= low && position + behind < high ? 16 : 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < PIECES; i += THREADS) {
        const int row = (i + thread) / VALUE_PIECES, column = (i + thread) % VALUE_PIECES * 8;
        if (PIECES % THREADS == 0 || i + thread < PIECES)
          copy_async(shared_address(&stages[into].values[row][column]), from_values + i * 16, start + row >= low && start + row < high ? 16 : 0);
      }
    }
    commit_copies();
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
