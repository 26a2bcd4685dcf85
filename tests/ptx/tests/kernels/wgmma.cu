// Products of a warpgroup: operands brought by bulk copies that mbarriers count, or written by threads and swizzled.
typedef unsigned short bf16;
typedef unsigned long long u64;
__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u64 descriptor(const void* p, unsigned leading, unsigned stride, u64 swizzle) {
  unsigned a = shared_address(p);
  return (u64)((a & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | swizzle << 62;
}
__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
  asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void product(float (&d)[32], u64 a, u64 b) {
  asm volatile(
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
    "%32, %33, 1, 1, 1, 0, 0;"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
    : "l"(a), "l"(b));
}
__device__ __forceinline__ void store(float (&d)[32], float* c) {
  int lane = threadIdx.x % 32, w = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 32; ++i) c[(w * 16 + lane / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// Operands lie in global memory as core matrices, k steps of 16 one behind the other; two stages of copies.
extern "C" __global__ void __launch_bounds__(128)
wgmma_bulk(const bf16* __restrict__ a, const bf16* __restrict__ b, float* __restrict__ c, int steps) {
  __shared__ __align__(128) bf16 tile_a[2][64 * 16];
  __shared__ __align__(128) bf16 tile_b[2][64 * 16];
  __shared__ __align__(8) u64 full[2];
  int t = threadIdx.x;
  if (t == 0)
    for (int s = 0; s < 2; ++s) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[s])) : "memory");
  __syncthreads();
  auto load = [&](int step) {
    int s = step % 2;
    unsigned barrier = shared_address(&full[s]);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(4096u) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(tile_a[s])), "l"(a + step * 1024), "r"(2048u), "r"(barrier) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(tile_b[s])), "l"(b + step * 1024), "r"(2048u), "r"(barrier) : "memory");
  };
  if (t == 0) load(0);
  float d[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0.f;
  for (int step = 0; step < steps; ++step) {
    if (t == 0 && step + 1 < steps) load(step + 1);
    int s = step % 2;
    wait(shared_address(&full[s]), step / 2 % 2);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    product(d, descriptor(tile_a[s], 128, 256, 0), descriptor(tile_b[s], 128, 256, 0));
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    // The next copy but one goes where this product has read.
    __syncthreads();
  }
  store(d, c);
}

// a[64,64] and b[64,64] row-major, swizzled by threads as they are written.
extern "C" __global__ void __launch_bounds__(128)
wgmma_swizzled(const bf16* __restrict__ a, const bf16* __restrict__ b, float* __restrict__ c) {
  __shared__ __align__(1024) bf16 tile_a[64 * 64];
  __shared__ __align__(1024) bf16 tile_b[64 * 64];
  int t = threadIdx.x;
  for (int i = t; i < 64 * 8; i += 128) {
    int row = i / 8, piece = i % 8, at = row * 64 + (piece ^ row % 8) * 8;
    *(uint4*)(tile_a + at) = *(const uint4*)(a + i * 8);
    *(uint4*)(tile_b + at) = *(const uint4*)(b + i * 8);
  }
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  float d[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0.f;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < 64; k += 16) product(d, descriptor(tile_a + k, 16, 1024, 1), descriptor(tile_b + k, 16, 1024, 1));
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  store(d, c);
}

// Blocks of 4096 bytes pass through shared memory and out again by bulk copies.
extern "C" __global__ void bulk_through(const char* __restrict__ in, char* __restrict__ out) {
  __shared__ __align__(128) char buffer[4096];
  __shared__ __align__(8) u64 full;
  unsigned barrier = shared_address(&full);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 4096;" ::"r"(barrier) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 4096, [%2];"
                 ::"r"(shared_address(buffer)), "l"(in + blockIdx.x * 4096), "r"(barrier) : "memory");
  }
  __syncthreads();
  wait(barrier, 0);
  for (int i = threadIdx.x; i < 4096; i += blockDim.x) buffer[i] += 1;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 4096;" ::"l"(out + blockIdx.x * 4096), "r"(shared_address(buffer)) : "memory");
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
  }
}
