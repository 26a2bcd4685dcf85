// The row of activations of a product, in shared memory.

constexpr int FOURS = (W::GROUPS + 3) / 4;

/// What all inputs of a group are multiplied by, and the sum of their codes.
struct alignas(8) Scaled { float scale; int codes_sum; };

/// The row: codes in the order of the weights, filled up to whole fours of groups with zeros, and zeros instead of codes.
struct Codes8 {
  alignas(16) u8 codes[FOURS * 128];
  u8 zeros[32];
  Scaled groups[FOURS * 4];
};

/// What stands in a row whatever its numbers are.
__device__ __forceinline__ void fill_up(Codes8 &row) {
  if (threadIdx.x < 8) ((u32 *)row.zeros)[threadIdx.x] = 0;
  if constexpr (!WHOLE) {
    for (int i = W::K / 4 + threadIdx.x; i < FOURS * 32; i += WARPS * 32) ((u32 *)row.codes)[i] = 0;
    for (int i = W::GROUPS + threadIdx.x; i < FOURS * 4; i += WARPS * 32) row.groups[i] = {0.f, 0};
  }
}

