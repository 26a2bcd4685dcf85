// The row of activations of a product: an RMS norm of a row of f32, quantized.

__device__ __forceinline__ void take_row(Codes8 &to, const float *x, const float *gains, float *parts) {
  Row gain, row;
  if constexpr (GAIN) gain.begin(gains);
  wait_for_launches();
  row.begin(x);
  const float inverse = inverse_rms(row, parts);
  auto normalized = [&](int time) {
    Near near = row.get(time), factor = {};
    if constexpr (GAIN) factor = gain.get(time);
#pragma unroll
    for (int i = 0; i < NEAR; ++i) near.v[i] = GAIN ? near.v[i] * inverse * factor.v[i] : near.v[i] * inverse;
    return near;
  };
  quantize_row(normalized, [&](int time, u32 codes, float scale, int sum) {
    // Two lanes have eight neighbours, which change places.
    const u32 other = __shfl_xor_sync(ALL_LANES, codes, 1);
    const bool is_second = threadIdx.x % 2 == 1;
    const Two eight = ordered(is_second ? Two{other, codes} : Two{codes, other});
    if (const int at = place(time); is_in_row(at)) {
      *(u32 *)(to.codes + at) = is_second ? eight.y : eight.x;
      if (at % 32 == 0) to.groups[at / 32] = {scale, sum};
    }
  });
}
