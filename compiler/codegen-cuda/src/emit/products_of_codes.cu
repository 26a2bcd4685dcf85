// Products of weights of 2 to 8 bits by int8 activations, for kernels of few rows.
//
// A warp multiplies 16 channels by 8 columns, a group of 32 inputs at a time, with byte-wise tensor-core products: sums of a
// group are exact integers. Channel 2g and 2g + 1 of a block are rows g and g + 8 of the product, so that a thread loads
// both with one instruction; thread t of four has the inputs 8t to 8t + 7.

typedef Int8Rows<W::K> X;

/// Whether groups are made of fours.
constexpr bool WHOLE = W::GROUPS % 4 == 0;
/// Bytes of a group's codes, and of its scales.
constexpr int GROUP_CODES = W::GROUP_ROWS * 64, GROUP_FIELDS = W::BF16_SCALES ? 32 : 16;

/// Blocks of a grid of which most begin before the launch before has ended.
constexpr int MOST_EARLY_BLOCKS = 1024;

/// Asks for up to `most` groups of a block of channels, from group `first` on, so that they are in the L2 cache when they are
/// copied. The warps of a block share out what all of them will copy behind what they have asked for already: otherwise memory
/// would be idle until the launches before have ended and activations are there.
__device__ __forceinline__ void fetch_groups_ahead(const u8 *block, int first, int most) {
  const int groups = min(most, W::GROUPS - first);
  if (groups <= 0 || gridDim.x > MOST_EARLY_BLOCKS || threadIdx.x % 32 != 0) return;
  fetch_ahead(block + W::CODES + first * GROUP_CODES, groups * GROUP_CODES);
  fetch_ahead(block + W::FIELDS + first * GROUP_FIELDS, groups * GROUP_FIELDS);
}

/// sums = a b + from, of 16 channels and 8 columns.
__device__ __forceinline__ void multiply(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, const int (&from)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]));
}

/// A thread's codes of a group, of two channels each.
struct Codes {
  Two low, high;

  /// `codes` are the group's; of its inputs those from `8 t` on.
  __device__ __forceinline__ void load(const u8 *codes, int g, int t) {
    codes += 8 * g;
    if constexpr (W::BITS == 8) {
      low = *(const Two *)(codes + 2 * t * 64), high = *(const Two *)(codes + (2 * t + 1) * 64);
    } else {
      low = *(const Two *)(codes + (W::PLANE_ROW + plane_row<W::PLANE_WIDTH>(t)) * 64);
      if constexpr (W::HIGH_WIDTH > 0) high = *(const Two *)(codes + (W::HIGH_ROW + plane_row<W::HIGH_WIDTH>(t)) * 64);
    }
  }
};

/// Weights of a group, ready to be multiplied. `SPLIT_SIGNS` says what [`Table::has_split_signs`] does.
template <bool SPLIT_SIGNS>
struct Weights {
  u32 a[4], upper[4];

  __device__ __forceinline__ void decode(const Table &table, const Codes &codes, int t) {
    if constexpr (W::BITS == 8) {
      a[0] = codes.low.x, a[1] = codes.low.y, a[2] = codes.high.x, a[3] = codes.high.y;
    } else if constexpr (W::BITS == 4 && SPLIT_SIGNS) {
      // Entry below zero or -1 from the first half of the table; entry plus one, or 0, from the second: both together are
      // the weight, and tensor cores have time to add them up.
      u32 x = codes.low.x ^ 0x88888888u, y = codes.low.y ^ 0x88888888u;
      u32 first = table.entries[2] + 0x01010101u, second = table.entries[3] + 0x01010101u;
      a[0] = pick(table.entries[0], table.entries[1], codes.low.x);
      a[1] = pick(table.entries[0], table.entries[1], codes.low.y);
      a[2] = pick(table.entries[0], table.entries[1], codes.low.x >> 16);
      a[3] = pick(table.entries[0], table.entries[1], codes.low.y >> 16);
      upper[0] = pick(first, second, x), upper[1] = pick(first, second, y);
      upper[2] = pick(first, second, x >> 16), upper[3] = pick(first, second, y >> 16);
    } else {
      Two low = codes.low, high = {0, 0};
      low.x = plane_bits<W::PLANE_WIDTH>(low.x, t), low.y = plane_bits<W::PLANE_WIDTH>(low.y, t);
      if constexpr (W::HIGH_WIDTH > 0)
        high.x = plane_bits<W::HIGH_WIDTH>(codes.high.x, t), high.y = plane_bits<W::HIGH_WIDTH>(codes.high.y, t);
      Octet first = look_up<W::BITS>(table, low.x, high.x), second = look_up<W::BITS>(table, low.y, high.y);
      a[0] = first.first, a[1] = second.first, a[2] = first.second, a[3] = second.second;
    }
  }

  /// sums = products + from.
  __device__ __forceinline__ void multiply_by(int (&sums)[4], u32 b0, u32 b1, const int (&from)[4]) const {
    multiply(sums, a, b0, b1, from);
    if constexpr (W::BITS == 4 && SPLIT_SIGNS) multiply(sums, upper, b0, b1, sums);
  }
};

/// Eight neighbouring activations in the order of the weights.
__device__ __forceinline__ Two ordered(Two eight) {
  if constexpr (W::BITS == 8) return eight;
  return {pick(eight.x, eight.y, OCTET_FIRST), pick(eight.x, eight.y, OCTET_SECOND)};
}

/// A thread's eight activations of a group.
__device__ __forceinline__ Two activations(const u8 *row, int group, int t) { return ordered(*(const Two *)(row + group * 32 + 8 * t)); }

/// 1.5 * 2^23: that and a whole number of up to 22 bits is a float whose bits are those of the former plus the latter.
constexpr float FLOAT_COUNT = 12582912.f;
constexpr int FLOAT_COUNT_BITS = 0x4b400000;

/// Scales of two neighbouring channels in a group, as they are stored.
struct Fields {
  u32 both;

  __device__ __forceinline__ u32 of(int channel) const { return channel == 0 ? both & 0xff : both >> 8; }

  /// `fields` are the group's.
  __device__ __forceinline__ void load(const u8 *fields, int g) {
    if constexpr (W::BF16_SCALES) both = *(const u32 *)(fields + 4 * g);
    else both = *(const u16 *)(fields + 2 * g);
  }

  /// Makes the scales zero.
  __device__ __forceinline__ void clear() { both = W::BF16_SCALES ? 0 : (W::BIAS << W::CHOICE_BITS) * 0x101; }

  /// The scales, which bf16 holds exactly, that of the first channel in the lower half.
  __device__ __forceinline__ u32 scales() const {
    if constexpr (W::BF16_SCALES) return both;
    else return bf16_pair((float)field_scale(of(0)), (float)field_scale(of(1)));
  }

  /// A channel's scale times what its choice adds to every weight.
  __device__ __forceinline__ float added(const Table &table, int channel) const {
    return (float)(field_choice(of(channel)) * table.shift * field_scale(of(channel)));
  }

  /// What a group's sum of products of codes adds to a channel's result.
  __device__ __forceinline__ float part(const Table &table, int channel, int product, float scale_x, int codes_sum) const {
    if constexpr (W::BF16_SCALES) {
      return (float)product * (bits_to_float(channel == 0 ? both << 16 : both & 0xffff0000u) * scale_x);
    } else {
      u32 field = of(channel);
      return (float)((product + field_choice(field) * table.shift * codes_sum) * field_scale(field)) * scale_x;
    }
  }
};
