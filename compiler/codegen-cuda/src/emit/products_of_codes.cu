// Products of weights of 2 to 8 bits by int8 activations, for kernels of few rows.
//
// A warp multiplies 16 channels by 8 columns, a group of 32 inputs at a time, with one byte-wise tensor-core product: sums of a
// group are exact integers. Channel 2g and 2g + 1 of a block are rows g and g + 8 of the product, so that a thread loads
// both with one instruction; thread t of four has the inputs 8t to 8t + 7.

typedef Int8Rows<W::K> X;

__device__ __forceinline__ void multiply(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}

/// A thread's weights of a group.
__device__ __forceinline__ void load_weights(u32 (&a)[4], const Table &table, const u8 *block, int group, int g, int t) {
  const u8 *codes = block + W::CODES + group * W::GROUP_ROWS * 64 + 8 * g;
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
}

/// A thread's activations of a group, in the order of the weights.
__device__ __forceinline__ void load_activations(u32 &b0, u32 &b1, const u8 *row, int group, int t) {
  Two eight = *(const Two *)(row + group * 32 + 8 * t);
  b0 = eight.x, b1 = eight.y;
  if constexpr (W::BITS < 8) b0 = pick(eight.x, eight.y, OCTET_FIRST), b1 = pick(eight.x, eight.y, OCTET_SECOND);
}

/// Scales of two neighbouring channels in a group.
struct Fields {
  float scale[2];
  int signed_scale[2], added[2];

  __device__ __forceinline__ void load(const Table &table, const u8 *block, int group, int g) {
    if constexpr (W::BF16_SCALES) {
      u32 both = *(const u32 *)(block + W::FIELDS + (group * 16 + 2 * g) * 2);
      scale[0] = bits_to_float(both << 16), scale[1] = bits_to_float(both & 0xffff0000u);
    } else {
      u32 both = *(const u16 *)(block + W::FIELDS + group * 16 + 2 * g);
      signed_scale[0] = field_scale(both & 0xff), signed_scale[1] = field_scale(both >> 8);
      added[0] = field_choice(both & 0xff) * table.shift, added[1] = field_choice(both >> 8) * table.shift;
    }
  }

  /// What a group's sum of products of codes adds to a channel's result.
  __device__ __forceinline__ float part(int channel, int product, float scale_x, int codes_sum) const {
    if constexpr (W::BF16_SCALES) return (float)product * (scale[channel] * scale_x);
    else return (float)((product + added[channel] * codes_sum) * signed_scale[channel]) * scale_x;
  }
};
