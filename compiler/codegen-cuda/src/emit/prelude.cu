// What every kernel builds on. No header is included: a few instructions are named here instead.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 ALL_LANES = 0xffffffffu;

struct alignas(8) Two { u32 x, y; };
struct alignas(16) Four { u32 x, y, z, w; };

__device__ __forceinline__ float bits_to_float(u32 bits) { return __uint_as_float(bits); }

/// Two floats to a pair of bf16, `low` in the lower half.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float bf16_to_float(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u16 half_of(float x) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}

__device__ __forceinline__ float half_to_float(u16 h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}

/// Bytes of `a` (0 to 3) and `b` (4 to 7) that the low four nibbles of `selector` name; where a nibble's highest bit is set,
/// the byte's sign instead, eight times.
__device__ __forceinline__ u32 pick(u32 a, u32 b, u32 selector) {
  u32 picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(a), "r"(b), "r"(selector));
  return picked;
}

/// Lets the next launch of the stream begin, which waits in turn with [`wait_for_launches`]: its blocks take what room there is,
/// and do what depends on no launch.
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until every launch before has ended and all it wrote can be read. Every kernel calls it, before it reads or writes
/// anything but weights: a launch has ended only when those before it have. No pointer but those to weights is `__restrict__`: the
/// compiler would take it that nothing changes behind it, and read before the wait.
__device__ __forceinline__ void wait_for_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// What a kernel calls that has nothing to do before.
__device__ __forceinline__ void begin_after_launches() {
  let_next_launch_begin();
  wait_for_launches();
}

/// Loaded here and now: neither later, where it is first used, nor before what stands above.
template <typename Word>
__device__ __forceinline__ Word load_now(const Word *from) {
  Word x;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ Four load_now(const Four *from) {
  Four four;
  asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w) : "l"(from) : "memory");
  return four;
}

/// Asks for `bytes`, a multiple of 16, so that they are in the L2 cache when they are read.
__device__ __forceinline__ void fetch_ahead(const u8 *from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/// Copies 16 bytes to shared memory asynchronously.
__device__ __forceinline__ void copy_async(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/// The first `bytes` of 16, and zeros behind.
__device__ __forceinline__ void copy_async(u32 to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/// Makes a group of the copies that were asked for since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for all groups of copies but the last `PENDING`.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
  return x;
}

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
  return x;
}

/// The largest, NaN not counted.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, apart));
  return x;
}

__device__ __forceinline__ float warp_min(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x = fminf(x, __shfl_xor_sync(ALL_LANES, x, apart));
  return x;
}

/// A sum over all threads of a block; every thread gets it. `parts` has one place per warp, and may be used again only when all
/// threads have met once more.
template <int WARPS, typename T>
__device__ __forceinline__ T block_sum_once(T x, T *parts) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += parts[w];
  return total;
}

/// The same; `parts` may be used again at once.
template <int WARPS, typename T>
__device__ __forceinline__ T block_sum(T x, T *parts) {
  const T total = block_sum_once<WARPS>(x, parts);
  __syncthreads();
  return total;
}

template <int WARPS>
__device__ __forceinline__ float block_max(float x, float *parts) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float most = parts[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) most = fmaxf(most, parts[w]);
  __syncthreads();
  return most;
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

/// Rows of int8 activations: codes, one scale per 32 of them, and the sum of the codes of each 32.
template <int K>
struct Int8Rows {
  static constexpr int GROUPS = K / 32;
  static constexpr int SCALES = (K + 63) / 64 * 64;
  static constexpr int SUMS = SCALES + GROUPS * 4;
  static constexpr int STRIDE = (SUMS + GROUPS * 4 + 60 + 63) / 64 * 64;
};

constexpr float MOST_FLOAT = 3.402823466e38f;

/// 127 / most, rounded to nearest: what numbers whose largest is `most` are multiplied by to be codes. 0 for 0 and infinity.
__device__ __forceinline__ float code_factor(float most) {
  // Moved to where neither reciprocals nor remainders leave the range of floats, there and back by a power of two.
  const float moved_by = most < 1.f ? 18446744073709551616.f : 1.f / 18446744073709551616.f;
  const float near = most * moved_by;
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(near));
  inverse = fmaf(fmaf(-near, inverse, 1.f), inverse, inverse);
  float quotient = 127.f * inverse;
  quotient = fmaf(fmaf(-near, quotient, 127.f), inverse, quotient);
  return most > 0.f && most <= MOST_FLOAT ? quotient * moved_by : 0.f;
}

/// most / 127, rounded to nearest: the scale of those codes.
__device__ __forceinline__ float code_scale(float most) {
  const float near = most * (1.f / 127.f);
  return fmaf(fmaf(-127.f, near, most), 1.f / 127.f, near);
}

/// The nearest whole numbers from -127 to 127, a byte each; -127 for what is no number.
__device__ __forceinline__ u32 codes_of(const float (&x)[4]) {
  u32 bits[4];
  // The sum has a whole number's bits at its end.
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(fminf(fmaxf(x[i], -127.f), 127.f) + 12582912.f);
  return pick(pick(bits[0], bits[1], 0x0040), pick(bits[2], bits[3], 0x0040), 0x5410);
}

/// Quantizes 32 numbers, one to each lane, that are group `group` of a row which starts at `row`.
template <int K>
__device__ __forceinline__ void store_int8_group(u8 *row, int group, float x) {
  typedef Int8Rows<K> Rows;
  int lane = threadIdx.x % 32;
  // A group without any number but NaN has no largest one.
  float most = fmaxf(warp_max(fabsf(x)), 0.f);
  int code = __float2int_rn(fminf(fmaxf(x * code_factor(most), -127.f), 127.f));
  bool broken = __any_sync(ALL_LANES, !(fabsf(x) <= MOST_FLOAT));
  int sum = warp_sum(code);
  row[group * 32 + lane] = (u8)code;
  if (lane == 0) {
    *(float *)(row + Rows::SCALES + group * 4) = broken ? __uint_as_float(0x7fc00000u) : code_scale(most);
    *(int *)(row + Rows::SUMS + group * 4) = sum;
  }
}

/// The same by one thread, which has all 32.
template <int K>
__device__ __forceinline__ void store_int8_group_alone(u8 *row, int group, const float (&x)[32]) {
  typedef Int8Rows<K> Rows;
  float most = 0.f;
  bool broken = false;
#pragma unroll
  for (int i = 0; i < 32; ++i) most = fmaxf(most, fabsf(x[i])), broken |= !(fabsf(x[i]) <= MOST_FLOAT);
  const float factor = code_factor(most);
  int sum = 0;
  u32 words[8];
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const float scaled[4] = {x[i] * factor, x[i + 1] * factor, x[i + 2] * factor, x[i + 3] * factor};
    words[i / 4] = codes_of(scaled);
    sum = __dp4a((int)words[i / 4], 0x01010101, sum);
  }
  *(Four *)(row + group * 32) = {words[0], words[1], words[2], words[3]};
  *(Four *)(row + group * 32 + 16) = {words[4], words[5], words[6], words[7]};
  *(float *)(row + Rows::SCALES + group * 4) = broken ? __uint_as_float(0x7fc00000u) : code_scale(most);
  *(int *)(row + Rows::SUMS + group * 4) = sum;
}
