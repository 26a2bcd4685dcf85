// The part that one span of the context has in a token's attention, over an f16 cache, with tensor cores: a block per token, KV
// head and span. A warp has 32 positions. Their keys travel to registers and their values to shared memory, all at once; what
// the warps have gathered is joined in shared memory.
//
// Products have 16 rows, and the query heads of a KV head are at most 8 at a time. The other rows have what is left of queries
// and weights when they are rounded to f16, so that nothing but a sum in f32 is rounded. In the products of a warp, position
// `8 t + i` belongs to the lanes `4 g + t`.

constexpr int SPAN_WARPS = 8, PASS = 8;
constexpr int STEPS = C::HEAD_DIM / 16, TILES = C::HEAD_DIM / 8;
/// Bytes between values in shared memory: an odd number of 16, so that eight of them lie in different banks.
constexpr int VALUE_STRIDE = (TILES | 1) * 16;
/// Floats between the sums of heads, which take the place of values.
constexpr int SUMS_STRIDE = C::HEAD_DIM + 8;
static_assert(C::HEAD_DIM % 16 == 0 && SPAN <= SPAN_WARPS * 32 && SPAN % 32 == 0, "a warp has 32 positions");
static_assert(PASS * SUMS_STRIDE * 4 <= 32 * VALUE_STRIDE, "sums fit where values were");

__device__ __forceinline__ u32 half_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

/// Two numbers as the sum of two pairs of f16.
__device__ __forceinline__ void split(float low, float high, u32 &pair, u32 &rest) {
  pair = half_pair(low, high);
  rest = half_pair(low - half_to_float((u16)pair), high - half_to_float((u16)(pair >> 16)));
}

__device__ __forceinline__ void multiply(float (&sums)[4], const Four &a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

extern "C" __global__ void __launch_bounds__(SPAN_WARPS * 32, C::HEAD_DIM <= 128 ? 2 : 1)
KERNEL(const float *__restrict__ q, const int *__restrict__ positions, const int *__restrict__ sequences,
       const u32 *__restrict__ tables, u64 stride, const u8 *__restrict__ keys, const u8 *__restrict__ values,
       float *__restrict__ partials, u64 span_count) {
  begin_after_launches();
  extern __shared__ Four landing[];
  __shared__ Four queries[STEPS][32];
  __shared__ float mosts[SPAN_WARPS][PASS], totals[SPAN_WARPS][PASS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int spans = (int)span_count, span = blockIdx.x % spans, row = blockIdx.x / spans;
  const int token = row / C::KV_HEADS, kv_head = row % C::KV_HEADS;
  const int at = span * SPAN + warp * 32;
  const int position = positions[token], sequence = sequences[token];
  // Read before it is known whether anything of it is seen.
  const u32 page = tables[(size_t)sequence * stride + min(at / C::PAGE_LEN, (int)stride - 1)];
  const int low = max(first_seen(position), span * SPAN), high = min(position + 1, (span + 1) * SPAN);
  if (low >= high) return;
  const bool busy = warp * 32 < SPAN && at < high && at + 32 > low;
  const size_t block = block_offset(page, kv_head);
  const int place = at % C::PAGE_LEN;
  u8 *own = (u8 *)landing + warp * 32 * VALUE_STRIDE;
  for (int first = 0; first < GROUP; first += PASS) {
    const int heads = min(GROUP - first, PASS);
    Two k[STEPS][4];
    if (busy) {
      const u8 *from = keys + block + (4 * t * C::PAGE_LEN + place + 4 * g) * 2;
#pragma unroll
      for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) k[s][i] = *(const Two *)(from + (16 * s + i) * C::PAGE_LEN * 2);
      from = values + block + place * C::HEAD_DIM * 2;
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        // Values are put in the order in which products take them. What is not seen may be anything and counts as 0.
        const int piece = i * 32 + lane, value = piece / TILES;
        const bool seen = at + value >= low && at + value < high;
        const int line = value % 8 / 2 * 8 + value / 8 * 2 + value % 2;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(own) + line * VALUE_STRIDE +
                                                                          piece % TILES * 16),
                     "l"(from + piece * 16), "r"(seen ? 16 : 0)
                     : "memory");
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int s = warp; s < STEPS; s += SPAN_WARPS) {
      Four x = {0, 0, 0, 0};
      if (g < heads)
        x = *(const Four *)(q + ((size_t)token * HEADS + kv_head * GROUP + first + g) * C::HEAD_DIM + 16 * s + 4 * t);
      Four a;
      split(bits_to_float(x.x) * QUERY_SCALE, bits_to_float(x.y) * QUERY_SCALE, a.x, a.y);
      split(bits_to_float(x.z) * QUERY_SCALE, bits_to_float(x.w) * QUERY_SCALE, a.z, a.w);
      queries[s][lane] = a;
    }
    __syncthreads();
    if (busy) {
      float scores[4][4] = {};
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        const Four a = queries[s][lane];
        const Two(&x)[4] = k[s];
        multiply(scores[0], a, pick(x[0].x, x[1].x, 0x5410), pick(x[2].x, x[3].x, 0x5410));
        multiply(scores[1], a, pick(x[0].x, x[1].x, 0x7632), pick(x[2].x, x[3].x, 0x7632));
        multiply(scores[2], a, pick(x[0].y, x[1].y, 0x5410), pick(x[2].y, x[3].y, 0x5410));
        multiply(scores[3], a, pick(x[0].y, x[1].y, 0x7632), pick(x[2].y, x[3].y, 0x7632));
      }
      float weights[8], most = minus_infinity(), total = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int where = at + 8 * t + i;
        const float score = scores[i % 4][i / 4] + scores[i % 4][i / 4 + 2];
        weights[i] = where >= low && where < high ? score : minus_infinity();
        most = fmaxf(most, weights[i]);
      }
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        weights[i] = exp2f(weights[i] - finite(most));
        total += weights[i];
      }
      total += __shfl_xor_sync(ALL_LANES, total, 1);
      total += __shfl_xor_sync(ALL_LANES, total, 2);
      if (t == 0) mosts[warp][g] = most, totals[warp][g] = total;
      Four early, late;
      split(weights[0], weights[1], early.x, early.y);
      split(weights[2], weights[3], early.z, early.w);
      split(weights[4], weights[5], late.x, late.y);
      split(weights[6], weights[7], late.z, late.w);
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      __syncwarp();
      float sums[TILES][2];
      const u32 line = shared_address(own) + lane * VALUE_STRIDE;
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        u32 v[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(line + n * 16)
                     : "memory");
        float all[4] = {};
        multiply(all, early, v[0], v[1]);
        multiply(all, late, v[2], v[3]);
        sums[n][0] = all[0] + all[2], sums[n][1] = all[1] + all[3];
      }
      __syncwarp();
      if (g < heads) {
        float *to = (float *)own + g * SUMS_STRIDE + 2 * t;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
          *(Two *)(to + 8 * n) = {__float_as_uint(sums[n][0]), __float_as_uint(sums[n][1])};
      }
    } else if (lane < PASS) {
      mosts[warp][lane] = minus_infinity(), totals[warp][lane] = 0.f;
    }
    __syncthreads();
    // A warp joins 32 elements of a head at a time.
    const int begin = (low - span * SPAN) / 32, end = (high - span * SPAN + 31) / 32;
    for (int unit = warp; unit < heads * CHUNKS; unit += SPAN_WARPS) {
      const int head = unit / CHUNKS, d = unit % CHUNKS * 32 + lane;
      float most = minus_infinity(), total = 0.f, sum = 0.f;
#pragma unroll
      for (int w = 0; w < SPAN_WARPS; ++w) most = fmaxf(most, mosts[w][head]);
#pragma unroll
      for (int w = 0; w < SPAN_WARPS; ++w) {
        const float factor = exp2f(mosts[w][head] - finite(most));
        total = fmaf(totals[w][head], factor, total);
        if (w >= begin && w < end && (C::HEAD_DIM % 32 == 0 || d < C::HEAD_DIM))
          sum = fmaf(((const float *)((const u8 *)landing + w * 32 * VALUE_STRIDE))[head * SUMS_STRIDE + d], factor, sum);
      }
      float *to = partials + ((size_t)blockIdx.x * GROUP + first + head) * PARTIAL;
      if (C::HEAD_DIM % 32 == 0 || d < C::HEAD_DIM) to[d] = sum;
      if (d == 0) to[C::HEAD_DIM] = most, to[C::HEAD_DIM + 1] = total;
    }
    if (first + PASS < GROUP) __syncthreads();
  }
}
