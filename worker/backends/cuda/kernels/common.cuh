// Shared by every kernel file, put before its text. No header of the toolkit is needed, so the run-time
// compiler is enough. bf16 is held as its 16 bits.
typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// N neighbouring elements, moved by one access where they are 16 bytes.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <typename T, int N> __device__ __forceinline__ void load(const T* from, float (&x)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(pack.at[i]);
}

template <typename T, int N> __device__ __forceinline__ void store(T* to, const float (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = from_float<T>(x[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// An element of a float8 cache. One of its pages holds the scales of its tokens, a byte each in the order head, key
// or value, token; then their lines, of `width` elements. A scale is 2^(byte - 127).
struct e4m3 { unsigned char bits; };

struct Pages {
  int kv_heads, width, block_tokens;

  __device__ __forceinline__ int scales() const { return 2 * kv_heads * block_tokens; }
  // First byte of a line, and of the scale of a head's key (0) or value (1) in it.
  __device__ __forceinline__ i64 line(i64 block, int token) const {
    return block * (block_tokens * width + scales()) + scales() + static_cast<i64>(token) * width;
  }
  __device__ __forceinline__ i64 scale(i64 block, int token, int head, int part) const {
    return block * (block_tokens * width + scales()) + (head * 2 + part) * block_tokens + token;
  }
};

__device__ __forceinline__ float scale_of(u32 byte) { return __uint_as_float(byte << 23); }

// Programmatic dependent launch: nothing another kernel writes may be touched before `wait_for_previous`.
// Every kernel waits, so that "the previous one is complete" holds for all before it too.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Sum over the block, the same on all threads; up to 32 warps.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float parts[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = (blockDim.x + 31) / 32;
  return warp_sum(threadIdx.x % 32 < warps ? parts[threadIdx.x % 32] : 0.0f);
}
