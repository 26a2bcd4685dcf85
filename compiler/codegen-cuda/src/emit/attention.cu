// Causal attention over the paged cache. A warp has `ROWS` rows, each a query head of a token, and walks the positions they see
// 32 at a time: a lane has one position's scores, then some elements of the sums. Constants beside those of the cache: HEADS,
// GROUP (query heads per KV head), QUERY_SCALE, WINDOW (0: none), SPAN, INT8 (output).

constexpr int ROWS = 4, WARPS = 4;
constexpr int CHUNKS = (C::HEAD_DIM + 31) / 32;
constexpr int PARTIAL = C::HEAD_DIM + 4;
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

/// What a maximum counts as in differences: without any score yet there is nothing to subtract.
__device__ __forceinline__ float finite(float most) { return most == minus_infinity() ? 0.f : most; }

/// What rows have gathered from the positions walked so far; of `sums` a lane has elements `lane + 32 c`.
struct Gathered {
  float most[ROWS], total[ROWS], sums[ROWS][CHUNKS];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      most[r] = minus_infinity(), total[r] = 0.f;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) sums[r][c] = 0.f;
    }
  }
};

/// Queries of a warp's rows, in shared memory: scaled, and rotated and rounded as the cache asks for.
struct Queries {
  float q[ROWS][C::HEAD_DIM];
  float scale[ROWS];

  __device__ __forceinline__ void load(int row, const float *from) {
    const int lane = threadIdx.x % 32;
    for (int d = lane; d < C::HEAD_DIM; d += 32) q[row][d] = from[d] * QUERY_SCALE;
    __syncwarp();
    if constexpr (HAS_CODES) {
      if constexpr (C::KIND == KV_INT4) hadamard(q[row]);
      float inverse, s = int8_scale(q[row], inverse);
      __syncwarp();
      for (int d = lane; d < C::HEAD_DIM; d += 32) q[row][d] = (float)int8_code(q[row][d], inverse);
      if (lane == 0) scale[row] = s;
    }
    __syncwarp();
  }
};

/// Products of every row with the key at `place` of a block.
__device__ __forceinline__ void score(const Queries &queries, const u8 *block, int place, float (&dot)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) dot[r] = 0.f;
  if constexpr (C::KIND == KV_F32 || C::KIND == KV_F16) {
#pragma unroll 8
    for (int d = 0; d < C::HEAD_DIM; ++d) {
      float k = C::KIND == KV_F32 ? ((const float *)block)[d * C::PAGE_LEN + place]
                                  : half_to_float(((const u16 *)block)[d * C::PAGE_LEN + place]);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) dot[r] = fmaf(queries.q[r][d], k, dot[r]);
    }
  } else if constexpr (C::KIND == KV_INT8) {
#pragma unroll 4
    for (int d = 0; d < C::HEAD_DIM; d += 4) {
      u32 word = ((const u32 *)block)[d / 4 * C::PAGE_LEN + place];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Heads whose width is no multiple of four end within a word.
        if (C::HEAD_DIM % 4 == 0 || d + i < C::HEAD_DIM) {
          float k = (float)(i8)(word >> (8 * i));
#pragma unroll
          for (int r = 0; r < ROWS; ++r) dot[r] = fmaf(queries.q[r][d + i], k, dot[r]);
        }
      }
    }
  } else {
#pragma unroll 2
    for (int d = 0; d < C::HEAD_DIM; d += 8) {
      u32 word = ((const u32 *)block)[d / 8 * C::PAGE_LEN + place];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float k = (float)((int)(word >> (i % 4 * 8 + i / 4 * 4) & 15) - 8);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) dot[r] = fmaf(queries.q[r][d + i], k, dot[r]);
      }
    }
  }
  if constexpr (HAS_CODES) {
    float scale = *(const float *)(block + C::SCALES + 4 * place);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) dot[r] *= scale * queries.scale[r];
  }
}

/// Element `d` of the value at `place` of a block, without its scale.
__device__ __forceinline__ float value(const u8 *block, int place, int d) {
  if constexpr (C::KIND == KV_F32) return ((const float *)block)[place * C::HEAD_DIM + d];
  else if constexpr (C::KIND == KV_F16) return half_to_float(((const u16 *)block)[place * C::HEAD_DIM + d]);
  else if constexpr (C::KIND == KV_INT8) return (float)((const i8 *)block)[(place / 4 * C::HEAD_DIM + d) * 4 + place % 4];
  else {
    constexpr int HALF = C::HEAD_DIM / 2;
    u32 byte = block[(place / 4 * HALF + d % HALF) * 4 + place % 4];
    return (float)((int)(byte >> (d / HALF * 4) & 15) - 8);
  }
}

/// Adds 32 positions from `first` on, which stand at `place` of their page, to rows that see `from` to `to`.
__device__ __forceinline__ void gather(Gathered &all, const Queries &queries, const u8 *keys, const u8 *values, int place,
                                       int first, const int (&from)[ROWS], const int (&to)[ROWS]) {
  const int lane = threadIdx.x % 32;
  float weights[ROWS];
  score(queries, keys, place + lane, weights);
  float value_scale = 1.f;
  if constexpr (HAS_CODES) value_scale = *(const float *)(values + C::SCALES + 4 * (place + lane));
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    bool seen = first + lane >= from[r] && first + lane < to[r];
    float most = fmaxf(all.most[r], warp_max(seen ? weights[r] : minus_infinity()));
    float before = exp2f(all.most[r] - finite(most));
    float weight = seen ? exp2f(weights[r] - finite(most)) : 0.f;
    all.total[r] = all.total[r] * before + warp_sum(weight);
    all.most[r] = most;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) all.sums[r][c] *= before;
    // What was never stored may be anything; it has no weight.
    weights[r] = weight != 0.f ? weight * value_scale : 0.f;
  }
#pragma unroll 4
  for (int s = 0; s < 32; ++s) {
    float weight[ROWS];
    bool any = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      weight[r] = __shfl_sync(ALL_LANES, weights[r], s);
      any |= weight[r] != 0.f;
    }
    if (any) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        int d = lane + 32 * c;
        float v = C::HEAD_DIM % 32 == 0 || d < C::HEAD_DIM ? value(values, place + s, d) : 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          if (weight[r] != 0.f) all.sums[r][c] = fmaf(weight[r], v, all.sums[r][c]);
      }
    }
  }
}

/// First position that a token sees.
__device__ __forceinline__ int first_seen(int position) {
  return WINDOW > 0 && position + 1 > WINDOW ? position + 1 - WINDOW : 0;
}

/// Stores the result of a head: `y[c]` is its element `lane + 32 c`. `scratch` has room for a head.
__device__ __forceinline__ void store_result(void *out, int token, int head, float (&y)[CHUNKS], float *scratch) {
  const int lane = threadIdx.x % 32;
  if constexpr (C::KIND == KV_INT4) {
    __syncwarp();
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if (lane + 32 * c < C::HEAD_DIM) scratch[lane + 32 * c] = y[c];
    hadamard(scratch);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if (lane + 32 * c < C::HEAD_DIM) y[c] = scratch[lane + 32 * c];
  }
  constexpr int WIDTH = HEADS * C::HEAD_DIM;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    if constexpr (INT8) {
      static_assert(!INT8 || C::HEAD_DIM % 32 == 0, "groups of 32 within heads");
      u8 *row = (u8 *)out + (size_t)token * Int8Rows<WIDTH>::STRIDE;
      store_int8_group<WIDTH>(row, (head * C::HEAD_DIM) / 32 + c, y[c]);
    } else if (lane + 32 * c < C::HEAD_DIM) {
      ((float *)out)[(size_t)token * WIDTH + head * C::HEAD_DIM + lane + 32 * c] = y[c];
    }
  }
}
