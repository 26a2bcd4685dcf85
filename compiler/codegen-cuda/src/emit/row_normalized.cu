// The row of activations of a product: an RMS norm of a row of f32, quantized.

__device__ __forceinline__ void take_row(u8 *to, const float *x, const float *gains, float *parts) {
  Row gain, row;
  if constexpr (GAIN) gain.begin(gains);
  wait_for_launches();
  row.begin(x);
  const float inverse = inverse_rms(row, parts);
#pragma unroll
  for (int time = 0; time < TIMES; ++time) {
    Near near = row.get(time), factor = {};
    if constexpr (GAIN) factor = gain.get(time);
#pragma unroll
    for (int i = 0; i < NEAR; ++i) near.v[i] = GAIN ? near.v[i] * inverse * factor.v[i] : near.v[i] * inverse;
    store_int8_four(to, place(time), near);
  }
}
