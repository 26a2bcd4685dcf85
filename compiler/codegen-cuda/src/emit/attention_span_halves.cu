// The part that one span of the context has in a token's attention, over an f16 cache, with tensor cores: a block per token, KV
// head and span. A warp has 32 positions. Their keys travel to registers and their values to shared memory, all at once; what
// the warps have gathered is joined in shared memory.
//
// Products have 16 rows, and the query heads of a KV head are at most 8 at a time. The other rows have what is left of queries
// and weights when they are rounded to f16, so that nothing but a sum in f32 is rounded. In the products of a warp, position
// `8 t + i` belongs to the lanes `4 g + t`.
//
// FRESH: the step has one token, and what stands before attention is done here as well. Queries are made of sums of the product
// of q, k and v by all blocks; the token's key and value are made by those that see the token, which put them where they belong
// in the cache and among what they have loaded of it.

constexpr int SPAN_WARPS = 8, PASS = 8;
constexpr int STEPS = C::HEAD_DIM / 16, TILES = C::HEAD_DIM / 8;
/// Eights of values whose sums, and sixteens of keys that are in registers at a time.
constexpr int TILES_AT_ONCE = TILES < 8 ? TILES : 8;
constexpr int KEYS_AT_ONCE = STEPS % 8 == 0 ? 8 : STEPS;
/// Bytes between values in shared memory: an odd number of 16, so that eight of them lie in different banks.
constexpr int VALUE_STRIDE = (TILES | 1) * 16;
static_assert(C::HEAD_DIM % 16 == 0 && SPAN <= SPAN_WARPS * 32 && SPAN % 32 == 0, "a warp has 32 positions");

/// Two numbers as the sum of two pairs of f16.
__device__ __forceinline__ void split(float low, float high, u32 &pair, u32 &rest) {
  pair = half_pair(low, high);
  rest = half_pair(low - half_to_float((u16)pair), high - half_to_float((u16)(pair >> 16)));
}

/// Four numbers of a row as an operand: the first two stand before the others, what is left of them 8 rows below.
__device__ __forceinline__ void split(const float *x, u32 (&a)[4]) {
  split(x[0], x[1], a[0], a[1]);
  split(x[2], x[3], a[2], a[3]);
}

/// Loads the keys of 32 positions, 16 elements in each step. Of a step's elements a lane has `4 t` to `4 t + 3`, of positions
/// `4 g` to `4 g + 3`.
__device__ __forceinline__ void load_keys(Two (&k)[KEYS_AT_ONCE][4], const u8 *from) {
#pragma unroll
  for (int s = 0; s < KEYS_AT_ONCE; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) k[s][i] = *(const Two *)(from + (16 * s + i) * C::PAGE_LEN * 2);
}

/// Asks for keys and values of 32 positions, so that they are in the L2 cache when they are read.
__device__ __forceinline__ void fetch_tile(const u8 *keys, const u8 *values) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) fetch_ahead(values, C::HEAD_DIM * 64);
  if (C::PAGE_LEN == 32) {
    if (lane == 0) fetch_ahead(keys, C::HEAD_DIM * 64);
  } else {
    for (int d = lane; d < C::HEAD_DIM; d += 32) fetch_ahead(keys + d * C::PAGE_LEN * 2, 64);
  }
}

/// Line of shared memory in which the value of one of 32 positions stands.
__device__ __forceinline__ int value_line(int place) { return place % 8 / 2 * 8 + place / 8 * 2 + place % 2; }

/// Has the values of 32 positions copied to shared memory, in the order in which products take them. Those that are
/// not in `mask` are not seen; they may be anything and count as 0.
__device__ __forceinline__ void load_values(u8 *to, const u8 *from, u32 mask) {
  const int lane = threadIdx.x % 32;
  from += lane * 16;
  // The bits of what a lane copies stand at places known here, where rows of pieces end with the lanes.
  if (32 % TILES == 0) mask >>= lane / TILES;
  // Keeps offsets out of the address.
  asm("" : "+l"(from));
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int piece = i * 32 + lane, value = piece / TILES;
    const bool seen = mask >> (32 % TILES == 0 ? i * 32 / TILES : value) & 1;
    copy_async(shared_address(to) + value_line(value) * VALUE_STRIDE + piece % TILES * 16, from + i * 512, seen ? 16 : 0);
  }
  commit_copies();
}

/// Where a sum stands: it takes the place of values of the same elements.
__device__ __forceinline__ float *sum_at(u8 *own, int head, int d) {
  return (float *)(own + (2 * head + d % 8 / 4) * VALUE_STRIDE + d / 8 * 16) + d % 4;
}

/// Adds the products of 16 elements of queries and keys: `scores[j]` are of positions `8 t + j` and `8 t + 4 + j`.
__device__ __forceinline__ void score(float (&scores)[4][4], const Four &q, const Two (&k)[4]) {
  const u32 a[4] = {q.x, q.y, q.z, q.w};
  multiply(scores[0], a, pick(k[0].x, k[1].x, 0x5410), pick(k[2].x, k[3].x, 0x5410));
  multiply(scores[1], a, pick(k[0].x, k[1].x, 0x7632), pick(k[2].x, k[3].x, 0x7632));
  multiply(scores[2], a, pick(k[0].y, k[1].y, 0x5410), pick(k[2].y, k[3].y, 0x5410));
  multiply(scores[3], a, pick(k[0].y, k[1].y, 0x7632), pick(k[2].y, k[3].y, 0x7632));
}

__device__ __forceinline__ void load_four(const float *from, float (&x)[4]) {
  const Four bits = *(const Four *)from;
  x[0] = bits_to_float(bits.x), x[1] = bits_to_float(bits.y), x[2] = bits_to_float(bits.z), x[3] = bits_to_float(bits.w);
}

/// Elements `d` to `d + 3` of a head, which begins at `head`, after the norm, of which `inverse` and `gain` are left, and rotation.
__device__ __forceinline__ void load_rotated(const float *head, const float *angles, float inverse, const float *gain, int d,
                                             float (&x)[4]) {
  constexpr int HALF = C::HEAD_DIM / 2;
  const int other = d < HALF ? d + HALF : d - HALF;
  float y[4], cosines[4], sines[4];
  load_four(head + d, x);
  load_four(head + other, y);
  load_four(angles + d % HALF, cosines);
  load_four(angles + HALF + d % HALF, sines);
  if constexpr (QK_NORM) {
    float gains[4], others[4];
    load_four(gain + d, gains);
    load_four(gain + other, others);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] *= inverse * gains[i], y[i] *= inverse * others[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = d < HALF ? x[i] * cosines[i] - y[i] * sines[i] : x[i] * cosines[i] + y[i] * sines[i];
}

/// Sum of the squares of a head's elements `4 lane` and so on; `lanes` of them share a head.
__device__ __forceinline__ float squares(const float *head, int lane, int lanes) {
  float sum = 0.f;
  for (int d = 4 * lane; d < C::HEAD_DIM; d += 4 * lanes) {
    float x[4];
    load_four(head + d, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(x[i], x[i], sum);
  }
  return sum;
}

__device__ __forceinline__ float inverse_norm(float squares) {
  return __fdiv_rn(1.f, __fsqrt_rn(squares / C::HEAD_DIM + EPS));
}

/// Makes the key, or value, of a token of its sums, which begin at `head`: in shared memory, and at `place` of its page.
template <bool VALUE>
__device__ __forceinline__ void make_fresh(u32 *fresh, u8 *block, int place, const float *head, const float *angles,
                                           const float *gain) {
  const int lane = threadIdx.x % 32;
  const float inverse = QK_NORM && !VALUE ? inverse_norm(warp_sum(squares(head, lane, 32))) : 1.f;
  for (int d = 4 * lane; d < C::HEAD_DIM; d += 128) {
    float x[4];
    if (VALUE) load_four(head + d, x);
    else load_rotated(head, angles, inverse, gain, d, x);
    const Two pairs = {half_pair(x[0], x[1]), half_pair(x[2], x[3])};
    *(Two *)(fresh + d / 2) = pairs;
    u16 *to = (u16 *)block;
    if (VALUE) {
      *(Two *)(to + place * C::HEAD_DIM + d) = pairs;
    } else {
      to[d * C::PAGE_LEN + place] = (u16)pairs.x, to[(d + 1) * C::PAGE_LEN + place] = (u16)(pairs.x >> 16);
      to[(d + 2) * C::PAGE_LEN + place] = (u16)pairs.y, to[(d + 3) * C::PAGE_LEN + place] = (u16)(pairs.y >> 16);
    }
  }
}

/// Puts a key at its place, one of 32, among those that are loaded.
__device__ __forceinline__ void put_key(Two (&k)[KEYS_AT_ONCE][4], const u32 *fresh, int place) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  if (lane / 4 != place / 4) return;
  const u32 first = place % 2 ? 0x5410 : 0x3254, second = place % 2 ? 0x7610 : 0x3276;
#pragma unroll
  for (int s = 0; s < KEYS_AT_ONCE; ++s) {
    const Two pairs = *(const Two *)(fresh + 8 * s + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 pair = i < 2 ? pairs.x : pairs.y, selector = i % 2 ? second : first;
      if (place % 4 < 2) k[s][i].x = pick(k[s][i].x, pair, selector);
      else k[s][i].y = pick(k[s][i].y, pair, selector);
    }
  }
}

extern "C" __global__ void __launch_bounds__(SPAN_WARPS * 32, C::HEAD_DIM <= 128 ? 2 : 1)
KERNEL(const float *QUERY_PARAMETERS, const int *positions, const int *sequences, const u32 *tables, u64 stride, u8 *keys,
       u8 *values, float *partials, u64 span_count RESULT_PARAMETERS) {
  extern __shared__ Four landing[];
  __shared__ Four queries[STEPS][32];
  __shared__ alignas(8) u32 fresh[2][FRESH ? C::HEAD_DIM / 2 : 1];
  __shared__ float mosts[SPAN_WARPS][PASS], totals[SPAN_WARPS][PASS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int spans = (int)span_count, span = blockIdx.x % spans, row = blockIdx.x / spans;
  const int token = row / C::KV_HEADS, kv_head = row % C::KV_HEADS;
  const int at = span * SPAN + warp * 32, place = at % C::PAGE_LEN;
  u8 *own = (u8 *)landing + warp * 32 * VALUE_STRIDE;
  let_next_launch_begin();
  // The page is asked for before it is known whether anything of it is seen.
  const int sequence = load_now(sequences + token), position = load_now(positions + token);
  const u32 page = load_now(tables + (size_t)sequence * stride + min(at / C::PAGE_LEN, (int)stride - 1));
  const int low = max(first_seen(position), span * SPAN), high = min(position + 1, (span + 1) * SPAN);
  if (low >= high) return;
  // Of the warp's own positions those that are seen.
  const int begin = max(low - at, 0), end = min(high - at, 32);
  const u32 mask = warp * 32 < SPAN && begin < end ? ALL_LANES >> (32 - end + begin) << begin : 0;
  const bool busy = mask != 0;
  const size_t block = block_offset(page, kv_head);
  // Keys and values that no token of this step has stored need not wait for the launch that stores those of this step: a
  // sequence's tokens of a step follow each other.
  const int tokens = gridDim.x / (spans * C::KV_HEADS);
  const bool is_old = FRESH || at + 32 <= position + 1 - tokens;
  // The one of the span's positions, if any, whose key and value are made here; and whether it is one of the warp's own.
  const int newest = FRESH && position < (span + 1) * SPAN ? position - span * SPAN : -1;
  const bool has_newest = FRESH && newest >= 0 && newest / 32 == warp;
  const u32 stored = has_newest ? mask & ~(1u << newest % 32) : mask;
  size_t own_block = 0;
  if (FRESH && newest >= 0 && warp >= SPAN_WARPS - 2)
    own_block = block_offset(load_now(tables + (size_t)sequence * stride + position / C::PAGE_LEN), kv_head);
  for (int first = 0; first < GROUP; first += PASS) {
    const int heads = min(GROUP - first, PASS);
    const float *rows = (FRESH ? y : q) + ((size_t)token * HEADS + kv_head * GROUP + first) * C::HEAD_DIM;
    float scores[4][4] = {};
    Two k[KEYS_AT_ONCE][4];
    const u8 *key = keys + block + (4 * t * C::PAGE_LEN + place + 4 * g) * 2;
    const u8 *value = values + block + place * C::HEAD_DIM * 2;
    if (busy && (first > 0 || is_old)) {
      load_values(own, value, stored);
      load_keys(k, key);
    }
    if (first == 0) {
      if (busy && !is_old) fetch_tile(keys + block + place * 2, value);
      wait_for_launches();
    }
    if (busy && first == 0 && !is_old) {
      load_values(own, value, stored);
      load_keys(k, key);
    }
    if (FRESH && first == 0 && newest >= 0) {
      const int page_place = position % C::PAGE_LEN;
      const float *head = y + (HEADS + kv_head) * C::HEAD_DIM;
      if (warp == SPAN_WARPS - 1) make_fresh<false>(fresh[0], keys + own_block, page_place, head, rope, k_gain);
      head += C::KV_HEADS * C::HEAD_DIM;
      if (warp == SPAN_WARPS - 2) make_fresh<true>(fresh[1], values + own_block, page_place, head, rope, nullptr);
    }
    float inverse = 1.f;
    if constexpr (FRESH && QK_NORM) {
      const float sum = quad_sum(squares(rows + min(g, heads - 1) * C::HEAD_DIM, t, 4));
      inverse = inverse_norm(sum);
    }
    for (int s = warp; s < STEPS; s += SPAN_WARPS) {
      float x[4] = {};
      if (g < heads) {
        if constexpr (FRESH) load_rotated(rows + g * C::HEAD_DIM, rope, inverse, q_gain, 16 * s + 4 * t, x);
        else load_four(rows + g * C::HEAD_DIM + 16 * s + 4 * t, x);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= QUERY_SCALE;
      u32 a[4];
      split(x, a);
      queries[s][lane] = {a[0], a[1], a[2], a[3]};
    }
    __syncthreads();
    if (busy) {
#pragma unroll
      for (int from = 0; from < STEPS; from += KEYS_AT_ONCE) {
        if (from > 0) load_keys(k, key + from * 16 * C::PAGE_LEN * 2);
        if (has_newest) put_key(k, fresh[0] + from * 8, newest % 32);
#pragma unroll
        for (int s = 0; s < KEYS_AT_ONCE; ++s) score(scores, queries[from + s][lane], k[s]);
      }
      float weights[8], most = minus_infinity(), total = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float score = scores[i % 4][i / 4] + scores[i % 4][i / 4 + 2];
        weights[i] = mask >> (8 * t) >> i & 1 ? score : minus_infinity();
        most = fmaxf(most, weights[i]);
      }
      most = quad_max(most);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        weights[i] = exp2f(weights[i] - finite(most));
        total += weights[i];
      }
      total = quad_sum(total);
      if (t == 0) mosts[warp][g] = most, totals[warp][g] = total;
      u32 early[4], late[4];
      split(weights, early);
      split(weights + 4, late);
      wait_for_copies<0>();
      __syncwarp();
      if (has_newest) {
        u32 *to = (u32 *)(own + value_line(newest % 32) * VALUE_STRIDE);
        for (int i = lane; i < C::HEAD_DIM / 2; i += 32) to[i] = fresh[1][i];
        __syncwarp();
      }
      const u32 line = shared_address(own) + lane * VALUE_STRIDE;
#pragma unroll
      for (int from = 0; from < TILES; from += TILES_AT_ONCE) {
        float sums[TILES_AT_ONCE][2];
#pragma unroll
        for (int n = 0; n < TILES_AT_ONCE; ++n) {
          if (from + n >= TILES) break;
          u32 v[4];
          load_transposed(v, line + (from + n) * 16);
          float all[4] = {};
          multiply(all, early, v[0], v[1]);
          multiply(all, late, v[2], v[3]);
          sums[n][0] = all[0] + all[2], sums[n][1] = all[1] + all[3];
        }
        __syncwarp();
#pragma unroll
        for (int n = 0; n < TILES_AT_ONCE; ++n)
          if (from + n < TILES && g < heads)
            *(Two *)sum_at(own, g, 8 * (from + n) + 2 * t) = {__float_as_uint(sums[n][0]), __float_as_uint(sums[n][1])};
      }
    } else if (lane < PASS) {
      mosts[warp][lane] = minus_infinity(), totals[warp][lane] = 0.f;
    }
    __syncthreads();
    // A warp joins what all have of 32 elements of a head.
    const Seen seen(position);
    const int first_warp = max(first_seen(position) - span * SPAN, 0) / 32;
    const int last_warp = min(position - span * SPAN, SPAN - 1) / 32;
    for (int unit = warp; unit < heads * CHUNKS; unit += SPAN_WARPS) {
      const int head = unit / CHUNKS, piece = unit % CHUNKS, d = piece * 32 + lane;
      float most = minus_infinity(), total = 0.f, sum = 0.f;
#pragma unroll
      for (int w = 0; w < SPAN_WARPS; ++w) most = fmaxf(most, mosts[w][head]);
#pragma unroll
      for (int w = 0; w < SPAN_WARPS; ++w) {
        const float factor = exp2f(mosts[w][head] - finite(most));
        total = fmaf(totals[w][head], factor, total);
        if (w >= first_warp && w <= last_warp && (C::HEAD_DIM % 32 == 0 || d < C::HEAD_DIM)) 
          sum = fmaf(*sum_at((u8 *)landing + w * 32 * VALUE_STRIDE, head, d), factor, sum);
      }
      float *partial = partials + ((size_t)blockIdx.x * GROUP + first + head) * PARTIAL;
      hand_on(sum, most, total, seen, token, kv_head * GROUP + first + head, piece, partial, out);
    }
    if (first + PASS < GROUP) __syncthreads();
  }
  if constexpr (JOINED) {
    const Seen seen(position);
    if (seen.is_one() || !is_last(counters + row, seen)) return;
    for (int unit = warp; unit < GROUP * CHUNKS; unit += SPAN_WARPS) {
      const int head = unit / CHUNKS, piece = unit % CHUNKS;
      const float *from = partials + ((size_t)row * spans * GROUP + head) * PARTIAL;
      float y[1];
      join_partials(from, GROUP * PARTIAL, seen.first, seen.last, piece * 32, y);
      store_piece(out, token, kv_head * GROUP + head, piece, y[0]);
    }
  }
}
