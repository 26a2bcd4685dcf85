// Sets counters to zero.

extern "C" __global__ void __launch_bounds__(256) KERNEL(u32 *counters, u64 count) {
  begin_after_launches();
  for (u64 i = threadIdx.x; i < count; i += 256) counters[i] = 0;
}
