// Mixture of experts around the products (grouped.cu): what tokens choose, slots sorted by expert, sums by token.
//
// A choice is one of a token's top_k, numbered token * top_k + place. A slot is a choice's place among those of this
// rank's experts, sorted by expert; an expert's slots are cut into tiles.

constexpr int MAX_EXPERTS = 512, A_LANE = MAX_EXPERTS / 32, MAX_TOP_K = 16, SORT_THREADS = 1024;
constexpr float LEAST = 1e-20f;  // added to a sum of scores before it divides

struct alignas(16) Tile { int expert, first, count, unused; };

// Larger for a larger number; every NaN has a place too.
__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u64 warp_largest(u64 x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) {
    const u64 other = __shfl_xor_sync(~0u, x, step);
    if (other > x) x = other;
  }
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// What may be chosen: the corrected score, then the lower index. Never 0, which is "taken".
__device__ __forceinline__ u64 key_of(float score, int index) {
  return static_cast<u64>(ordered(score)) << 32 | (0xffffffffu - static_cast<u32>(index));
}

// A warp a token. logits [tokens, experts]; chosen, weights [tokens, top_k], best first; bias may be null.
extern "C" __global__ void __launch_bounds__(128)
    moe_route(const float* logits, const float* bias, i64* chosen, float* weights, int tokens, int experts, int top_k,
              int is_softmax, int normalizes, float scale, int groups, int top_groups) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __shared__ float kept[4][MAX_EXPERTS];  // scores corrected for the choice
  __shared__ u64 group_keys[4][MAX_EXPERTS / 2];
  let_next_start();
  wait_for_previous();
  const int token = blockIdx.x * 4 + warp;
  if (token >= tokens) return;
  const float* row = logits + static_cast<i64>(token) * experts;
  float scores[A_LANE];
  float most = __uint_as_float(0xff800000u);
#pragma unroll
  for (int i = 0; i < A_LANE; ++i) {
    const int expert = i * 32 + lane;
    scores[i] = expert < experts ? row[expert] : __uint_as_float(0xff800000u);
    most = fmaxf(most, scores[i]);
  }
  if (is_softmax) {
    most = warp_max(most);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < A_LANE; ++i) {
      scores[i] = i * 32 + lane < experts ? expf(scores[i] - most) : 0.0f;
      sum += scores[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < A_LANE; ++i) scores[i] /= sum;
  } else {
#pragma unroll
    for (int i = 0; i < A_LANE; ++i) scores[i] = 1.0f / (1.0f + expf(-scores[i]));
  }
#pragma unroll
  for (int i = 0; i < A_LANE; ++i) {
    const int expert = i * 32 + lane;
    if (expert < experts) kept[warp][expert] = bias ? scores[i] + bias[expert] : scores[i];
  }
  __syncwarp();
  const int size = experts / groups;
  if (top_groups < groups) {
    // A group's key is the sum of its two best.
    for (int g = lane; g < groups; g += 32) {
      float first = __uint_as_float(0xff800000u), second = first;
      for (int i = 0; i < size; ++i) {
        const float x = kept[warp][g * size + i];
        if (x > first) {
          second = first;
          first = x;
        } else if (x > second) {
          second = x;
        }
      }
      group_keys[warp][g] = key_of(first + second, g);
    }
    __syncwarp();
    for (int round = 0; round < top_groups; ++round) {
      u64 best = 0;
      for (int g = lane; g < groups; g += 32)
        if (group_keys[warp][g] > best) best = group_keys[warp][g];
      best = warp_largest(best);
      const int g = static_cast<int>(0xffffffffu - static_cast<u32>(best));
      __syncwarp();
      if (lane == 0) group_keys[warp][g] = 0;
      __syncwarp();
    }
  }
  u64 keys[A_LANE];
#pragma unroll
  for (int i = 0; i < A_LANE; ++i) {
    const int expert = i * 32 + lane;
    const bool is_in = expert < experts && (top_groups >= groups || group_keys[warp][expert / size] == 0);
    keys[i] = is_in ? key_of(kept[warp][expert], expert) : 0;
  }
  float mine = 0.0f, sum = 0.0f;
  int mine_expert = 0;
  for (int place = 0; place < top_k; ++place) {
    u64 best = 0;
#pragma unroll
    for (int i = 0; i < A_LANE; ++i)
      if (keys[i] > best) best = keys[i];
    best = warp_largest(best);
    const int expert = static_cast<int>(0xffffffffu - static_cast<u32>(best));
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < A_LANE; ++i)
      if (keys[i] == best) {
        keys[i] = 0;
        score = scores[i];
      }
    score = __shfl_sync(~0u, score, expert % 32);
    sum += score;
    if (lane == place) {
      mine = score;
      mine_expert = expert;
    }
  }
  if (lane < top_k) {
    const i64 at = static_cast<i64>(token) * top_k + lane;
    chosen[at] = mine_expert;
    weights[at] = (normalizes ? mine / (sum + LEAST) : mine) * scale;
  }
}

// One block. chosen: experts of the choices. Those of [first, first + experts) get a slot.
// offsets [experts + 1]: an expert's first slot. slots [choices]: a choice's, -1 where the expert is not here. rows
// [choices]: a slot's choice / divisor. tiles: of up to `width` slots; num_tiles of them. loads [experts]: choices of
// each expert, added up over launches.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    moe_sort(const i64* chosen, int* offsets, int* slots, int* rows, Tile* tiles, int* num_tiles, i64* loads, int choices,
             int first, int experts, int divisor, int width) {
  __shared__ int counts[MAX_EXPERTS], next[MAX_EXPERTS], totals[2][32];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  let_next_start();
  wait_for_previous();
  for (int e = thread; e < MAX_EXPERTS; e += SORT_THREADS) counts[e] = 0;
  __syncthreads();
  for (int i = thread; i < choices; i += SORT_THREADS) {
    const int e = static_cast<int>(chosen[i]) - first;
    if (e >= 0 && e < experts) atomicAdd(&counts[e], 1);
  }
  __syncthreads();
  // Sums of slots and of tiles over the experts before; a thread an expert.
  const int count = thread < MAX_EXPERTS ? counts[thread] : 0, cut = (count + width - 1) / width;
  int before = count, tiles_before = cut;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int a = __shfl_up_sync(~0u, before, step), b = __shfl_up_sync(~0u, tiles_before, step);
    if (lane >= step) {
      before += a;
      tiles_before += b;
    }
  }
  if (lane == 31) {
    totals[0][warp] = before;
    totals[1][warp] = tiles_before;
  }
  __syncthreads();
  for (int w = 0; w < warp; ++w) {
    before += totals[0][w];
    tiles_before += totals[1][w];
  }
  before -= count;
  tiles_before -= cut;
  if (thread < MAX_EXPERTS) {
    next[thread] = before;
    if (thread <= experts) offsets[thread] = before;
    if (thread < experts) loads[thread] += count;
    for (int i = 0; i < cut; ++i) {
      const int left = count - i * width;
      tiles[tiles_before + i] = Tile{thread, before + i * width, left < width ? left : width, 0};
    }
  }
  if (thread == SORT_THREADS - 1) {
    *num_tiles = tiles_before;
    if (experts >= MAX_EXPERTS) offsets[experts] = before;
  }
  __syncthreads();
  // The order within an expert is any: a slot's result does not depend on it.
  for (int i = thread; i < choices; i += SORT_THREADS) {
    const int e = static_cast<int>(chosen[i]) - first;
    int slot = -1;
    if (e >= 0 && e < experts) {
      slot = atomicAdd(&next[e], 1);
      rows[slot] = i / divisor;
    }
    slots[i] = slot;
  }
}

// out[choice] = x[choice / top_k] * weights[choice]: inputs as the choices weigh them.
template <typename T, int N>
__device__ __forceinline__ void weigh(const T* x, const float* weights, T* out, int top_k, int width) {
  let_next_start();
  wait_for_previous();
  const i64 choice = blockIdx.x;
  const int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (i >= width) return;
  float values[N];
  load<T, N>(x + choice / top_k * width + i, values);
  const float weight = weights[choice];
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] *= weight;
  store<T, N>(out + choice * width + i, values);
}

// out[token] = sum over its choices, in their order, of weights[choice] * found[slots[choice]]; weights may be null.
template <typename T, int N>
__device__ __forceinline__ void combine(const T* found, const float* weights, const int* slots, T* out, int top_k,
                                        int width) {
  let_next_start();
  wait_for_previous();
  const i64 token = blockIdx.x;
  const int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (i >= width) return;
  float sum[N] = {};
  for (int place = 0; place < top_k; ++place) {
    const i64 choice = token * top_k + place;
    const int slot = slots[choice];
    if (slot < 0) continue;
    const float weight = weights ? weights[choice] : 1.0f;
    float values[N];
    load<T, N>(found + static_cast<i64>(slot) * width + i, values);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += weight * values[j];
  }
  store<T, N>(out + token * width + i, sum);
}

#define AROUND(T, N)                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                              \
      moe_weigh_##T##_##N(const T* x, const float* weights, T* out, int top_k, int width) {                      \
    weigh<T, N>(x, weights, out, top_k, width);                                                                  \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) moe_combine_##T##_##N(                                       \
      const T* found, const float* weights, const int* slots, T* out, int top_k, int width) {                    \
    combine<T, N>(found, weights, slots, out, top_k, width);                                                     \
  }
AROUND(bf16, 8)
AROUND(bf16, 1)
AROUND(float, 4)
AROUND(float, 1)
