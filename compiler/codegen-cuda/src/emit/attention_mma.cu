// Attention of a prompt by tensor cores. Rows are the query heads of one KV head, token by token; a block has BLOCK_ROWS of them,
// a warp 16 * ROW_TILES, and walks POSITIONS positions of the cache at a time. Constants beside those of attention.cu: ROW_TILES,
// POSITIONS, SHARED_BYTES, MIN_BLOCKS.
//
// Operands are f16: queries, scaled before; weights; keys and values of the cache. Scores and sums are f32. Scores of a step stay in
// registers and are the left operand of the second product. Two stages: while one is multiplied, the next is fetched; where it goes
// was read a step before, which every warp has done before the barrier. A value that is no number is multiplied by weights of zero
// as well: rows of its sequence that do not see it, but others of the same step, are no numbers either.

constexpr int WARP_ROWS = 16 * ROW_TILES, BLOCK_ROWS = WARPS * WARP_ROWS;
constexpr int QUERY_STRIDE = C::HEAD_DIM + 8;
static_assert(C::HEAD_DIM % 16 == 0 && POSITIONS % 16 == 0 && C::PAGE_LEN % POSITIONS == 0, "whole tiles");

/// By how much scores may exceed the maximum that weights are taken relative to: weights are 256 at most, and sums are seldom scaled.
constexpr float SLACK = 8.f;
/// The smallest normal number.
constexpr float LEAST = 1.17549435e-38f;

__device__ __forceinline__ float inverse_of_power(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

struct Shared {
  Tiles tiles;
  alignas(16) u16 queries[BLOCK_ROWS][QUERY_STRIDE];
  /// Scales of queries that are codes.
  float query_scales[BLOCK_ROWS];
  /// The position behind the last that a row sees.
  int ends[BLOCK_ROWS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "as much as the launch gives");

/// Rotates heads of which each of `LANES` lanes has `CHUNKS` times four neighbouring elements.
template <int LANES, int CHUNKS>
__device__ __forceinline__ void rotate_queries(float (&x)[CHUNKS][4]) {
  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[c][i] *= C::HADAMARD_FACTOR;
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(i & apart)) {
          float a = x[c][i], b = x[c][i + apart];
          x[c][i] = a + b, x[c][i + apart] = a - b;
        }
#pragma unroll
    for (int apart = 1; apart < LANES && apart * 4 < C::HADAMARD; apart *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float other = __shfl_xor_sync(ALL_LANES, x[c][i], apart);
        x[c][i] = lane & apart ? other - x[c][i] : x[c][i] + other;
      }
  }
  if constexpr (C::HADAMARD > 4 * LANES) {
    static_assert(C::HADAMARD <= 8 * LANES && CHUNKS == 2, "two chunks");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float a = x[0][i], b = x[1][i];
      x[0][i] = a + b, x[1][i] = a - b;
    }
  }
}

/// Rotates a head of which each of four lanes has elements `8 n + 2 (lane % 4)` and the next.
__device__ __forceinline__ void rotate_result(float (&x)[C::HEAD_DIM / 4]) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int i = 0; i < C::HEAD_DIM / 4; i += 2) {
    float a = x[i] * C::HADAMARD_FACTOR, b = x[i + 1] * C::HADAMARD_FACTOR;
    x[i] = a + b, x[i + 1] = a - b;
  }
#pragma unroll
  for (int apart = 1; apart < 4; apart *= 2)
#pragma unroll
    for (int i = 0; i < C::HEAD_DIM / 4; ++i) {
      float other = __shfl_xor_sync(ALL_LANES, x[i], apart);
      x[i] = lane & apart ? other - x[i] : x[i] + other;
    }
#pragma unroll
  for (int apart = 2; apart * 4 < C::HADAMARD; apart *= 2)
#pragma unroll
    for (int i = 0; i < C::HEAD_DIM / 4; ++i)
      if (!(i & apart)) {
        float a = x[i], b = x[i + apart];
        x[i] = a + b, x[i + apart] = a - b;
      }
}

/// Loads the rows of a warp to shared memory; `from` gives a row's head. Next to a cache of codes they become codes.
template <class From>
__device__ __forceinline__ void load_queries(u16 (*queries)[QUERY_STRIDE], float *scales, From from) {
  constexpr int LANES = C::HEAD_DIM > 64 ? 32 : C::HEAD_DIM > 32 ? 16 : C::HEAD_DIM > 16 ? 8 : 4;
  constexpr int CHUNKS = (C::HEAD_DIM + 4 * LANES - 1) / (4 * LANES);
  const int lane = threadIdx.x % 32;
  // Enough at a time that their loads are under way together.
#pragma unroll HAS_CODES ? 2 : 8
  for (int r = lane / LANES; r < WARP_ROWS; r += 32 / LANES) {
    const float *head = from(r);
    float x[CHUNKS][4];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      int d = (lane % LANES + LANES * c) * 4;
      Four four = {0, 0, 0, 0};
      if (C::HEAD_DIM % (4 * LANES) == 0 || d < C::HEAD_DIM) four = *(const Four *)(head + d);
      x[c][0] = bits_to_float(four.x) * QUERY_SCALE, x[c][1] = bits_to_float(four.y) * QUERY_SCALE;
      x[c][2] = bits_to_float(four.z) * QUERY_SCALE, x[c][3] = bits_to_float(four.w) * QUERY_SCALE;
    }
    if constexpr (HAS_CODES) {
      if constexpr (C::KIND == KV_INT4) rotate_queries<LANES>(x);
      float most = 0.f, broken = 0.f;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          most = fmaxf(most, fabsf(x[c][i]));
          if (!(fabsf(x[c][i]) <= 3.402823466e38f)) broken = 1.f;
        }
#pragma unroll
      for (int apart = 1; apart < LANES; apart *= 2) {
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, apart));
        broken = fmaxf(broken, __shfl_xor_sync(ALL_LANES, broken, apart));
      }
      // A row of zeros has any scale but zero, with which scores of minus infinity would be multiplied.
      const bool any = most >= 1e-35f;
      const float inverse = any ? quotient(127.f, most) : 0.f;
      if (lane % LANES == 0) scales[r] = broken > 0.f ? __uint_as_float(0x7fc00000u) : any ? most * (1.f / 127.f) : 1.f;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[c][i] = (float)int8_code(x[c][i], inverse);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      int d = (lane % LANES + LANES * c) * 4;
      Two two = {half_pair(x[c][0], x[c][1]), half_pair(x[c][2], x[c][3])};
      if (C::HEAD_DIM % (4 * LANES) == 0 || d < C::HEAD_DIM) *(Two *)&queries[r][d] = two;
    }
  }
  __syncwarp();
}

/// Quantizes 32 numbers of a row of which each of four lanes has eight: `x[i]` is number `8 (i / 2) + 2 (lane % 4) + i % 2`.
template <int K>
__device__ __forceinline__ void store_int8_quads(u8 *row, int group, const float *x, bool there) {
  typedef Int8Rows<K> Rows;
  const int quarter = threadIdx.x % 4;
  float most = 0.f;
  bool broken = false;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i])), broken |= !(fabsf(x[i]) <= 3.402823466e38f);
  most = quad_max(most);
  const float inverse = most >= LEAST ? 127.f * reciprocal(most) : 0.f;
  int sum = 0;
  u32 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int code[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float scaled = x[2 * i + e] * inverse;
      float low = scaled > -127.f ? scaled : -127.f;
      code[e] = __float2int_rn(low < 127.f ? low : 127.f);
      sum += code[e];
    }
    pairs[i] = pick(code[0], code[1], 0x0040);
  }
  sum = quad_sum(sum);
  broken = quad_sum((int)broken) > 0;
  // Pairs change lanes, so that each has eight bytes in a row: first between neighbours, then between halves.
  const bool odd = quarter & 1, upper = quarter & 2;
  u32 mine = odd ? pick(pairs[1], pairs[3], 0x5410) : pick(pairs[0], pairs[2], 0x5410);
  u32 given = odd ? pick(pairs[0], pairs[2], 0x5410) : pick(pairs[1], pairs[3], 0x5410);
  u32 got = __shfl_xor_sync(ALL_LANES, given, 1);
  u32 lower = odd ? pick(got, mine, 0x5410) : pick(mine, got, 0x5410);
  u32 higher = odd ? pick(got, mine, 0x7632) : pick(mine, got, 0x7632);
  got = __shfl_xor_sync(ALL_LANES, upper ? lower : higher, 2);
  Two eight = {upper ? got : lower, upper ? higher : got};
  if (!there) return;
  *(Two *)(row + group * 32 + quarter * 8) = eight;
  if (quarter == 0) {
    *(float *)(row + Rows::SCALES + group * 4) = broken ? __uint_as_float(0x7fc00000u) : most * (1.f / 127.f);
    *(int *)(row + Rows::SUMS + group * 4) = sum;
  }
}

/// Neighbouring tokens of one sequence, of those that a block has.
struct Run { int sequence, end, low, high; };

/// The run that starts with `token`; it sees positions `low` to `high`.
__device__ __forceinline__ Run run_from(const Paging &paging, int token, int last) {
  const int lane = threadIdx.x % 32;
  Run run = {paging.sequences[token], token, 0x7fffffff, 0};
  for (bool ended = false; !ended;) {
    int at = run.end + lane;
    u32 others = __ballot_sync(ALL_LANES, at > last || paging.sequences[min(at, last)] != run.sequence);
    int more = others ? __ffs(others) - 1 : 32;
    if (lane < more) {
      int position = paging.positions[at];
      run.low = min(run.low, first_seen(position)), run.high = max(run.high, position + 1);
    }
    run.end += more, ended = more < 32;
  }
  // Results of a reduction are known to be the same in all lanes, and take none of the registers that every lane has of its own.
  run.low = WINDOW > 0 ? __reduce_min_sync(ALL_LANES, run.low) : 0, run.high = __reduce_max_sync(ALL_LANES, run.high);
  run.end = __reduce_max_sync(ALL_LANES, run.end);
  return run;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
KERNEL(const float *q, const int *positions, const int *sequences,
       const u32 *tables, u64 stride, const u8 *keys, const u8 *values, void *out,
       u64 token_count) {
  begin_after_launches();
  extern __shared__ Shared given[];
  Shared &shared = given[0];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv_head = blockIdx.x;
  const int rows = (int)token_count * GROUP;
  // Later tokens see most and come first. The runs of a tile go to its parts in turns.
  const int row_tiles = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, parts = (int)gridDim.y / row_tiles;
  const int part = (int)blockIdx.y / row_tiles, tile = row_tiles - 1 - (int)blockIdx.y % row_tiles;
  const int block_row = tile * BLOCK_ROWS, first = block_row + warp * WARP_ROWS;
  const int last_token = (min(block_row + BLOCK_ROWS, rows) - 1) / GROUP;
  if (part >= parts) return;
  const Paging paging = {positions, sequences, tables, stride};
  u16(*queries)[QUERY_STRIDE] = shared.queries + warp * WARP_ROWS;
  float *query_scales = shared.query_scales + warp * WARP_ROWS;
  int *ends = shared.ends + warp * WARP_ROWS;

  // A lane has parts of rows `lane / 4` and 8 more of each 16; of products it has columns `8 j + 2 (lane % 4)` and the next.
  float sums[ROW_TILES][C::HEAD_DIM / 8][4], most[ROW_TILES][2], total[ROW_TILES][2];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) most[m][h] = minus_infinity(), total[m][h] = 0.f;
#pragma unroll
    for (int n = 0; n < C::HEAD_DIM / 8; ++n) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.f;
  }
  // Weights are multiplied by scales of values, which f16 has no room for but relative to the largest: a power of two not below it.
  float unit = LEAST;
  const u32 query_rows = shared_address(&queries[lane % 16][lane / 16 * 8]);
  int now = 0;
  bool has_queries = false;
  for (int token = block_row / GROUP, turn = 0; token <= last_token; ++turn) {
    const Run run = run_from(paging, token, last_token);
    if (turn % parts != part) {
      token = run.end;
      continue;
    }
    int start = run.low / POSITIONS * POSITIONS;
    shared.tiles.fetch(now, keys, values, block_offset(paging.page(run.sequence, start), kv_head), start, run.low, run.high);
    u32 next_page = start + POSITIONS < run.high ? paging.page(run.sequence, start + POSITIONS) : 0;
    // Queries are loaded while the first positions are under way.
    if (!has_queries)
      load_queries(queries, query_scales, [&](int r) {
        // Rows past the last repeat it; their results are not stored.
        int row = min(first + r, rows - 1);
        return q + ((size_t)(row / GROUP) * HEADS + kv_head * GROUP + row % GROUP) * C::HEAD_DIM;
      });
    has_queries = true;
    // Behind what rows see; and what all rows of the warp see, and what any of them does. A lane looks after one row.
    int low = 0x7fffffff, high = 0, all_from = 0, all_to = 0x7fffffff;
    __syncwarp();
    if (lane < WARP_ROWS) {
      int own = min(first + lane, rows - 1) / GROUP, position = -1;
      if (first < rows && own >= token && own < run.end) position = positions[own], low = first_seen(position), high = position + 1;
      ends[lane] = position + 1, all_from = first_seen(position), all_to = position + 1;
    }
    __syncwarp();
    low = WINDOW > 0 ? __reduce_min_sync(ALL_LANES, low) : 0, high = __reduce_max_sync(ALL_LANES, high);
    all_from = WINDOW > 0 ? __reduce_max_sync(ALL_LANES, all_from) : 0, all_to = __reduce_min_sync(ALL_LANES, all_to);
    token = run.end;

    for (; start < run.high; start += POSITIONS, now = 1 - now) {
      wait_for_copies<0>();
      __syncthreads();
      const int next = start + POSITIONS;
      if (next < run.high) {
        shared.tiles.fetch(1 - now, keys, values, block_offset(next_page, kv_head), next, run.low, run.high);
        if (next + POSITIONS < run.high) next_page = paging.page(run.sequence, next + POSITIONS);
      }
      shared.tiles.unpack(now, start, run.low, run.high);
      if (start >= high || next <= low) continue;
      const Operands operands(shared.tiles, now);

      float scores[ROW_TILES][POSITIONS / 8][4] = {};
#pragma unroll
      for (int k = 0; k < C::HEAD_DIM / 16; ++k) {
        u32 a[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) load_matrices(a[m], query_rows + (m * 16 * QUERY_STRIDE + k * 16) * 2);
#pragma unroll
        for (int j = 0; j < POSITIONS / 8; j += 2) {
          u32 b[4];
          operands.load_keys(b, k * 16, j * 8);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) multiply(scores[m][j], a[m], b[0], b[1]), multiply(scores[m][j + 1], a[m], b[2], b[3]);
        }
      }

      if constexpr (HAS_CODES) {
#pragma unroll
        for (int j = 0; j < POSITIONS / 8; ++j) {
          const float x = operands.key_scale(j * 8), y = operands.key_scale(j * 8 + 1);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m)
            scores[m][j][0] *= x, scores[m][j][1] *= y, scores[m][j][2] *= x, scores[m][j][3] *= y;
        }
      }
      if (next > all_to || start < all_from) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int end = ends[m * 16 + h * 8 + lane / 4] - start - lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < POSITIONS / 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                bool seen = j * 8 + e < end && (WINDOW == 0 || j * 8 + e + WINDOW >= end);
                scores[m][j][2 * h + e] = seen ? scores[m][j][2 * h + e] : minus_infinity();
              }
          }
      }
      float top[ROW_TILES][2];
      bool grown = false;
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x = fmaxf(scores[m][0][2 * h], scores[m][0][2 * h + 1]);
#pragma unroll
          for (int j = 1; j < POSITIONS / 8; ++j) x = fmaxf(x, fmaxf(scores[m][j][2 * h], scores[m][j][2 * h + 1]));
          top[m][h] = quad_max(x);
          if constexpr (HAS_CODES) top[m][h] *= query_scales[m * 16 + h * 8 + lane / 4];
          grown |= top[m][h] > most[m][h] + SLACK;
        }
      if (__any_sync(ALL_LANES, grown)) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float later = fmaxf(most[m][h], top[m][h]), before = power_of_two(most[m][h] - finite(later));
            most[m][h] = later, total[m][h] *= before;
#pragma unroll
            for (int n = 0; n < C::HEAD_DIM / 8; ++n) sums[m][n][2 * h] *= before, sums[m][n][2 * h + 1] *= before;
          }
      }
      float inverse_unit = 1.f;
      if constexpr (HAS_CODES) {
        if (shared.tiles.largest_scale() > unit) {
          const float before = unit;
          unit = __uint_as_float(__float_as_uint(shared.tiles.largest_scale()) + 0x7fffff & 0xff800000);
          const float factor = before * inverse_of_power(unit);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int n = 0; n < C::HEAD_DIM / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[m][n][i] *= factor;
        }
        inverse_unit = inverse_of_power(unit);
      }
      u32 weights[ROW_TILES][POSITIONS / 8][2];
#pragma unroll
      for (int j = 0; j < POSITIONS / 8; ++j) {
        float value_scales[2];
        if constexpr (HAS_CODES)
          value_scales[0] = operands.value_scale(j * 8) * inverse_unit, value_scales[1] = operands.value_scale(j * 8 + 1) * inverse_unit;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float weight[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float score = scores[m][j][2 * h + e], base = finite(most[m][h]);
              weight[e] = power_of_two(HAS_CODES ? fmaf(score, query_scales[m * 16 + h * 8 + lane / 4], -base) : score - base);
            }
            total[m][h] += weight[0] + weight[1];
            if constexpr (HAS_CODES) weight[0] *= value_scales[0], weight[1] *= value_scales[1];
            weights[m][j][h] = half_pair(weight[0], weight[1]);
          }
      }
#pragma unroll
      for (int k = 0; k < POSITIONS / 16; ++k)
#pragma unroll
        for (int n = 0; n < C::HEAD_DIM / 8; n += 2) {
          u32 b[4];
          operands.load_values(b, n * 8, k * 16);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) {
            const u32 a[4] = {weights[m][2 * k][0], weights[m][2 * k][1], weights[m][2 * k + 1][0], weights[m][2 * k + 1][1]};
            multiply(sums[m][n], a, b[0], b[1]), multiply(sums[m][n + 1], a, b[2], b[3]);
          }
        }
    }
  }
  if (!has_queries) return;

#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + m * 16 + h * 8 + lane / 4, head = kv_head * GROUP + row % GROUP;
      const float all = quad_sum(total[m][h]), factor = reciprocal(all) * (HAS_CODES ? unit : 1.f);
      // A row of another part has seen nothing.
      const bool there = row < rows && all != 0.f;
      float y[C::HEAD_DIM / 4];
#pragma unroll
      for (int i = 0; i < C::HEAD_DIM / 4; ++i) y[i] = sums[m][i / 2][2 * h + i % 2] * factor;
      if constexpr (C::KIND == KV_INT4) rotate_result(y);
      constexpr int WIDTH = HEADS * C::HEAD_DIM;
      if constexpr (INT8) {
        u8 *to_row = (u8 *)out + (size_t)(row / GROUP) * Int8Rows<WIDTH>::STRIDE;
#pragma unroll
        for (int g = 0; g < C::HEAD_DIM / 32; ++g)
          store_int8_quads<WIDTH>(to_row, head * (C::HEAD_DIM / 32) + g, y + g * 8, there);
      } else if (there) {
        float *to_row = (float *)out + (size_t)(row / GROUP) * WIDTH + head * C::HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < C::HEAD_DIM / 8; ++n) {
          Two two = {__float_as_uint(y[2 * n]), __float_as_uint(y[2 * n + 1])};
          *(Two *)(to_row + n * 8) = two;
        }
      }
    }
}
