// out[r, 0..k] = the k largest of logits[r, 0..vocab], largest first and the lowest token first among equals, each as its token and
// its logit; what is not a number counts as minus infinity. One block per row; k is at most vocab and 64.
//
// A logit and its token are one number, its rank, so that no two are equal. Every thread finds the largest of its share; no logit
// of the k largest is below the k-th of these. What is above is put together, seldom much more than k, and sorted.

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr u32 ROOM = 2 * THREADS;

/// Grows with the logit, and falls with the token; above 0.
__device__ __forceinline__ u64 rank_of(float logit, u32 token) {
  u32 bits = logit == logit ? __float_as_uint(logit) : 0xff800000u;
  u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (u64)order << 32 | (u32)~token;
}

__device__ __forceinline__ float logit_of(u64 rank) {
  u32 order = (u32)(rank >> 32);
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

/// Calls `f` for every rank of this thread's share of a row.
template <typename F>
__device__ __forceinline__ void each_rank(const float *row, u32 vocab, F f) {
  const u32 fours = vocab % 4 == 0 ? vocab / 4 : 0;
#pragma unroll 4
  for (u32 i = threadIdx.x; i < fours; i += THREADS) {
    Four four = ((const Four *)row)[i];
    f(rank_of(bits_to_float(four.x), 4 * i));
    f(rank_of(bits_to_float(four.y), 4 * i + 1));
    f(rank_of(bits_to_float(four.z), 4 * i + 2));
    f(rank_of(bits_to_float(four.w), 4 * i + 3));
  }
#pragma unroll 4
  for (u32 i = 4 * fours + threadIdx.x; i < vocab; i += THREADS) f(rank_of(row[i], i));
}

/// Sorts the first `count` ranks, a power of two, largest first (Batcher's bitonic network). All threads call it.
__device__ __forceinline__ void sort(u64 *ranks, u32 count) {
  for (u32 run = 2; run <= count; run *= 2)
    for (u32 apart = run / 2; apart > 0; apart /= 2) {
      for (u32 i = threadIdx.x; i < count / 2; i += THREADS) {
        u32 low = 2 * i - i % apart, high = low + apart;
        u64 a = ranks[low], b = ranks[high];
        if ((a < b) == ((low & run) == 0)) ranks[low] = b, ranks[high] = a;
      }
      __syncthreads();
    }
}

/// How many of a row are at least `least`; every thread gets it. `parts` has one place per warp.
__device__ __forceinline__ u32 count_from(u64 least, const float *row, u32 vocab, int *parts) {
  int mine = 0;
  each_rank(row, vocab, [&](u64 rank) { mine += rank >= least; });
  return block_sum<WARPS>(mine, parts);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const float *logits, Two *out, u64 vocab, u64 k) {
  begin_after_launches();
  __shared__ u64 ranks[ROOM];
  __shared__ int parts[WARPS];
  __shared__ u32 taken;
  const float *row = logits + blockIdx.x * vocab;
  u64 best = 0;
  each_rank(row, (u32)vocab, [&](u64 rank) { best = rank > best ? rank : best; });
  ranks[threadIdx.x] = best;
  if (threadIdx.x == 0) taken = 0;
  __syncthreads();
  sort(ranks, THREADS);
  u64 least = ranks[k - 1], above = ranks[0];
  __syncthreads();
  u32 count = count_from(least, row, (u32)vocab, parts);
  // Few threads have most of the largest. Somewhere above there are enough and not too many, for no two ranks are equal.
  while (count > ROOM) {
    u64 middle = least + (above - least) / 2;
    u32 from = count_from(middle, row, (u32)vocab, parts);
    if (from < k) above = middle;
    else least = middle, count = from;
  }
  each_rank(row, (u32)vocab, [&](u64 rank) {
    if (rank >= least) ranks[atomicAdd(&taken, 1)] = rank;
  });
  u32 room = 1;
  while (room < count) room *= 2;
  for (u32 i = count + threadIdx.x; i < room; i += THREADS) ranks[i] = 0;
  __syncthreads();
  sort(ranks, room);
  if (threadIdx.x < k) {
    u64 rank = ranks[threadIdx.x];
    out[blockIdx.x * k + threadIdx.x] = Two{(u32)~rank, __float_as_uint(logit_of(rank))};
  }
}
