// What happens to the sums of a matrix product before they are stored. `EPILOGUE` and the rest are generated.

enum { STORE, RESIDUAL, SWIGLU_F32, SWIGLU_INT8 };

/// `silu` of operands that were rounded anyway.
__device__ __forceinline__ float quick_silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

/// Finishes a tile of `rows` rows from row `first_row` on, channels `first` to `first + CHANNELS`, that stands in shared memory
/// with `STRIDE` numbers from row to row. All threads of the block call it. Rows of tiles of many rows begin at multiples of
/// four numbers, which then go by fours.
template <int CHANNELS, int STRIDE, int THREADS>
__device__ __forceinline__ void finish_tile(const float *tile, int rows, int first_row, int first, const float *bias,
                                            const float *residual, void *out) {
  constexpr bool MANY = STRIDE % 4 == 0;
  if constexpr ((EPILOGUE == STORE || EPILOGUE == RESIDUAL) && MANY && W::N % 4 == 0) {
    constexpr int FOURS = CHANNELS / 4;
    for (int i = threadIdx.x; i < rows * FOURS; i += THREADS) {
      int m = i / FOURS, c = i % FOURS * 4, n = first + c;
      if (n < W::N) {
        size_t at = (size_t)(first_row + m) * W::N + n;
        float4 y = *(const float4 *)(tile + m * STRIDE + c);
        auto add = [&](const float *from) {
          float4 more = *(const float4 *)from;
          y.x += more.x, y.y += more.y, y.z += more.z, y.w += more.w;
        };
        if (bias) add(bias + n);
        if constexpr (EPILOGUE == RESIDUAL) add(residual + at);
        *(float4 *)((float *)out + at) = y;
      }
    }
  } else if constexpr (EPILOGUE == STORE || EPILOGUE == RESIDUAL) {
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
    auto product_of = [&](float g, float u, int gate) {
      if (bias) g += bias[first + gate], u += bias[first + gate + 16];
      if constexpr (MANY && W::BITS < 32) return quick_silu(g) * u;
      else return silu(g) * u;
    };
    // Blocks alternate: 16 gate channels, then the 16 up channels that belong to them.
    auto product = [&](int m, int f) {
      int gate = f / 16 * 32 + f % 16;
      return product_of(tile[m * STRIDE + gate], tile[m * STRIDE + gate + 16], gate);
    };
    if constexpr (EPILOGUE == SWIGLU_F32) {
      for (int i = threadIdx.x; i < rows * (CHANNELS / 2); i += THREADS) {
        int m = i / (CHANNELS / 2), f = i % (CHANNELS / 2);
        if (first / 2 + f < WIDTH) ((float *)out)[(size_t)(first_row + m) * WIDTH + first / 2 + f] = product(m, f);
      }
    } else {
      static_assert(CHANNELS % 64 == 0, "a group of 32 products takes 64 channels");
      constexpr int GROUPS = CHANNELS / 64;
      auto row = [&](int m) { return (u8 *)out + (size_t)(first_row + m) * Int8Rows<WIDTH>::STRIDE; };
      if constexpr (MANY) {
        // A group by one thread.
        for (int i = threadIdx.x; i < rows * GROUPS; i += THREADS) {
          int m = i % rows, group = i / rows;
          if (first + group * 64 >= W::N) continue;
          float products[32];
#pragma unroll
          for (int f = 0; f < 32; f += 4) {
            int gate = group * 64 + f / 16 * 32 + f % 16;
            float4 g = *(const float4 *)(tile + m * STRIDE + gate), u = *(const float4 *)(tile + m * STRIDE + gate + 16);
            products[f] = product_of(g.x, u.x, gate), products[f + 1] = product_of(g.y, u.y, gate + 1);
            products[f + 2] = product_of(g.z, u.z, gate + 2), products[f + 3] = product_of(g.w, u.w, gate + 3);
          }
          store_int8_group_alone<WIDTH>(row(m), first / 64 + group, products);
        }
      } else {
        for (int i = threadIdx.x / 32; i < rows * GROUPS; i += THREADS / 32) {
          int m = i / GROUPS, group = i % GROUPS;
          if (first + group * 64 < W::N)
            store_int8_group<WIDTH>(row(m), first / 64 + group, product(m, group * 32 + threadIdx.x % 32));
        }
      }
    }
  }
}
