// Integer and floating-point functions as the compiler expands them, device functions, local memory, tables.
struct Pair { float value; int index; };

__constant__ float weights[8] = {0.5f, 1.5f, 2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f};
__device__ int calls;
__device__ const unsigned char letters[4] = {'P', 'T', 'X', '!'};
__device__ const unsigned char* text = letters;

__device__ __noinline__ Pair best(const float* values, int n) {
  Pair p = {values[0], 0};
  for (int i = 1; i < n; ++i)
    if (values[i] > p.value) { p.value = values[i]; p.index = i; }
  return p;
}

// Local arrays with computed indices, a call that returns a structure, a constant table.
extern "C" __global__ void local_argmax(const float* x, Pair* out, int shift) {
  float mine[8];
  for (int i = 0; i < 8; ++i) mine[(i + shift) % 8] = x[threadIdx.x * 8 + i] * weights[i];
  Pair p = best(mine, 8);
  atomicAdd(&calls, 1);
  p.value += text[threadIdx.x % 4];
  out[threadIdx.x] = p;
}

extern "C" __global__ void float_functions(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  y[i * 16 + 0] = expf(v);
  y[i * 16 + 1] = logf(fabsf(v));
  y[i * 16 + 2] = sinf(v);
  y[i * 16 + 3] = cosf(v);
  y[i * 16 + 4] = tanhf(v);
  y[i * 16 + 5] = powf(fabsf(v), 1.7f);
  y[i * 16 + 6] = erff(v);
  y[i * 16 + 7] = rsqrtf(fabsf(v));
  y[i * 16 + 8] = sqrtf(fabsf(v));
  y[i * 16 + 9] = v / 3.7f;
  y[i * 16 + 10] = __expf(v);
  y[i * 16 + 11] = __fdividef(v, 3.7f);
  y[i * 16 + 12] = roundf(v);
  y[i * 16 + 13] = rintf(v);
  y[i * 16 + 14] = floorf(v) + ceilf(v) + truncf(v);
  y[i * 16 + 15] = fmaxf(fminf(v, 2.f), -2.f) + copysignf(1.f, v) + __saturatef(v);
}

extern "C" __global__ void integer_functions(const int* x, const int* y, long long* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int a = x[i], b = y[i];
  unsigned u = a, v = b;
  long long w = ((long long)a << 20) + b;
  long long* o = out + i * 32;
  o[0] = a / b; o[1] = a % b; o[2] = u / v; o[3] = u % v;
  o[4] = w / b; o[5] = w % b; o[6] = (unsigned long long)w / v; o[7] = (unsigned long long)w % v;
  o[8] = __mulhi(a, b); o[9] = __umulhi(u, v); o[10] = __umul64hi(w, w * 3); o[11] = __mul64hi(w, w * 3);
  o[12] = __popc(u); o[13] = __clz(a); o[14] = __ffs(a); o[15] = __brev(u);
  o[16] = __byte_perm(u, v, 0x5140); o[17] = __funnelshift_l(u, v, b); o[18] = __funnelshift_r(u, v, 7);
  o[19] = __dp4a(a, b, 5); o[20] = __dp4a(u, v, 5u); o[21] = __sad(a, b, 3u); o[22] = abs(a) + min(a, b) + max(a, b);
  o[23] = (signed char)a; o[24] = (unsigned short)b; o[25] = w >> 3; o[26] = a >> (b & 31); o[27] = u << (v & 31);
  o[28] = (long long)(float)a; o[29] = (int)((float)b * 0.37f); o[30] = __float2int_ru((float)b * 0.37f);
  o[31] = __double2ll_rn((double)w * 0.25);
}

// Lanes part three ways and come back, one of them through a loop of its own length.
extern "C" __global__ void divergence(const int* x, int* y) {
  int t = threadIdx.x, v = x[t], steps = 0;
  switch (v % 3) {
    case 0: while (v > 0) { v -= 3; ++steps; } break;
    case 1: steps = __popc(v); break;
    default: if (v > 50) steps = -1; else steps = v * v;
  }
  __syncwarp();
  y[t] = steps + __shfl_xor_sync(~0u, steps, 1) + (__ballot_sync(~0u, steps > 3) & 1);
}
