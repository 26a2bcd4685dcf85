// Packed weights: blocks of 16 channels over all inputs, see attar_format::packed. Constants of the format and the shape stand
// in `struct W`, which is generated:
//
//   N, K, GROUPS            shape, and groups of 32 inputs (0 for floats)
//   BITS, ENTRIES           of a code; 8, 16 and 32 are whole numbers, fewer are indices into a table of so many entries
//   HEADER, BLOCK, FIELDS, CODES   bytes: before the first block, of a block, and offsets within it
//   GROUP_ROWS              64-byte rows of codes of a group
//   PLANE_ROW, PLANE_WIDTH  first row and bits of the plane with the low bits, HIGH_ROW and HIGH_WIDTH of that with the others
//   BF16_SCALES             whether a group has a bf16 scale for each channel; else a field, and a channel an f32 of its own
//   BIAS, CHOICE_BITS       of a group's field

/// The table of a matrix, four entries to a register, and what a group's choice adds.
struct Table {
  static constexpr int WORDS = W::ENTRIES > 8 ? W::ENTRIES / 4 : 2;
  u32 entries[WORDS];
  int shift;

  __device__ __forceinline__ void load(const u8 *packed) {
    if constexpr (W::BITS <= 6) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        entries[i] = 4 * i < W::ENTRIES ? ((const u32 *)packed)[i] : 0;
      shift = ((const i8 *)packed)[W::ENTRIES];
    }
  }

  /// Whether entries are eight below zero, then eight from 0 to 126.
  __device__ __forceinline__ bool has_split_signs() const {
    constexpr u32 SIGNS = 0x80808080u, ONES = 0x01010101u;
    if constexpr (W::BITS != 4) return false;
    else return (entries[0] & entries[1] & SIGNS) == SIGNS && ((entries[2] | entries[3] | (entries[2] + ONES) | (entries[3] + ONES)) & SIGNS) == 0;
  }

  /// Entries of four codes of 4 bits among the 16 entries that begin with register `first`: `low` has the codes' lower three
  /// bits, a nibble each; `upper` has ones in the bytes of those among the last eight.
  __device__ __forceinline__ u32 sixteen(int first, u32 low, u32 upper) const {
    return choose(pick(entries[first], entries[first + 1], low), pick(entries[first + 2], entries[first + 3], low), upper);
  }

  /// Bits of `b` where `upper` has ones, else those of `a`.
  static __device__ __forceinline__ u32 choose(u32 a, u32 b, u32 upper) {
    u32 chosen;
    asm("lop3.b32 %0, %1, %2, %3, 0xd8;" : "=r"(chosen) : "r"(a), "r"(b), "r"(upper));
    return chosen;
  }
};

/// Of eight codes, a nibble each, a byte of ones for those with the highest bit of `nibbles` set: those of the lower half, or
/// of the upper one.
struct Ones {
  u32 odd, even;

  __device__ __forceinline__ explicit Ones(u32 nibbles) : odd(nibbles), even(nibbles << 4) {}
  __device__ __forceinline__ u32 operator[](int half) const { return pick(even, odd, half == 0 ? 0xd9c8 : 0xfbea); }
};

/// Eight codes of one channel, as they come out of a register: those of inputs 8t + {0, 4, 1, 5} and 8t + {2, 6, 3, 7}, one
/// signed byte each.
struct Octet { u32 first, second; };

/// Byte selectors that put the activations of eight neighbouring inputs into an octet's order.
constexpr u32 OCTET_FIRST = 0x5140, OCTET_SECOND = 0x7362;

/// Eight codes' entries. The codes' low bits, as many as the first plane has, stand in the nibbles of `low`, the others in those
/// of `high`: byte j belongs to inputs j (lower nibble) and 4 + j.
template <int BITS>
__device__ __forceinline__ Octet look_up(const Table &table, u32 low, u32 high) {
  Octet out;
  if constexpr (BITS == 2) {
    out.first = pick(table.entries[0], 0, low);
    out.second = pick(table.entries[0], 0, low >> 16);
  } else if constexpr (BITS == 3) {
    u32 code = low | high << 2;
    out.first = pick(table.entries[0], table.entries[1], code);
    out.second = pick(table.entries[0], table.entries[1], code >> 16);
  } else {
    // `pick` takes three bits of a code; the fourth, and those of the other plane, choose between its results.
    u32 index = low & 0x77777777u;
    Ones fourths(low), fifths(high << 3), sixths(high << 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 fourth = fourths[half], found = table.sixteen(0, index, fourth);
      if constexpr (BITS > 4) {
        u32 fifth = fifths[half];
        found = Table::choose(found, table.sixteen(4, index, fourth), fifth);
        if constexpr (BITS > 5) {
          u32 last = Table::choose(table.sixteen(8, index, fourth), table.sixteen(12, index, fourth), fifth);
          found = Table::choose(found, last, sixths[half]);
        }
      }
      (half == 0 ? out.first : out.second) = found;
      index >>= 16;
    }
  }
  return out;
}

/// Row of the plane that holds the pair of quads `t`, and the first of its bits in a nibble.
template <int WIDTH>
__device__ __forceinline__ int plane_row(int t) {
  if constexpr (WIDTH == 0) return 0;
  else return t / (4 / WIDTH);
}
template <int WIDTH>
__device__ __forceinline__ u32 plane_bits(u32 word, int t) {
  constexpr u32 MASK = ((1u << WIDTH) - 1) * 0x11111111u;
  if constexpr (WIDTH == 0 || WIDTH == 4) return word;
  else return word >> (WIDTH * (t % (4 / WIDTH))) & MASK;
}

/// What a group's byte says: a signed scale and a choice.
__device__ __forceinline__ int field_scale(u32 field) { return (int)(field >> W::CHOICE_BITS) - W::BIAS; }
__device__ __forceinline__ int field_choice(u32 field) { return field & ((1 << W::CHOICE_BITS) - 1); }

/// The weights of inputs 8o to 8o + 7 of one channel, as numbers. `block` is the channel's block, `c` its place in it.
__device__ __forceinline__ void decode_octet(const Table &table, const u8 *block, int c, int o, float (&out)[8]) {
  const u8 *codes = block + W::CODES;
  if constexpr (W::BITS == 32 || W::BITS == 16) {
    constexpr int PER_ROW = 32 / W::BITS;
#pragma unroll
    for (int i = 0; i < 8; i += PER_ROW) {
      u32 word = 8 * o + i < W::K ? *(const u32 *)(codes + (8 * o + i) / PER_ROW * 64 + 4 * c) : 0;
      if constexpr (W::BITS == 32) {
        out[i] = bits_to_float(word);
      } else {
        out[i] = bits_to_float(word << 16);
        out[i + 1] = bits_to_float(word & 0xffff0000u);
      }
    }
  } else {
    int group = o / 4, t = o % 4;
    const u8 *rows = codes + group * W::GROUP_ROWS * 64 + 4 * c;
    if constexpr (W::BITS == 8) {
      float scale = bf16_to_float(((const u16 *)(block + W::FIELDS))[group * 16 + c]);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        u32 word = *(const u32 *)(rows + (2 * t + q) * 64);
#pragma unroll
        for (int i = 0; i < 4; ++i) out[4 * q + i] = scale * (float)(i8)(word >> (8 * i));
      }
    } else {
      u32 low = plane_bits<W::PLANE_WIDTH>(
          *(const u32 *)(rows + (W::PLANE_ROW + plane_row<W::PLANE_WIDTH>(t)) * 64), t);
      u32 high = 0;
      if constexpr (W::HIGH_WIDTH > 0)
        high = plane_bits<W::HIGH_WIDTH>(
            *(const u32 *)(rows + (W::HIGH_ROW + plane_row<W::HIGH_WIDTH>(t)) * 64), t);
      Octet octet = look_up<W::BITS>(table, low, high);
      float scale;
      int shift = 0;
      if constexpr (W::BF16_SCALES) {
        scale = bf16_to_float(((const u16 *)(block + W::FIELDS))[group * 16 + c]);
      } else {
        u32 field = block[W::FIELDS + group * 16 + c];
        scale = ((const float *)block)[c] * (float)field_scale(field);
        shift = field_choice(field) * table.shift;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Bytes come in the order 0, 4, 1, 5 and 2, 6, 3, 7.
        u32 word = i < 2 ? octet.first : octet.second;
        out[i] = scale * (float)((i8)(word >> (16 * (i % 2))) + shift);
        out[4 + i] = scale * (float)((i8)(word >> (16 * (i % 2) + 8)) + shift);
      }
    }
  }
}
