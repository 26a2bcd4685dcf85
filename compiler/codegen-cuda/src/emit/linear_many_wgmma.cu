// y[m, n] = sum_k x[m, k] w[n, k] for many rows, multiplied by `wgmma`.
//
// The product is transposed: weights are its operand A, from registers, and rows of x its operand B, from shared memory. A warp
// decodes the 16 channels of a block into the very registers that the product takes, so decoded weights pass through no memory.
// Channels 2g and 2g + 1 are rows g and g + 8 of the operand. Which inputs a thread has of a group of 32 follows from how codes
// lie in memory, and `widen` writes x in that order.
//
// K is cut into slabs of 64 inputs. A ring of slabs lies in shared memory: x as `widen` has swizzled it, codes and fields as they
// lie in the packed matrix. Asynchronous copies bring them, and mbarriers count what has come and who has done with it. While the
// products of one group of 32 inputs are under way, another is decoded.
//
// A tile has 256 rows, or 128 or 64 where there are fewer, by 128 channels. Where that makes too few tiles of few rows, tiles
// have 64 channels, and of the two warpgroups one takes the even slabs and the other the odd ones.

constexpr int THREADS = 256, WARPS = 8, SLAB = 64, TILE_CHANNELS = 128, OUT_STRIDE = TILE_CHANNELS + 4;
constexpr int SLABS = PADDED / SLAB;
constexpr int CHANNEL_BLOCKS = (W::N + 15) / 16, CHANNEL_TILES = (W::N + TILE_CHANNELS - 1) / TILE_CHANNELS;
constexpr int MULTIPROCESSORS = 132;
/// Whether operands are f16, exact to 11 bits, with factors of their own for rows of x; else they are bf16.
constexpr bool HALF = W::BITS <= 6 && !W::BF16_SCALES;
/// Bytes of codes and fields: of a slab of a block of channels, and of all its inputs.
constexpr bool GROUPED = W::GROUPS > 0;
constexpr int FIELD_ROW = !GROUPED ? 0 : W::BF16_SCALES ? 32 : 16;
constexpr int SLAB_CODES = GROUPED ? 2 * W::GROUP_ROWS * 64 : SLAB / 2 * 64, SLAB_FIELDS = 2 * FIELD_ROW;
constexpr int CODES = GROUPED ? W::GROUPS * W::GROUP_ROWS * 64 : (W::K + 1) / 2 * 64, FIELDS = W::GROUPS * FIELD_ROW;

/// Shared memory of tiles of `ROWS` rows. Each warp has codes and fields of its own.
template <int ROWS>
struct Ring {
  static constexpr int X = ROWS * SLAB * 2, STAGE = X + WARPS * (SLAB_CODES + SLAB_FIELDS);
  static constexpr int ROOM = SHARED_BYTES - 1024 - ROWS * 4 - 2 * 16 * 8;
  static constexpr int MOST = ROOM / STAGE < 16 ? ROOM / STAGE : 16;
  /// An even number where warpgroups may share slabs out, so that each has slots of its own.
  static constexpr int STAGES = ROWS == 256 ? MOST : MOST / 2 * 2;
  static constexpr int CODES = STAGES * X, FIELDS = CODES + STAGES * WARPS * SLAB_CODES;
  static constexpr int FACTORS = STAGES * STAGE, BARRIERS = FACTORS + ROWS * 4;
  /// Two slabs of a warpgroup are in use before the first of them is filled again.
  static constexpr bool MAY_SPLIT = STAGES >= 8;
  static_assert(STAGES >= 4, "and two more are under way");
  static_assert(ROWS * OUT_STRIDE * 4 <= FACTORS, "results fit where the ring was");
};

/// A slot of the ring, and the parity of the times that it was filled.
struct Place {
  int slot, parity;

  __device__ __forceinline__ Place after(int slots, int all) const {
    int to = slot + slots;
    return to < all ? Place{to, parity} : Place{to - all, parity ^ 1};
  }
};

__device__ __forceinline__ void expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, int parity) {
  asm volatile("{\n.reg .pred passed;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 passed, [%0], %1;\n@!passed bra AGAIN;\n}" ::"r"(
                   barrier),
               "r"(parity)
               : "memory");
}
__device__ __forceinline__ void copy(u32 to, const void *from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

/// A slab's `BYTES` of `ALL` in pieces of 16, shared out among the lanes of a warp.
template <int BYTES, int ALL>
__device__ __forceinline__ void bring(u32 to, const u8 *from, int slab, int lane) {
#pragma unroll
  for (int first = 0; first < BYTES; first += 512) {
    const int at = first + lane * 16;
    if ((first + 512 <= BYTES || at < BYTES) && (ALL % BYTES == 0 || slab * BYTES + at < ALL))
      copy_async(to + at, from + slab * BYTES + at);
  }
}

/// What `wgmma` takes for a matrix of rows of 128 swizzled bytes: eight rows are 1024 bytes apart from the next eight.
__device__ __forceinline__ u64 descriptor(u32 address) { return (u64)(address >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62; }

__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
  u32 sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
__device__ __forceinline__ u32 multiply_halves(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ u32 multiply_add_halves(u32 a, u32 b, u32 c) {
  u32 sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

__device__ __forceinline__ u32 twice_low(u32 pair) {
  u32 both;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {low, low};\n}" : "=r"(both) : "r"(pair));
  return both;
}
__device__ __forceinline__ u32 twice_high(u32 pair) {
  u32 both;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {high, high};\n}" : "=r"(both) : "r"(pair));
  return both;
}

/// Whole numbers from 0 to 1023 become halves by these bits, and 1024 too large.
constexpr u32 HALVES_1024 = 0x64006400u;
/// -(1024 + n), twice.
__device__ constexpr u32 less_1024(int n) { return (0xe400u + n) * 0x10001u; }
/// 2^23, likewise for floats.
constexpr u32 FLOAT_2_23 = 0x4b000000u;

struct alignas(8) Pair { float x, y; };

/// What decoding needs of the matrix.
struct Decoder {
  /// Entries stand 128 too high, and so do codes that are bytes.
  Table table;
  /// What a choice adds, twice.
  u32 shifts;
  /// [`HALVES_1024`] in a register.
  u32 halves_1024;

  /// `zero` is one that the compiler does not know: it would fetch the constant anew for each use.
  __device__ __forceinline__ void load(const u8 *packed, u32 zero) {
    table.load(packed);
#pragma unroll
    for (int i = 0; i < Table::WORDS; ++i) table.entries[i] ^= 0x80808080u;
    shifts = HALF ? half_of((float)table.shift) * 0x10001u : 0;
    halves_1024 = HALVES_1024 | zero;
  }
};

/// What is added to codes of two neighbouring channels, and by what they are multiplied then: as pairs of halves, or as floats.
struct Scales {
  u32 added[2], scale[2];

  __device__ __forceinline__ void load(const Decoder &decoder, const u8 *fields, int g) {
    if constexpr (HALF) {
      // Both channels at once.
      u32 both = pick(*(const u16 *)(fields + 2 * g), 0, 0x4140);
      constexpr u32 CHOICES = (1u << W::CHOICE_BITS) - 1, SCALES = 0xffu >> W::CHOICE_BITS;
      u32 scales = add_halves((both >> W::CHOICE_BITS & SCALES * 0x10001u) | decoder.halves_1024, less_1024(W::BIAS));
      u32 choices = add_halves((both & CHOICES * 0x10001u) | decoder.halves_1024, less_1024(0));
      u32 sums = W::CHOICE_BITS == 0 ? less_1024(128) : multiply_add_halves(choices, decoder.shifts, less_1024(128));
      scale[0] = twice_low(scales), scale[1] = twice_high(scales);
      added[0] = twice_low(sums), added[1] = twice_high(sums);
    } else {
      u32 both = *(const u32 *)(fields + 4 * g);
      scale[0] = both << 16, scale[1] = both & 0xffff0000u;
    }
  }

  /// Weights of the bytes `low` and `high` of a word, as the product takes them. Bytes stand 128 too high.
  __device__ __forceinline__ u32 pair(const Decoder &decoder, u32 word, int low, int high, int channel) const {
    if constexpr (HALF) {
      u32 halves = pick(word, decoder.halves_1024, 0x5050 | low | high << 8);
      return multiply_halves(add_halves(halves, added[channel]), scale[channel]);
    } else {
      constexpr float LESS = 8388608.f + 128.f;
      float by = bits_to_float(scale[channel]);
      float first = bits_to_float(pick(word, FLOAT_2_23, 0x7440 | low)) - LESS;
      float second = bits_to_float(pick(word, FLOAT_2_23, 0x7440 | high)) - LESS;
      return bf16_pair(first * by, second * by);
    }
  }
};

/// A thread's weights of a group, half a slab: operand A of two products. `codes` and `fields` are those of the group.
__device__ __forceinline__ void decode(u32 (&a)[2][4], const Decoder &decoder, const u8 *codes, const u8 *fields, int group, int g,
                                       int t) {
  if constexpr (!GROUPED) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = i * 4 + t;
      Two both = {0, 0};
      if (CODES % SLAB_CODES == 0 || group * (SLAB_CODES / 2) + row * 64 < CODES) both = *(const Two *)(codes + row * 64 + 8 * g);
      a[i / 2][i % 2 * 2] = both.x, a[i / 2][i % 2 * 2 + 1] = both.y;
    }
  } else if (W::GROUPS % 2 == 0 || group < W::GROUPS) {
    const u8 *rows = codes + 8 * g;
    // Of each channel two words, one for each of two products.
    u32 words[2][2];
    if constexpr (W::BITS == 8) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Two both = *(const Two *)(rows + (4 * j + t) * 64);
        words[0][j] = both.x ^ 0x80808080u, words[1][j] = both.y ^ 0x80808080u;
      }
    } else {
      Two low = *(const Two *)(rows + (W::PLANE_ROW + plane_row<W::PLANE_WIDTH>(t)) * 64), high = {0, 0};
      if constexpr (W::HIGH_WIDTH > 0) {
        high = *(const Two *)(rows + (W::HIGH_ROW + plane_row<W::HIGH_WIDTH>(t)) * 64);
        high.x = plane_bits<W::HIGH_WIDTH>(high.x, t), high.y = plane_bits<W::HIGH_WIDTH>(high.y, t);
      }
      Octet even = look_up<W::BITS>(decoder.table, plane_bits<W::PLANE_WIDTH>(low.x, t), high.x);
      Octet odd = look_up<W::BITS>(decoder.table, plane_bits<W::PLANE_WIDTH>(low.y, t), high.y);
      words[0][0] = even.first, words[0][1] = even.second, words[1][0] = odd.first, words[1][1] = odd.second;
    }
    Scales scales;
    scales.load(decoder, fields, g);
    // Neighbouring inputs make a pair: in an octet they are two bytes apart.
    constexpr int APART = W::BITS == 8 ? 1 : 2, NEXT = W::BITS == 8 ? 2 : 1;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[j][i] = scales.pair(decoder, words[i % 2][j], i / 2 * NEXT, i / 2 * NEXT + APART, i % 2);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = 0;
  }
}

/// A tile of results; they lie where the ring was, rows of x with `OUT_STRIDE` numbers each.
struct Tile { int first_row, rows, first_channel, channels; };

/// Multiplies tile `index` of `ROWS` rows. `shared` is aligned as swizzling wants it.
template <int ROWS>
__device__ __forceinline__ Tile multiply_tile(u8 *shared, const u16 *x, const u8 *packed, u64 row_count, int index, bool split) {
  typedef Ring<ROWS> R;
  const int rows = (int)row_count, channels = split ? TILE_CHANNELS / 2 : TILE_CHANNELS;
  const int row_tiles = (rows + ROWS - 1) / ROWS;
  const int first_row = index % row_tiles * ROWS, first = index / row_tiles * channels, there = min(ROWS, rows - first_row);
  if (first >= W::N) return {0, 0, 0, 0};
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int local = split ? warp % 4 : warp;
  // Blocks behind the last repeat it; their results are not stored.
  const u8 *block = packed + W::HEADER + (size_t)min(first / 16 + local, CHANNEL_BLOCKS - 1) * W::BLOCK;
  const int begin = split ? warp / 4 : 0, apart = split ? 2 : 1;
  const u32 base = shared_address(shared), full = base + R::BARRIERS, empty = full + R::STAGES * 8;
  if (thread == 0) {
    for (int s = 0; s < 2 * R::STAGES; ++s)
      // Full: all threads, and the one that expects x. Empty: all warps.
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full + s * 8),
                   "r"((s < R::STAGES ? THREADS : WARPS) / apart + (s < R::STAGES)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  // A warp brings its own codes and fields of a slab, and one of them x.
  auto fill = [&](int slab, int slot) {
    bring<SLAB_CODES, CODES>(base + R::CODES + (slot * WARPS + warp) * SLAB_CODES, block + W::CODES, slab, lane);
    if constexpr (GROUPED)
      bring<SLAB_FIELDS, FIELDS>(base + R::FIELDS + (slot * WARPS + warp) * SLAB_FIELDS, block + W::FIELDS, slab, lane);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full + slot * 8) : "memory");
  };
  const bool brings_x = local == 0 && lane == 0;
  auto fill_x = [&](int slab, int slot) {
    const int bytes = there * SLAB * 2;
    expect(full + slot * 8, bytes);
    copy(base + slot * R::X, x + ((size_t)slab * rows + first_row) * SLAB, bytes, full + slot * 8);
  };
  for (int slab = begin; slab < min(SLABS, R::STAGES); slab += apart) fill(slab, slab);
  wait_for_launches();
  if (brings_x)
    for (int slab = begin; slab < min(SLABS, R::STAGES); slab += apart) fill_x(slab, slab);
  __syncwarp();

  Decoder decoder;
  decoder.load(packed, (u32)(row_count >> 32));
  float channel_scale[2] = {1.f, 1.f};
  if constexpr (HALF) channel_scale[0] = ((const float *)block)[2 * g], channel_scale[1] = ((const float *)block)[2 * g + 1];
  float *factors = (float *)(shared + R::FACTORS);
  if (HALF && thread < ROWS) factors[thread] = thread < there ? ((const float *)(x + (size_t)rows * PADDED))[first_row + thread] : 0.f;
  // Rows that are not there are multiplied as zeros.
  for (int i = there * 8 + thread; there < ROWS && i < ROWS * 8 * R::STAGES; i += THREADS)
    if (i % (ROWS * 8) >= there * 8) *(Four *)(shared + i * 16) = {0, 0, 0, 0};
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  float sums[ROWS / 2] = {};
  const u64 matrices = descriptor(base);
  auto decode_group = [&](u32 (&a)[2][4], int slab, int slot, int half) {
    const int at = (slot * WARPS + warp) * 2 + half;
    decode(a, decoder, shared + R::CODES + at * (SLAB_CODES / 2), shared + R::FIELDS + at * FIELD_ROW, slab * 2 + half, g, t);
  };
  auto multiply_group = [&](const u32 (&a)[2][4], int slot, int half) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2; ++i) multiply(sums, a[i], matrices + slot * (R::X >> 4) + half * 4 + i * 2);
    // Besides these products, those of the group before may go on; what was read for the one before that is free.
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 2;" ::: "memory");
  };
  // Where the slab is that is multiplied, the next, and the two before.
  Place here = {begin, 0}, next = here.after(apart, R::STAGES), done = here, older = here;
  // Multiplies a slab, and decodes the next into registers of the one before.
  auto turn = [&](const u32 (&now)[2][2][4], u32 (&then)[2][2][4], int slab) {
    const bool more = slab + apart < SLABS;
    multiply_group(now[0], here.slot, 0);
    if (more) {
      wait(full + next.slot * 8, next.parity);
      decode_group(then[0], slab + apart, next.slot, 0);
    }
    multiply_group(now[1], here.slot, 1);
    if (slab >= apart && lane == 0) arrive(empty + done.slot * 8);
    // The other warpgroup is given one slab's time to be done with what is overwritten.
    const int refill = slab - 2 * apart + R::STAGES;
    if (slab >= 2 * apart && refill < SLABS) {
      if (brings_x) {
        wait(empty + older.slot * 8, older.parity);
        fill_x(refill, older.slot);
      }
      __syncwarp();
      fill(refill, older.slot);
    }
    if (more) decode_group(then[1], slab + apart, next.slot, 1);
    older = done, done = here, here = next, next = next.after(apart, R::STAGES);
  };
  u32 even[2][2][4], odd[2][2][4];
  if (begin < SLABS) {
    wait(full + here.slot * 8, here.parity);
    decode_group(even[0], begin, here.slot, 0), decode_group(even[1], begin, here.slot, 1);
  }
  for (int slab = begin; slab < SLABS; slab += 2 * apart) {
    turn(even, odd, slab);
    if (slab + apart < SLABS) turn(odd, even, slab + apart);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

  __syncthreads();
  float *tile = (float *)shared, *mine = tile + t * 2 * OUT_STRIDE + local * 16 + 2 * g;
  // A thread has two neighbouring channels of two rows of every eight.
  constexpr int PAIRS = ROWS / 4;
  auto place = [&](int i) -> Pair & { return *(Pair *)(mine + (i / 2 * 8 + i % 2) * OUT_STRIDE); };
  auto sum = [&](int i) { return Pair{sums[i / 2 * 4 + i % 2], sums[i / 2 * 4 + i % 2 + 2]}; };
  if (split) {
    if (warp >= 4) {
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) place(i) = sum(i);
    }
    __syncthreads();
  }
  if (!split || warp < 4) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      Pair pair = sum(i);
      if (split) pair.x += place(i).x, pair.y += place(i).y;
      float factor = HALF ? factors[i / 2 * 8 + t * 2 + i % 2] : 1.f;
      place(i) = {pair.x * channel_scale[0] * factor, pair.y * channel_scale[1] * factor};
    }
  }
  __syncthreads();
  return {first_row, there, first, channels};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const u16 *x, const u8 *__restrict__ packed BIAS_PARAMETER RESIDUAL_PARAMETER, void *out, u64 row_count, u64) {
  let_next_launch_begin();
  extern __shared__ u8 given[];
  u8 *shared = given + (1024 - shared_address(given) % 1024) % 1024;
  // Blocks are launched for tiles of 64 channels by 256 rows; those behind the last tile have nothing to do.
  const int rows = (int)row_count, index = blockIdx.y * gridDim.x + blockIdx.x;
  // Time that all tiles of a height take, in units of a row of tiles on all multiprocessors.
  auto time = [&](int height) {
    int tiles = CHANNEL_TILES * ((rows + height - 1) / height);
    return (tiles + MULTIPROCESSORS - 1) / MULTIPROCESSORS * height;
  };
  // A weight that is decoded for 128 rows costs more, for each, than one decoded for 256.
  const bool low = rows <= 128 || (CHANNEL_TILES * ((rows + 127) / 128) <= gridDim.x * gridDim.y && time(128) * 6 < time(256) * 5);
  constexpr bool FEW = CHANNEL_TILES < MULTIPROCESSORS;
  const Tile tile = rows <= 64 ? multiply_tile<64>(shared, x, packed, row_count, index, FEW && Ring<64>::MAY_SPLIT)
                    : low      ? multiply_tile<128>(shared, x, packed, row_count, index, FEW && Ring<128>::MAY_SPLIT && rows <= 128)
                               : multiply_tile<256>(shared, x, packed, row_count, index, false);
  if (tile.channels == TILE_CHANNELS)
    finish_tile<TILE_CHANNELS, OUT_STRIDE, THREADS>((const float *)shared, tile.rows, tile.first_row, tile.first_channel, BIAS_ARGUMENT,
                                                    RESIDUAL_ARGUMENT, out);
  else
    finish_tile<TILE_CHANNELS / 2, OUT_STRIDE, THREADS>((const float *)shared, tile.rows, tile.first_row, tile.first_channel,
                                                        BIAS_ARGUMENT, RESIDUAL_ARGUMENT, out);
}
