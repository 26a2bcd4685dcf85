// The paged KV cache: blocks of one page and KV head, see attar_artifact::manifest::KvType. Constants stand in `struct C`, which
// is generated: KIND, HEAD_DIM, KV_HEADS, PAGE_LEN, BLOCK (bytes), SCALES (offset within a block), RUN, HADAMARD (numbers that
// are rotated together) and HADAMARD_FACTOR.

enum { KV_F32, KV_F16, KV_INT8, KV_INT4 };
constexpr bool HAS_CODES = C::KIND == KV_INT8 || C::KIND == KV_INT4;

/// The block of a page and KV head.
__device__ __forceinline__ size_t block_offset(u32 page, int head) {
  return ((size_t)(page / C::RUN * C::KV_HEADS + head) * C::RUN + page % C::RUN) * C::BLOCK;
}

/// Rotates a head that one warp has in shared memory by a Hadamard transform.
__device__ __forceinline__ void hadamard(float *head) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  for (int i = lane; i < C::HEAD_DIM; i += 32) head[i] *= C::HADAMARD_FACTOR;
  __syncwarp();
  for (int apart = 1; apart < C::HADAMARD; apart *= 2) {
    for (int i = lane; i < C::HEAD_DIM / 2; i += 32) {
      int low = i / apart * 2 * apart + i % apart;
      float a = head[low], b = head[low + apart];
      head[low] = a + b, head[low + apart] = a - b;
    }
    __syncwarp();
  }
}

/// Scale and inverse of numbers that become codes from -127 to 127; NaN where one of them is no number.
__device__ __forceinline__ float int8_scale(const float *head, float &inverse) {
  float most = 0.f;
  bool broken = false;
  for (int d = threadIdx.x % 32; d < C::HEAD_DIM; d += 32) {
    most = fmaxf(most, fabsf(head[d]));
    broken |= !(fabsf(head[d]) <= 3.402823466e38f);
  }
  most = warp_max(most);
  inverse = most > 0.f ? __fdiv_rn(127.f, most) : 0.f;
  return __any_sync(ALL_LANES, broken) ? __uint_as_float(0x7fc00000u) : __fdiv_rn(most, 127.f);
}

__device__ __forceinline__ int int8_code(float x, float inverse) {
  float low = x * inverse > -127.f ? x * inverse : -127.f;
  return __float2int_rn(low < 127.f ? low : 127.f);
}

/// Stores a head that one warp has in shared memory as the key, or value, of the token at `place` of a block.
template <bool VALUES>
__device__ __forceinline__ void store_head(u8 *block, int place, float *head) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if constexpr (C::KIND == KV_F32 || C::KIND == KV_F16) {
    for (int d = lane; d < C::HEAD_DIM; d += 32) {
      int at = VALUES ? place * C::HEAD_DIM + d : d * C::PAGE_LEN + place;
      if constexpr (C::KIND == KV_F32) ((float *)block)[at] = head[d];
      else ((u16 *)block)[at] = half_of(head[d]);
    }
  } else if constexpr (C::KIND == KV_INT8) {
    float inverse, scale = int8_scale(head, inverse);
    for (int d = lane; d < C::HEAD_DIM; d += 32) {
      int at = VALUES ? (place / 4 * C::HEAD_DIM + d) * 4 + place % 4 : (d / 4 * C::PAGE_LEN + place) * 4 + d % 4;
      block[at] = (u8)int8_code(head[d], inverse);
    }
    if (lane == 0) *(float *)(block + C::SCALES + 4 * place) = scale;
  } else {
    hadamard(head);
    float highest = 0.f, lowest = 0.f;
    bool broken = false;
    for (int d = lane; d < C::HEAD_DIM; d += 32) {
      highest = fmaxf(highest, head[d]), lowest = fminf(lowest, head[d]);
      broken |= !(fabsf(head[d]) <= 3.402823466e38f);
    }
    highest = warp_max(highest), lowest = warp_min(lowest);
    float most = highest >= -lowest ? highest : lowest;
    float inverse = most == 0.f ? 0.f : __fdiv_rn(-8.5f, most);
    auto code = [&](int d) {
      float low = head[d] * inverse > -8.f ? head[d] * inverse : -8.f;
      return (u32)(__float2int_rn(low < 7.f ? low : 7.f) + 8);
    };
    for (int i = lane; i < C::HEAD_DIM / 2; i += 32) {
      // Both halves of a byte belong to one token.
      int at = VALUES ? (place / 4 * (C::HEAD_DIM / 2) + i) * 4 + place % 4 : (i / 4 * C::PAGE_LEN + place) * 4 + i % 4;
      int low = VALUES ? i : i / 4 * 8 + i % 4, high = VALUES ? i + C::HEAD_DIM / 2 : low + 4;
      block[at] = (u8)(code(low) | code(high) << 4);
    }
    bool any = __any_sync(ALL_LANES, broken);
    if (lane == 0) *(float *)(block + C::SCALES + 4 * place) = any ? __uint_as_float(0x7fc00000u) : __fdiv_rn(most, -8.5f);
  }
}

/// Where the tokens of a step stand in the cache.
struct Paging {
  const int *positions, *sequences;
  const u32 *tables;
  u64 stride;

  __device__ __forceinline__ u32 page(int sequence, int position) const {
    return tables[(size_t)sequence * stride + position / C::PAGE_LEN];
  }
};
