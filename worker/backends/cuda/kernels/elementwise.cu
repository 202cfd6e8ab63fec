// Norm, rope with the KV write, SwiGLU, embedding: one read and one write of what they touch.

// out = norm(residual [+ update]) * weight; residual is updated in place, and the norm is that of its rounded
// value. One block a row; a thread holds CHUNKS packs of N elements in registers. Rows lie `pitch` elements apart,
// those of `out` (which may be the rows themselves) `out_pitch`.
template <typename T, int N, int CHUNKS, bool ADD>
__device__ __forceinline__ void norm(T* residual, const T* update, const T* weight, T* out, int width, int pitch,
                                     int out_pitch, float eps) {
  let_next_start();
  const i64 row = static_cast<i64>(blockIdx.x) * pitch;
  out += static_cast<i64>(blockIdx.x) * out_pitch;
  float x[CHUNKS][N];
  float w[N];
  // Weights are nobody's output: with few registers to hold them they are read before the wait.
  if (CHUNKS == 1 && threadIdx.x * N < width) load<T, N>(weight + threadIdx.x * N, w);
  wait_for_previous();
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int i = (c * blockDim.x + threadIdx.x) * N;
    if (i < width) {
      load<T, N>(residual + row + i, x[c]);
      if (ADD) {
        float u[N];
        load<T, N>(update + row + i, u);
#pragma unroll
        for (int k = 0; k < N; ++k) x[c][k] = to_float(from_float<T>(x[c][k] + u[k]));
        store<T, N>(residual + row + i, x[c]);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) squares += x[c][k] * x[c][k];
    }
  }
  const float scale = rsqrtf(block_sum(squares) / width + eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int i = (c * blockDim.x + threadIdx.x) * N;
    if (i < width) {
      if (CHUNKS > 1) load<T, N>(weight + i, w);
#pragma unroll
      for (int k = 0; k < N; ++k) x[c][k] = x[c][k] * scale * w[k];
      store<T, N>(out + i, x[c]);
    }
  }
}

#define NORM(NAME, T, N, CHUNKS)                                                                          \
  extern "C" __global__ void __launch_bounds__(1024) add_norm_##NAME##_##N##_##CHUNKS(                    \
      T* residual, const T* update, const T* weight, T* out, int width, float eps) {                      \
    norm<T, N, CHUNKS, true>(residual, update, weight, out, width, width, width, eps);                    \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(1024) norm_##NAME##_##N##_##CHUNKS(                        \
      T* x, const T* weight, T* out, int width, int pitch, int out_pitch, float eps) {                    \
    norm<T, N, CHUNKS, false>(x, nullptr, weight, out, width, pitch, out_pitch, eps);                     \
  }
NORM(bf16, bf16, 8, 1)
NORM(bf16, bf16, 8, 2)
NORM(bf16, bf16, 8, 4)
NORM(bf16, bf16, 1, 16)
NORM(f32, float, 4, 1)
NORM(f32, float, 4, 2)
NORM(f32, float, 4, 4)
NORM(f32, float, 1, 16)

// residual += update, in place.
template <typename T, int N> __device__ void add(T* residual, const T* update, i64 count) {
  let_next_start();
  wait_for_previous();
  const i64 i = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (i >= count) return;
  float x[N], u[N];
  load<T, N>(residual + i, x);
  load<T, N>(update + i, u);
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] += u[k];
  store<T, N>(residual + i, x);
}

// q of [q | k | v] goes, rotated, to `queries`; k, rotated, and v go to the token's cache line. A line below 0
// is nobody's and is not written. The two halves of a head rotate against each other.
// rotation: [tokens, 3, key_dim / 2]: cos, -sin, sin. Tokens on the grid's x, pieces of a token on its y.
template <typename T, int N>
__device__ void rope_store(const T* qkv, const T* rotation, const i64* lines, T* queries, T* cache, int heads,
                           int kv_heads, int key_dim, int value_dim) {
  let_next_start();
  wait_for_previous();
  const i64 token = blockIdx.x;
  const int half = key_dim / 2;
  const int rotated = (heads + kv_heads) * (half / N);
  const int values = kv_heads * value_dim;
  const int item = blockIdx.y * blockDim.x + threadIdx.x;
  if (item >= rotated + values / N) return;
  const i64 line = lines[token];
  const T* row = qkv + token * ((heads + kv_heads) * key_dim + values);
  T* stored = cache + line * (kv_heads * key_dim + values);
  if (item >= rotated) {
    if (line < 0) return;
    const int i = (item - rotated) * N;
    float x[N];
    load<T, N>(row + (heads + kv_heads) * key_dim + i, x);
    store<T, N>(stored + kv_heads * key_dim + i, x);
    return;
  }
  const int head = item / (half / N), i = item % (half / N) * N;
  if (head >= heads && line < 0) return;
  float low[N], high[N], cosine[N], sine[N];
  load<T, N>(row + head * key_dim + i, low);
  load<T, N>(row + head * key_dim + half + i, high);
  load<T, N>(rotation + token * 3 * half + i, cosine);
  load<T, N>(rotation + token * 3 * half + 2 * half + i, sine);
  float out_low[N], out_high[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    out_low[k] = low[k] * cosine[k] - high[k] * sine[k];
    out_high[k] = high[k] * cosine[k] + low[k] * sine[k];
  }
  T* to = head < heads ? queries + (token * heads + head) * key_dim : stored + (head - heads) * key_dim;
  store<T, N>(to + i, out_low);
  store<T, N>(to + half + i, out_high);
}

// The same, the cache in e4m3: a warp for a head of a token, up to 256 dims, multiples of 4. The scale is the least
// power of two with which the largest magnitude is at most 448, e4m3's largest.
__device__ __forceinline__ void store_codes(e4m3* to, float low, float high) {
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  *reinterpret_cast<unsigned short*>(to) = pair;
}

template <typename T>
__device__ void rope_store_e4m3(const T* qkv, const T* rotation, const i64* lines, T* queries, e4m3* cache,
                                int heads, int kv_heads, int key_dim, int value_dim, int block_tokens) {
  constexpr int PAIRS = 2;
  let_next_start();
  wait_for_previous();
  const i64 token = blockIdx.x, line = lines[token];
  const int lane = threadIdx.x % 32, head = (blockIdx.y * blockDim.x + threadIdx.x) / 32;
  const int part = head >= heads + kv_heads, kv_head = head - heads - part * kv_heads;
  if (head >= heads + 2 * kv_heads || (head >= heads && line < 0)) return;
  const int dim = part ? value_dim : key_dim, half = dim / 2, width = kv_heads * (key_dim + value_dim);
  const int at = part ? kv_heads * key_dim + kv_head * value_dim : kv_head * key_dim;
  const T* from = qkv + token * (heads * key_dim + width) + (head < heads ? head * key_dim : heads * key_dim + at);
  const T* turn = rotation + token * 3 * (key_dim / 2);
  float low[PAIRS][2] = {}, high[PAIRS][2] = {}, largest = 0.0f;
#pragma unroll
  for (int c = 0; c < PAIRS; ++c) {
    const int i = (c * 32 + lane) * 2;
    if (i >= half) continue;
    load<T, 2>(from + i, low[c]);
    load<T, 2>(from + half + i, high[c]);
    if (!part) {
      float cosine[2], sine[2];
      load<T, 2>(turn + i, cosine);
      load<T, 2>(turn + key_dim + i, sine);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float x = low[c][k], y = high[c][k];
        low[c][k] = x * cosine[k] - y * sine[k];
        high[c][k] = y * cosine[k] + x * sine[k];
      }
    }
    if (head < heads) {
      T* to = queries + (token * heads + head) * key_dim;
      store<T, 2>(to + i, low[c]);
      store<T, 2>(to + half + i, high[c]);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) largest = fmaxf(largest, fmaxf(fabsf(low[c][k]), fabsf(high[c][k])));
  }
  if (head < heads) return;
#pragma unroll
  for (int step = 16; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  // A mantissa above that of 448 = 1.75 * 2^8 carries into the exponent.
  const int exponent = static_cast<int>((__float_as_uint(largest) + 0x1fffff) >> 23) - 8;
  const u32 scale = max(1, min(247, exponent));
  const float inverse = scale_of(254 - scale);
  const Pages pages{kv_heads, width, block_tokens};
  const i64 block = line / block_tokens;
  const int within = static_cast<int>(line % block_tokens);
  e4m3* to = cache + pages.line(block, within) + at;
#pragma unroll
  for (int c = 0; c < PAIRS; ++c) {
    const int i = (c * 32 + lane) * 2;
    if (i >= half) continue;
    store_codes(to + i, low[c][0] * inverse, low[c][1] * inverse);
    store_codes(to + half + i, high[c][0] * inverse, high[c][1] * inverse);
  }
  if (lane == 0) cache[pages.scale(block, within, kv_head, part)].bits = scale;
}

#define ROPE_STORE_E4M3(NAME, T)                                                                          \
  extern "C" __global__ void __launch_bounds__(256) rope_store_e4m3_##NAME(                               \
      const T* qkv, const T* rotation, const i64* lines, T* queries, e4m3* cache, int heads,              \
      int kv_heads, int key_dim, int value_dim, int block_tokens) {                                       \
    rope_store_e4m3<T>(qkv, rotation, lines, queries, cache, heads, kv_heads, key_dim, value_dim,         \
                       block_tokens);                                                                     \
  }
ROPE_STORE_E4M3(bf16, bf16)
ROPE_STORE_E4M3(f32, float)

// out = silu(gate) * up of [gate | up]. Rows on the grid's x, as below.
template <typename T, int N> __device__ void swiglu(const T* gate_up, T* out, int width) {
  let_next_start();
  wait_for_previous();
  const i64 row = blockIdx.x;
  const int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (i >= width) return;
  float gate[N], up[N];
  load<T, N>(gate_up + row * 2 * width + i, gate);
  load<T, N>(gate_up + row * 2 * width + width + i, up);
#pragma unroll
  for (int k = 0; k < N; ++k) gate[k] = silu(gate[k]) * up[k];
  store<T, N>(out + row * width + i, gate);
}

// Rows of weight at token_ids - first; zeros outside [first, first + count).
template <typename T, int N>
__device__ void embed(const i64* token_ids, const T* weight, T* out, i64 first, i64 count, int width) {
  let_next_start();
  wait_for_previous();
  const i64 row = blockIdx.x;
  const int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (i >= width) return;
  const i64 id = token_ids[row] - first;
  float x[N] = {};
  if (id >= 0 && id < count) load<T, N>(weight + id * width + i, x);
  store<T, N>(out + row * width + i, x);
}

#define ELEMENTWISE(NAME, T, N)                                                                           \
  extern "C" __global__ void __launch_bounds__(256) add_##NAME##_##N(T* residual, const T* update,        \
                                                                     i64 count) {                         \
    add<T, N>(residual, update, count);                                                                   \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) rope_store_##NAME##_##N(                              \
      const T* qkv, const T* rotation, const i64* lines, T* queries, T* cache, int heads, int kv_heads,   \
      int key_dim, int value_dim) {                                                                       \
    rope_store<T, N>(qkv, rotation, lines, queries, cache, heads, kv_heads, key_dim, value_dim);          \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) swiglu_##NAME##_##N(const T* gate_up, T* out,         \
                                                                        int width) {                      \
    swiglu<T, N>(gate_up, out, width);                                                                    \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) embed_##NAME##_##N(                                   \
      const i64* token_ids, const T* weight, T* out, i64 first, i64 count, int width) {                   \
    embed<T, N>(token_ids, weight, out, first, count, width);                                             \
  }
ELEMENTWISE(bf16, bf16, 8)
ELEMENTWISE(bf16, bf16, 4)
ELEMENTWISE(bf16, bf16, 1)
ELEMENTWISE(f32, float, 4)
ELEMENTWISE(f32, float, 2)
ELEMENTWISE(f32, float, 1)
