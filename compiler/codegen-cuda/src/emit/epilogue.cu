// What happens to the sums of a matrix product before they are stored. `EPILOGUE` and the rest are generated.

enum { STORE, RESIDUAL, SWIGLU_F32, SWIGLU_INT8 };

/// Finishes a tile of `rows` rows from row `first_row` on, channels `first` to `first + CHANNELS`, that stands in shared memory
/// with `STRIDE` numbers from row to row. All threads of the block call it.
template <int CHANNELS, int STRIDE, int THREADS>
__device__ __forceinline__ void finish_tile(const float *tile, int rows, int first_row, int first, const float *bias,
                                            const float *residual, void *out) {
  if constexpr (EPILOGUE == STORE || EPILOGUE == RESIDUAL) {
    for (int i = threadIdx.x; i < rows * CHANNELS; i += THREADS) {
      int m = i / CHANNELS, c = i % CHANNELS, n = first + c;
      if (n < W::N) {
        size_t at = (size_t)(first_row + m) * W::N + n;
        float y = tile[m * STRIDE + c] + (bias ? bias[n] : 0.f);
        if constexpr (EPILOGUE == RESIDUAL) y = residual[at] + y;
        ((float *)out)[at] = y;
      }
    }
  } else {
    // Blocks alternate: 16 gate channels, then the 16 up channels that belong to them.
    auto product = [&](int m, int f) {
      int gate = f / 16 * 32 + f % 16;
      float g = tile[m * STRIDE + gate], u = tile[m * STRIDE + gate + 16];
      if (bias) g += bias[first + gate], u += bias[first + gate + 16];
      return silu(g) * u;
    };
    if constexpr (EPILOGUE == SWIGLU_F32) {
      for (int i = threadIdx.x; i < rows * (CHANNELS / 2); i += THREADS) {
        int m = i / (CHANNELS / 2), f = i % (CHANNELS / 2);
        if (first / 2 + f < WIDTH) ((float *)out)[(size_t)(first_row + m) * WIDTH + first / 2 + f] = product(m, f);
      }
    } else {
      static_assert(CHANNELS % 64 == 0, "a group of 32 products takes 64 channels");
      constexpr int GROUPS = CHANNELS / 64;
      for (int i = threadIdx.x / 32; i < rows * GROUPS; i += THREADS / 32) {
        int m = i / GROUPS, g = i % GROUPS;
        if (first + g * 64 < W::N) {
          u8 *row = (u8 *)out + (size_t)(first_row + m) * Int8Rows<WIDTH>::STRIDE;
          store_int8_group<WIDTH>(row, first / 64 + g, product(m, g * 32 + threadIdx.x % 32));
        }
      }
    }
  }
}
