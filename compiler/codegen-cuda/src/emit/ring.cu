// Weights on their way to the products of a warp: fours of groups of its block of channels, each copied to shared memory
// asynchronously, `STAGES` of them at a time.

constexpr bool WHOLE = W::GROUPS % 4 == 0;
/// Bytes of a four of groups: their codes, then their scales. Codes of neighbouring groups stand so far apart that a row of each
/// of the four lies in other banks.
constexpr int GROUP_CODES = W::GROUP_ROWS * 64, GROUP_FIELDS = W::BF16_SCALES ? 32 : 16;
constexpr int GROUP_STRIDE = GROUP_CODES + 32, FIELDS_AT = 4 * GROUP_STRIDE;
constexpr int PIECE = FIELDS_AT + 4 * GROUP_FIELDS;

/// 16 bytes, or zeros instead.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

struct Ring {
  u8 pieces[STAGES][PIECE];

  /// Asks for the four that begins with group `first`, if there is one.
  __device__ __forceinline__ void ask(int stage, const u8 *block, int first) {
    if (first < W::GROUPS) {
      const int lane = threadIdx.x % 32, there = WHOLE ? 4 : min(4, W::GROUPS - first);
      const u8 *codes = block + W::CODES + first * GROUP_CODES, *fields = block + W::FIELDS + first * GROUP_FIELDS;
      u8 *to = pieces[stage];
#pragma unroll
      for (int i = 0; i < (4 * GROUP_CODES + 511) / 512; ++i) {
        const int at = (i * 32 + lane) * 16;
        const bool has = WHOLE || at < there * GROUP_CODES;
        if (4 * GROUP_CODES % 512 == 0 || at < 4 * GROUP_CODES) copy_async(to + at / GROUP_CODES * GROUP_STRIDE + at % GROUP_CODES, has ? codes + at : codes, has);
      }
      if (const int at = lane * 16; at < 4 * GROUP_FIELDS) {
        const bool has = WHOLE || at < there * GROUP_FIELDS;
        copy_async(to + FIELDS_AT + at, has ? fields + at : fields, has);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  /// Waits for the four that was asked for first.
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
  }
};
