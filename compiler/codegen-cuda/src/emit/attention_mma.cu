// Attention of a prompt by tensor cores. Rows are the query heads of one KV head, token by token; a block has BLOCK_ROWS of them,
// a warp 16 * ROW_TILES, and walks POSITIONS positions of the cache at a time. Constants beside those of attention.cu: ROW_TILES,
// POSITIONS, SHARED_BYTES.
//
// Queries are scaled in f32 and rounded to f16, so are weights; scores and sums are f32. Scores of a step stay in registers and are
// the left operand of the second product. Two stages: while one is multiplied, the next is fetched; where it goes was read a step
// before, which every warp has done before the barrier.

constexpr int THREADS = WARPS * 32, WARP_ROWS = 16 * ROW_TILES, BLOCK_ROWS = WARPS * WARP_ROWS;
// Eight numbers more than there are: rows of eight matrices of 16 bytes then lie in different banks.
constexpr int KEY_STRIDE = POSITIONS + 8, VALUE_STRIDE = C::HEAD_DIM + 8;
constexpr int KEY_STEPS = C::HEAD_DIM / 16;
static_assert(C::KIND == KV_F16 && C::HEAD_DIM % 16 == 0 && POSITIONS % 16 == 0 && C::PAGE_LEN % POSITIONS == 0, "whole tiles");

/// By how much scores may exceed the maximum that weights are taken relative to: weights are 256 at most, and sums are seldom scaled.
constexpr float SLACK = 8.f;

struct Stage { u16 keys[C::HEAD_DIM][KEY_STRIDE]; u16 values[POSITIONS][VALUE_STRIDE]; };
struct Shared { Stage stages[2]; u16 queries[BLOCK_ROWS][VALUE_STRIDE]; };
static_assert(sizeof(Shared) == SHARED_BYTES, "as much as the launch gives");

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/// 16 bytes, or zeros instead.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_async(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

/// Four matrices, of whose rows a lane gives the address of one.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two floats to a pair of f16, `low` in the lower half.
__device__ __forceinline__ u32 half_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

/// 2^x, 0 where that is no normal number.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x, but for its last bit; x is no smaller than the smallest normal number.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Over the four lanes that have parts of the same rows.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

template <class T>
__device__ __forceinline__ T quad_sum(T x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

/// Quantizes 32 numbers of a row of which each of four lanes has eight: `x[i]` is number `8 (i / 2) + 2 (lane % 4) + i % 2`.
template <int K>
__device__ __forceinline__ void store_int8_quads(u8 *row, int group, const float (&x)[8], bool there) {
  typedef Int8Rows<K> Rows;
  const int quarter = threadIdx.x % 4;
  float most = 0.f;
  bool broken = false;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i])), broken |= !(fabsf(x[i]) <= 3.402823466e38f);
  most = quad_max(most);
  const float inverse = most >= 1.2e-38f ? 127.f * reciprocal(most) : 0.f;
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
  run.low = __reduce_min_sync(ALL_LANES, run.low), run.high = __reduce_max_sync(ALL_LANES, run.high);
  run.end = __reduce_max_sync(ALL_LANES, run.end);
  return run;
}

/// Copies keys and values of the positions from `start` on, which stand in one page.
__device__ __forceinline__ void fetch(Stage &stage, const u8 *keys, const u8 *values, size_t block, int start, int low, int high) {
  const u16 *from_keys = (const u16 *)(keys + block) + start % C::PAGE_LEN;
  const u16 *from_values = (const u16 *)(values + block) + start % C::PAGE_LEN * C::HEAD_DIM;
  constexpr int PIECES = C::HEAD_DIM * POSITIONS / 8;
#pragma unroll
  for (int i = 0; i < PIECES; i += THREADS) {
    constexpr int ROW = POSITIONS / 8;
    static_assert(THREADS % ROW == 0, "whole rows");
    int d = threadIdx.x / ROW + i / ROW, p = threadIdx.x % ROW * 8;
    if (PIECES % THREADS == 0 || i + threadIdx.x < PIECES) copy_async(&stage.keys[d][p], from_keys + d * C::PAGE_LEN + p);
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

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
KERNEL(const float *__restrict__ q, const int *__restrict__ positions, const int *__restrict__ sequences,
       const u32 *__restrict__ tables, u64 stride, const u8 *__restrict__ keys, const u8 *__restrict__ values, void *out,
       u64 token_count) {
  extern __shared__ Four given[];
  Shared &shared = *(Shared *)given;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv_head = blockIdx.x;
  const int rows = (int)token_count * GROUP;
  // Later tokens see most and come first.
  const int block_row = ((int)gridDim.y - 1 - (int)blockIdx.y) * BLOCK_ROWS, first = block_row + warp * WARP_ROWS;
  const int last_token = (min(block_row + BLOCK_ROWS, rows) - 1) / GROUP;
  const Paging paging = {positions, sequences, tables, stride};
  auto query_of = [&](int row) { return (size_t)(row / GROUP) * HEADS + kv_head * GROUP + row % GROUP; };

  // Rows past the last repeat it; their results are not stored.
  u16(*queries)[VALUE_STRIDE] = shared.queries + warp * WARP_ROWS;
#pragma unroll 4
  for (int i = lane; i < WARP_ROWS * C::HEAD_DIM / 4; i += 32) {
    int r = i / (C::HEAD_DIM / 4), d = i % (C::HEAD_DIM / 4) * 4;
    Four four = *(const Four *)(q + query_of(min(first + r, rows - 1)) * C::HEAD_DIM + d);
    Two two = {half_pair(bits_to_float(four.x) * QUERY_SCALE, bits_to_float(four.y) * QUERY_SCALE),
               half_pair(bits_to_float(four.z) * QUERY_SCALE, bits_to_float(four.w) * QUERY_SCALE)};
    *(Two *)&queries[r][d] = two;
  }
  __syncwarp();

  // A lane has parts of rows `lane / 4` and 8 more of each 16; of products it has columns `8 j + 2 (lane % 4)` and the next.
  float sums[ROW_TILES][C::HEAD_DIM / 8][4], most[ROW_TILES][2], total[ROW_TILES][2];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) most[m][h] = minus_infinity(), total[m][h] = 0.f;
#pragma unroll
    for (int n = 0; n < C::HEAD_DIM / 8; ++n) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.f;
  }
  // A lane's place within 16 rows of two matrices of 16 bytes.
  const u32 wide_place = (lane % 16 * VALUE_STRIDE + lane / 16 * 8) * 2, key_place = (lane % 16 * KEY_STRIDE + lane / 16 * 8) * 2;
  const u32 query_rows = shared_address(queries) + wide_place;
  int now = 0;
  for (int token = block_row / GROUP; token <= last_token;) {
    const Run run = run_from(paging, token, last_token);
    // What all rows of the warp see, and what any of them does.
    int to[ROW_TILES][2], low = 0x7fffffff, high = 0, all_from = 0, all_to = 0x7fffffff;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int own = min(first + m * 16 + h * 8 + lane / 4, rows - 1) / GROUP;
        bool mine = first < rows && own >= token && own < run.end;
        int position = mine ? positions[own] : -1;
        to[m][h] = position + 1;
        if (mine) low = min(low, first_seen(position)), high = max(high, position + 1);
        all_from = max(all_from, first_seen(position)), all_to = min(all_to, position + 1);
      }
    low = __reduce_min_sync(ALL_LANES, low), high = __reduce_max_sync(ALL_LANES, high);
    all_from = __reduce_max_sync(ALL_LANES, all_from), all_to = __reduce_min_sync(ALL_LANES, all_to);
    token = run.end;

    int start = run.low / POSITIONS * POSITIONS;
    fetch(shared.stages[now], keys, values, block_offset(paging.page(run.sequence, start), kv_head), start, run.low, run.high);
    u32 next_page = start + POSITIONS < run.high ? paging.page(run.sequence, start + POSITIONS) : 0;
    for (; start < run.high; start += POSITIONS, now = 1 - now) {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      __syncthreads();
      const int next = start + POSITIONS;
      if (next < run.high) {
        fetch(shared.stages[1 - now], keys, values, block_offset(next_page, kv_head), next, run.low, run.high);
        if (next + POSITIONS < run.high) next_page = paging.page(run.sequence, next + POSITIONS);
      }
      if (start >= high || next <= low) continue;
      const u32 key_rows = shared_address(shared.stages[now].keys) + key_place;
      const u32 value_rows = shared_address(shared.stages[now].values) + wide_place;

      float scores[ROW_TILES][POSITIONS / 8][4] = {};
#pragma unroll
      for (int k = 0; k < KEY_STEPS; ++k) {
        u32 a[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) load_matrices(a[m], query_rows + (m * 16 * VALUE_STRIDE + k * 16) * 2);
#pragma unroll
        for (int j = 0; j < POSITIONS / 8; j += 2) {
          u32 b[4];
          load_transposed(b, key_rows + (k * 16 * KEY_STRIDE + j * 8) * 2);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) multiply(scores[m][j], a[m], b[0], b[1]), multiply(scores[m][j + 1], a[m], b[2], b[3]);
        }
      }

      if (next > all_to || start < all_from) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int end = to[m][h] - start - lane % 4 * 2;
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
      u32 weights[ROW_TILES][POSITIONS / 8][2];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float base = finite(most[m][h]);
#pragma unroll
          for (int j = 0; j < POSITIONS / 8; ++j) {
            float x = power_of_two(scores[m][j][2 * h] - base), y = power_of_two(scores[m][j][2 * h + 1] - base);
            total[m][h] += x + y;
            weights[m][j][h] = half_pair(x, y);
          }
        }
#pragma unroll
      for (int k = 0; k < POSITIONS / 16; ++k)
#pragma unroll
        for (int n = 0; n < C::HEAD_DIM / 8; n += 2) {
          u32 b[4];
          load_transposed(b, value_rows + (k * 16 * VALUE_STRIDE + n * 8) * 2);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) {
            const u32 a[4] = {weights[m][2 * k][0], weights[m][2 * k][1], weights[m][2 * k + 1][0], weights[m][2 * k + 1][1]};
            multiply(sums[m][n], a, b[0], b[1]), multiply(sums[m][n + 1], a, b[2], b[3]);
          }
        }
    }
  }

#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + m * 16 + h * 8 + lane / 4, head = kv_head * GROUP + row % GROUP;
      const float inverse = reciprocal(quad_sum(total[m][h]));
      constexpr int WIDTH = HEADS * C::HEAD_DIM;
      if constexpr (INT8) {
        u8 *to_row = (u8 *)out + (size_t)(row / GROUP) * Int8Rows<WIDTH>::STRIDE;
#pragma unroll
        for (int g = 0; g < C::HEAD_DIM / 32; ++g) {
          float y[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) y[i] = sums[m][4 * g + i / 2][2 * h + i % 2] * inverse;
          store_int8_quads<WIDTH>(to_row, head * (C::HEAD_DIM / 32) + g, y, row < rows);
        }
      } else if (row < rows) {
        float *to_row = (float *)out + (size_t)(row / GROUP) * WIDTH + head * C::HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < C::HEAD_DIM / 8; ++n) {
          Two two = {__float_as_uint(sums[m][n][2 * h] * inverse), __float_as_uint(sums[m][n][2 * h + 1] * inverse)};
          *(Two *)(to_row + n * 8) = two;
        }
      }
    }
}
