// What becomes of a span's part in the attention of a token, 32 elements of a head at a time. JOINED: the block that is the last to
// finish of a token and KV head joins its partials; a part that is all a token sees is its result at once.

/// Spans that a token sees.
struct Seen {
  int first, last;

  __device__ __forceinline__ explicit Seen(int position)
      : first(first_seen(position) / SPAN), last(position / SPAN + 1) {}
  __device__ __forceinline__ bool is_one() const { return last - first == 1; }
};

/// Stores element `32 piece + lane` of a head's result.
__device__ __forceinline__ void store_piece(void *out, int token, int head, int piece, float y) {
  constexpr int WIDTH = HEADS * C::HEAD_DIM;
  const int d = piece * 32 + threadIdx.x % 32;
  if constexpr (INT8) {
    static_assert(!INT8 || C::HEAD_DIM % 32 == 0, "groups of 32 within heads");
    store_int8_group<WIDTH>((u8 *)out + (size_t)token * Int8Rows<WIDTH>::STRIDE, head * CHUNKS + piece, y);
  } else if (C::HEAD_DIM % 32 == 0 || d < C::HEAD_DIM) {
    ((float *)out)[(size_t)token * WIDTH + head * C::HEAD_DIM + d] = y;
  }
}

/// Hands on element `32 piece + lane` of a head.
__device__ __forceinline__ void hand_on(float sum, float most, float total, const Seen &seen, int token, int head, int piece,
                                        float *partial, void *out) {
  const int d = piece * 32 + threadIdx.x % 32;
  if (JOINED && seen.is_one()) {
    store_piece(out, token, head, piece, __fdiv_rn(sum, total));
    return;
  }
  if (C::HEAD_DIM % 32 == 0 || d < C::HEAD_DIM) partial[d] = sum;
  if (d == 0) partial[C::HEAD_DIM] = most, partial[C::HEAD_DIM + 1] = total;
}

/// Whether a block is the last one of those that see the same queries; it may then read what the others have handed on. The
/// counter is zero before the first and after the last.
__device__ __forceinline__ bool is_last(u32 *counter, const Seen &seen) {
  __shared__ u32 before;
  const u32 most = seen.last - seen.first - 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    before = atomicInc(counter, most);
    __threadfence();
  }
  __syncthreads();
  return before == most;
}
