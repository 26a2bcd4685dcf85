// The row of activations of a product: an RMS norm of a row of f32, quantized.

__device__ __forceinline__ void take_row(Codes8 &to, const float *x, const float *gains, float *parts) {
  Row gain, row;
  if constexpr (GAIN) gain.begin<true>(gains);
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
  static_assert(NEAR == 8, "what is put in the order of the weights");
  quantize_row(normalized, [&](int time, const u32 *codes, float scale, int sum) {
    if (const int at = place(time); is_in_row(at)) {
      *(Two *)(to.codes + at) = ordered({codes[0], codes[1]});
      if (at % 32 == 0) to.groups[at / 32] = {scale, sum};
    }
  });
}
