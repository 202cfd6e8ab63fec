// Draws tokens from float32 logits exactly as `worker.sampler` says, one cluster of blocks a row.
//
// A block has an eighth of the row. Everything that decides is an integer, a double of one element, or a sum in
// fixed point or fixed order: a row's token depends on nothing but its logits, parameters and position.

constexpr int THREADS = 512, WARPS = THREADS / 32, SPREAD = 8, BINS = 256;
constexpr int MAX_TOP = 20, SCORES = 2 + 2 * MAX_TOP, NOBODY = 0x7fffffff;
#define INFINITE __int_as_float(0x7f800000)
#define NEVER __int_as_float(static_cast<int>(0xff800000u))

enum { IDLE = 1, FILTERED = 2, PENALISED = 4 };

// One row's parameters, by slot; `sampler_state.py` packs the same 80 bytes.
struct Params {
  double temperature, top_p, log_min_p;
  u64 seed;
  float repetition, frequency, presence;
  int top_k, flags, logprobs, num_specials, banned_until, slot, num_counts, pad[2];
};
// A token with a bias, or banned (the highest bit of `column`), or both. Sorted by column.
struct Special { u32 column; float bias; };
// Per token of a penalised row: the highest bit says that it stands in the prompt, the others count it in the answer.
typedef unsigned short Count;

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same shared variable in another block of the cluster.
template <typename T> __device__ __forceinline__ const volatile T* at_peer(const T* mine, int block) {
  u64 there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(block));
  return reinterpret_cast<const volatile T*>(there);
}

// --- noise: worker/noise.py

__device__ __forceinline__ u64 splitmix64(u64 x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
__device__ __forceinline__ u64 noise_key(u64 seed, int position) {
  return splitmix64(splitmix64(seed) + (static_cast<u64>(position) + 1) * 0x9E3779B97F4A7C15ull);
}
__device__ __forceinline__ u32 noise_bits(u32 id, u64 key) {
  u32 x = id * 0x9E3779B1u;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x ^= x >> 13;
  x ^= static_cast<u32>(key);
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu + static_cast<u32>(key >> 32);
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}
__device__ __forceinline__ float gumbel(u32 bits) {
  float v = __fmul_rn(__int2float_rn(static_cast<int>(bits)), 0x1p-32f);
  v = __fadd_rn(v, v < 0.0f ? 1.0f : 0.0f);
  v = fminf(fmaxf(v, 0x1p-33f), 1.0f - 0x1p-24f);
  return -logf(-log1pf(-v));
}

struct Best { double score; int id; };

// The highest of scores with noise. The double that decides is computed only for tokens that can still win:
// -log(v) is never less than their noise -log(-log(1 - v)).
struct Draw {
  double temperature;
  u64 key;
  float inverse, limit;
  Best best;

  __device__ Draw(double t, u64 k) : temperature(t), key(k), limit(NEVER), best{NEVER, NOBODY} {
    // Where floats do not reach, NaN lets every token pass the first look.
    inverse = t >= 1e-30 ? __double2float_rn(1.0 / t) : __int_as_float(0x7fffffff);
  }
  __device__ __forceinline__ float upper(float x, int id) const {
    const float log2_v = __log2f(__uint2float_rn(noise_bits(id, key))) - 32.0f;
    return fmaf(x, inverse, -0.69314718f * log2_v);
  }
  __device__ __forceinline__ void take(float x, int id) {
    const double score = __dadd_rn(__ddiv_rn(x, temperature), static_cast<double>(gumbel(noise_bits(id, key))));
    if (score > best.score || (score == best.score && id < best.id)) best = {score, id};
  }
  // A score whose `upper` is below cannot win over `score`; more than the rounding of `upper` is left.
  __device__ __forceinline__ void set_limit(float score) { limit = score - (1e-3f + 1e-6f * fabsf(score)); }
  __device__ __forceinline__ float floor() const { return __double2float_rd(best.score); }
};

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a;
}
template <int FROM> __device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int step = FROM; step; step >>= 1) {
    Best other;
    other.score = __shfl_xor_sync(~0u, best.score, step);
    other.id = __shfl_xor_sync(~0u, best.id, step);
    best = better(best, other);
  }
  return best;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// --- step 1 of a draw: penalties, bias, bans

struct Adjust {
  const Count* counts;
  const Special* specials;
  int num_specials, low, high;
  float repetition, frequency, presence;
  bool is_banning, is_any;

  __device__ Adjust(const Params& p, const Count* all_counts, int stride, const Special* all_specials, int capacity,
                    int slot, int position) {
    counts = p.flags & PENALISED ? all_counts + static_cast<i64>(slot) * stride : nullptr;
    specials = all_specials + static_cast<i64>(slot) * capacity;
    num_specials = p.num_specials;
    low = num_specials ? specials[0].column & 0x7fffffff : NOBODY;
    high = num_specials ? specials[num_specials - 1].column & 0x7fffffff : -1;
    repetition = p.repetition, frequency = p.frequency, presence = p.presence;
    is_banning = position < p.banned_until;
    is_any = counts != nullptr || num_specials;
  }
  __device__ __forceinline__ float operator()(float x, int column) const {
    if (counts) {
      const u32 count = counts[column], answer = count & 0x7fff;
      if (count) x = x > 0.0f ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
      if (answer) x = __fsub_rn(__fsub_rn(x, __fmul_rn(__uint2float_rn(answer), frequency)), presence);
    }
    if (column >= low && column <= high) {
      int from = 0, to = num_specials - 1;  // the last one is at or after `column`
      while (from < to) {
        const int middle = (from + to) / 2;
        if (static_cast<int>(specials[middle].column & 0x7fffffff) < column) from = middle + 1;
        else to = middle;
      }
      const Special found = specials[from];
      if (static_cast<int>(found.column & 0x7fffffff) == column) {
        x = __fadd_rn(x, found.bias);
        if (found.column >> 31 && is_banning) x = NEVER;
      }
    }
    return x;
  }
};

// What a row's token goes to. One thread calls it.
struct Outputs {
  int* token_ids;
  int* broken;
  i64* last_tokens;
  Count* counts;
  int count_stride, first, width;

  __device__ void write(int row, int slot, int flags, int token) const {
    token_ids[row] = token;
    last_tokens[slot] = token;
    const int column = token - first;
    if (flags & PENALISED && column >= 0 && column < width) {
      Count* count = counts + static_cast<i64>(slot) * count_stride + column;
      if ((*count & 0x7fff) < 0x7fff) *count += 1;
    }
  }
};

// A block's share of `width` columns: [begin, end), begin a multiple of 4.
struct Share {
  int begin, end;
  __device__ explicit Share(int width) {
    const int each = (width + 4 * SPREAD - 1) / (4 * SPREAD) * 4;
    begin = min(static_cast<int>(blockIdx.x) * each, width), end = min(begin + each, width);
  }
};

__device__ __forceinline__ void read4(const float* line, int i, int end, bool is_aligned, float (&x)[4]) {
  if (is_aligned && i + 4 <= end) {
    const Pack<float, 4> pack = *reinterpret_cast<const Pack<float, 4>*>(line + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = pack.at[k];
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = i + k < end ? line[i + k] : NEVER;
  }
}

// take(value, i) for the thread's elements of the share; eight reads are under way before the first is used.
template <typename Read, typename Take>
__device__ __forceinline__ void for_each(const Share& share, Read read, Take take) {
  constexpr int AHEAD = 8;
  for (int base = share.begin + threadIdx.x; base < share.end; base += AHEAD * THREADS) {
    float x[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int i = base + k * THREADS;
      x[k] = i < share.end ? read(i) : NEVER;
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int i = base + k * THREADS;
      if (i < share.end) take(x[k], i);
    }
  }
}

// --- rows without a filter: one pass

struct DrawPart { Best best; int is_bad, is_finite; };

// partials: null, or [rows, 3] for `merge_draws`: health (0 nothing above -inf, 1 good, 2 NaN or +inf), score, id.
extern "C" __global__ void __cluster_dims__(SPREAD, 1, 1) __launch_bounds__(THREADS, 2)
    draw(const float* logits, i64 stride, const Params* params, Count* counts, int count_stride,
         const Special* specials, int capacity, const int* slots, const int* positions, int first, int width,
         double* partials, int* token_ids, int* broken, i64* last_tokens) {
  __shared__ Best bests[WARPS];
  __shared__ DrawPart part;
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int STEP = THREADS * 4;
  const Share share(width);
  const float* line = logits + row * stride;
  const bool is_aligned = stride % 4 == 0 && reinterpret_cast<u64>(logits) % 16 == 0;
  int base = share.begin + warp * 128;
  float ahead[2][4];  // read before they are needed, and before the parameters
  read4(line, base + lane * 4, share.end, is_aligned, ahead[0]);
  read4(line, base + STEP + lane * 4, share.end, is_aligned, ahead[1]);

  const int slot = slots[row], position = positions[row];
  const Params& p = params[slot];
  const int flags = p.flags;
  if (flags & IDLE) {
    if (partials == nullptr && blockIdx.x == 0 && threadIdx.x == 0) token_ids[row] = broken[row] = 0;
    return;
  }
  const bool is_filtered = flags & FILTERED;
  if (is_filtered && partials == nullptr) return;
  const Adjust adjust(p, counts, count_stride, specials, capacity, slot, position);
  const double temperature = p.temperature;
  const bool is_greedy = temperature == 0.0;
  Draw drawn(is_greedy ? 1.0 : temperature, noise_key(p.seed, position));

  bool is_bad = false, is_finite = false;
  float highest = NEVER;
  int highest_id = NOBODY;
  auto take = [&](float (&x)[4], int i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      is_bad |= !(x[k] < INFINITE);
      is_finite |= x[k] > NEVER;
    }
    if (is_filtered) return;
    if (adjust.is_any) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (i + k < share.end) x[k] = adjust(x[k], i + k);
    }
    if (is_greedy) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (x[k] > highest) highest = x[k], highest_id = first + i + k;
      return;
    }
    float upper[4];
    u32 left = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      upper[k] = drawn.upper(x[k], first + i + k);
      left |= (x[k] > NEVER ? 1u : 0u) << k;
    }
    while (true) {
      int pick = -1;
      float most = 0.0f, value = 0.0f;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (left >> k & 1 && !(upper[k] < drawn.limit) && (pick < 0 || upper[k] > most))
          pick = k, most = upper[k], value = x[k];
      if (!__any_sync(~0u, pick >= 0)) break;
      if (pick >= 0) {
        left &= ~(1u << pick);
        drawn.take(value, first + i + pick);
      }
      drawn.set_limit(warp_max(drawn.floor()));
    }
  };
  for (; base < share.end; base += 2 * STEP) {  // the same on all lanes
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = base + half * STEP + lane * 4;
      float x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = ahead[half][k];
      read4(line, i + 2 * STEP, share.end, is_aligned, ahead[half]);
      take(x, i);
    }
  }
  if (is_greedy) drawn.best = {highest, highest_id};

  const Best mine = warp_best<16>(drawn.best);
  if (lane == 0) bests[warp] = mine;
  is_bad = __syncthreads_or(is_bad);
  is_finite = __syncthreads_or(is_finite);
  if (warp == 0) {
    const Best best = warp_best<16>(bests[lane % WARPS]);
    if (lane == 0) part.best = best, part.is_bad = is_bad, part.is_finite = is_finite;
  }
  cluster_sync();
  Best best = {NEVER, NOBODY};
  if (blockIdx.x == 0 && warp == 0) {
    const volatile DrawPart* there = at_peer(&part, lane % SPREAD);
    best.score = there->best.score, best.id = there->best.id;
    is_bad = there->is_bad, is_finite = there->is_finite;
    best = warp_best<16>(best);
    is_bad = __any_sync(~0u, is_bad), is_finite = __any_sync(~0u, is_finite);
  }
  cluster_sync();  // no block leaves before it was read
  if (blockIdx.x || threadIdx.x) return;
  if (partials != nullptr) {
    partials[row * 3] = is_bad ? 2.0 : is_finite ? 1.0 : 0.0;
    partials[row * 3 + 1] = best.score;
    partials[row * 3 + 2] = best.id;
    return;
  }
  broken[row] = is_bad || !is_finite;
  const Outputs out = {token_ids, broken, last_tokens, counts, count_stride, first, width};
  // Where every token that is not banned has -inf, the lowest id is the highest.
  out.write(row, slot, flags, best.id == NOBODY || is_bad ? 0 : best.id);
}

// parts: [ranks, rows, 3] of `draw`. A thread a row.
extern "C" __global__ void merge_draws(const double* parts, int ranks, int rows, const Params* params, Count* counts,
                                       int count_stride, const int* slots, int first, int width, int* token_ids,
                                       int* broken, i64* last_tokens) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const int slot = slots[row], flags = params[slot].flags;
  if (flags & IDLE) {
    token_ids[row] = broken[row] = 0;
    return;
  }
  bool is_bad = false, is_finite = false;
  Best best = {NEVER, NOBODY};
  for (int rank = 0; rank < ranks; ++rank) {
    const double* part = parts + (static_cast<i64>(rank) * rows + row) * 3;
    is_bad |= part[0] == 2.0, is_finite |= part[0] == 1.0;
    best = better(best, {part[1], static_cast<int>(part[2])});
  }
  broken[row] = is_bad || !is_finite;
  if (flags & FILTERED) return;
  const Outputs out = {token_ids, broken, last_tokens, counts, count_stride, first, width};
  out.write(row, slot, flags, best.id == NOBODY || is_bad ? 0 : best.id);
}

// out [rows, room]: adjusted logits of this rank's slice, of filtered rows only; to be gathered.
extern "C" __global__ void adjust_rows(const float* logits, i64 stride, const Params* params, const Count* counts,
                                       int count_stride, const Special* specials, int capacity, const int* slots,
                                       const int* positions, int width, int room, float* out) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.y, slot = slots[row];
  const Params& p = params[slot];
  if (!(p.flags & FILTERED)) return;
  const Adjust adjust(p, counts, count_stride, specials, capacity, slot, positions[row]);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < room; i += gridDim.x * blockDim.x)
    out[static_cast<i64>(row) * room + i] = i < width ? adjust(logits[row * stride + i], i) : NEVER;
}

// --- selection: which tokens are the highest k, or the highest with a share of the probability

struct Histogram { u32 count[BINS], low[BINS], high[BINS]; };
struct Totals { u32 count[BINS]; u64 weight[BINS]; };
// The first bin up to and with which the target is reached.
struct Found { int bin; u32 before, count; u64 weight_before, weight, all; };
struct SlicePart { float highest; int is_bad, is_finite; };

struct Work {
  Histogram mine[2];  // in turn: one cluster barrier a histogram is enough
  Totals coarse, fine;
  Found found;
  SlicePart part, whole;
  float warp_highest[WARPS];
};

// Floats as integers of the same order. Equals must have equal bits: no -0.0 comes here.
__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The highest tokens: all above `key`, and of those at `key` the ones with ids up to `last_id`.
struct Threshold {
  u32 key;
  int last_id;
  __device__ __forceinline__ bool keeps(float x, int id) const {
    const u32 k = ordered(x);
    return k > key || (k == key && id <= last_id);
  }
};

// A block's share of a row in shared memory. All blocks of the cluster go through the same calls.
struct Slice {
  Work& work;
  float* x;
  int begin, count, turn;
  float highest, scale;
  double temperature, top, unit;
  bool has_weights;

  // After x is filled: the maximum and the health of the whole row.
  __device__ void join(bool is_bad, bool is_finite, float mine) {
    mine = warp_max(mine);
    if (threadIdx.x % 32 == 0) work.warp_highest[threadIdx.x / 32] = mine;
    is_bad = __syncthreads_or(is_bad);
    is_finite = __syncthreads_or(is_finite);
    if (threadIdx.x < 32) {
      mine = warp_max(work.warp_highest[threadIdx.x % WARPS]);
      if (threadIdx.x == 0) work.part = {mine, is_bad, is_finite};
    }
    cluster_sync();
    if (threadIdx.x < 32) {
      const volatile SlicePart* there = at_peer(&work.part, threadIdx.x % SPREAD);
      mine = warp_max(there->highest);
      is_bad = __any_sync(~0u, there->is_bad), is_finite = __any_sync(~0u, there->is_finite);
      if (threadIdx.x == 0) work.whole = {mine, is_bad, is_finite};
    }
    __syncthreads();
    highest = work.whole.highest;
  }
  __device__ void set_temperature(double t) {
    temperature = t, top = __ddiv_rn(highest, t);
    // A coarse bin is an eighth of a nat; the last one has all that is 32 below the highest.
    scale = fminf(__double2float_rn(8.0 / t), 1e30f);
  }
  __device__ __forceinline__ int coarse_bin(float value) const {
    return static_cast<int>(fminf(__fmul_rn(__fsub_rn(highest, value), scale), BINS - 1.0f));
  }
  __device__ __forceinline__ u64 weight(float value) const {
    const double below = __ddiv_rn(value, temperature) - top;
    return below > -50.0 ? __double2ull_rn(exp(below) * unit) : 0;
  }

  // Count, and weigh, the row's tokens by bin_of(value, id); below 0: none.
  template <typename BinOf> __device__ void fill(Totals& totals, BinOf bin_of) {
    Histogram& mine = work.mine[turn];
    for (int b = threadIdx.x; b < BINS; b += THREADS) mine.count[b] = mine.low[b] = mine.high[b] = 0;
    __syncthreads();
    // A thread holds back a run of one bin: equal or far values would all meet at one address.
    int held = -1;
    u32 number = 0;
    u64 sum = 0;
    auto add = [&] {
      if (number == 0) return;
      atomicAdd(&mine.count[held], number);
      if (sum == 0) return;
      const u32 low = static_cast<u32>(sum), before = atomicAdd(&mine.low[held], low);
      const u32 high = static_cast<u32>(sum >> 32) + (before + low < before ? 1u : 0u);
      if (high) atomicAdd(&mine.high[held], high);
    };
    for (int j = threadIdx.x; j < count; j += THREADS) {
      const int b = bin_of(x[j], begin + j);
      if (b < 0) continue;
      if (b != held) {
        add();
        held = b, number = 0, sum = 0;
      }
      ++number;
      if (has_weights) sum += weight(x[j]);
    }
    add();
    cluster_sync();
    for (int b = threadIdx.x; b < BINS; b += THREADS) {
      u32 counted = 0;
      u64 weighed = 0;
#pragma unroll
      for (int block = 0; block < SPREAD; ++block) {
        const volatile Histogram* there = at_peer(&mine, block);
        counted += there->count[b];
        if (has_weights) weighed += static_cast<u64>(there->high[b]) << 32 | there->low[b];
      }
      totals.count[b] = counted, totals.weight[b] = weighed;
    }
    __syncthreads();
    turn ^= 1;
  }

  __device__ Found find(const Totals& totals, bool by_weight, u64 target) {
    constexpr int EACH = BINS / 32;
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      u32 counted = 0;
      u64 weighed = 0;
      for (int b = lane * EACH; b < (lane + 1) * EACH; ++b) counted += totals.count[b], weighed += totals.weight[b];
      u32 count_sum = counted;
      u64 weight_sum = weighed;
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const u32 c = __shfl_up_sync(~0u, count_sum, step);
        const u64 w = __shfl_up_sync(~0u, weight_sum, step);
        if (lane >= step) count_sum += c, weight_sum += w;
      }
      const u64 all = __shfl_sync(~0u, weight_sum, 31);
      const u32 reached = __ballot_sync(~0u, (by_weight ? weight_sum : static_cast<u64>(count_sum)) >= target);
      if (lane == (reached ? __ffs(reached) - 1 : 31)) {
        u32 before = count_sum - counted;
        u64 weight_before = weight_sum - weighed;
        int b = lane * EACH;
        for (; b < (lane + 1) * EACH - 1; ++b) {
          const u64 with = by_weight ? weight_before + totals.weight[b] : static_cast<u64>(before) + totals.count[b];
          if (with >= target) break;
          before += totals.count[b], weight_before += totals.weight[b];
        }
        work.found = {b, before, totals.count[b], weight_before, totals.weight[b], all};
      }
    }
    __syncthreads();
    const Found found = work.found;
    __syncthreads();
    return found;
  }

  __device__ void fill_coarse() {
    fill(work.coarse, [&](float value, int) { return coarse_bin(value); });
  }

  // The tokens that the target (tokens, or weight) needs, in order of value; equals by id. `kept_weight` is theirs.
  __device__ Threshold select(bool by_weight, u64 target, u64& kept_weight) {
    Found found = find(work.coarse, by_weight, target);
    const int near = found.bin;
    u64 weight_above = 0;
    u32 key = 0;
    for (int shift = 24;; shift -= 8) {
      weight_above += found.weight_before;
      target -= by_weight ? found.weight_before : found.before;
      if (shift < 0) break;
      fill(work.fine, [&](float value, int) {
        const u32 k = ordered(value);
        if (coarse_bin(value) != near || (shift < 24 && k >> (shift + 8) != key)) return -1;
        return BINS - 1 - static_cast<int>(k >> shift & 255);
      });
      found = find(work.fine, by_weight, target);
      key = key << 8 | static_cast<u32>(BINS - 1 - found.bin);
    }
    // What is left of the target goes to equals, which weigh the same.
    const u64 each = found.count ? found.weight / found.count : 0;
    u64 equals = target;
    if (by_weight) equals = each ? (target + each - 1) / each : found.count;
    if (equals > found.count) equals = found.count;
    kept_weight = weight_above + equals * each;
    return {key, equals < found.count ? last_of(key, static_cast<u32>(equals)) : NOBODY};
  }

  // The id of the n-th token with this key, in order of id.
  __device__ int last_of(u32 key, u32 n) {
    u32 id = 0;
    for (int shift = 16; shift >= 0; shift -= 8) {
      fill(work.fine, [&](float value, int token) {
        const u32 t = token;
        return ordered(value) != key || (shift < 16 && t >> (shift + 8) != id) ? -1 : static_cast<int>(t >> shift & 255);
      });
      const Found found = find(work.fine, false, n);
      n -= found.before;
      id = id << 8 | static_cast<u32>(found.bin);
    }
    return static_cast<int>(id);
  }
};

extern __shared__ float slice_values[];

// Rows with a filter. room 0: logits are raw and whole, [rows, stride]. Else they are [ranks, rows, room] from
// `adjust_rows`, rank_stride apart, and `broken` is written by `merge_draws`. weight_bits: 2^it is the weight of the
// highest, and the vocabulary's sum stays below 2^64.
extern "C" __global__ void __cluster_dims__(SPREAD, 1, 1) __launch_bounds__(THREADS, 2)
    draw_filtered(const float* logits, i64 stride, i64 rank_stride, int room, int vocab, int weight_bits,
                  const Params* params, Count* counts, int count_stride, const Special* specials, int capacity,
                  const int* slots, const int* positions, int first, int width, int* token_ids, int* broken,
                  i64* last_tokens) {
  __shared__ Work work;
  __shared__ Best bests[WARPS];
  __shared__ DrawPart part;
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.y, slot = slots[row];
  const Params& p = params[slot];
  const int flags = p.flags;
  if (!(flags & FILTERED)) return;
  const int position = positions[row];
  const Adjust adjust(p, counts, count_stride, specials, capacity, slot, position);
  const double top_p = p.top_p, log_min_p = p.log_min_p;
  const u32 top_k = p.top_k;

  const Share share(vocab);
  Slice slice = {work, slice_values, share.begin, share.end - share.begin, 0};
  bool is_bad = false, is_finite = false;
  float mine = NEVER;
  auto read = [&](int id) {
    const int rank = room ? id / room : 0;
    return logits[rank * rank_stride + row * stride + id - rank * room];
  };
  for_each(share, read, [&](float x, int id) {
    is_bad |= !(x < INFINITE);
    is_finite |= x > NEVER;
    if (room == 0 && adjust.is_any) x = adjust(x, id);
    x = __fadd_rn(x, 0.0f);  // -0.0 becomes 0.0
    slice.x[id - share.begin] = x;
    mine = fmaxf(mine, x);
  });
  slice.join(is_bad, is_finite, mine);
  is_bad = work.whole.is_bad, is_finite = work.whole.is_finite;
  const Outputs out = {token_ids, broken, last_tokens, counts, count_stride, first, width};
  const bool is_writer = blockIdx.x == 0 && threadIdx.x == 0;
  if (is_writer && room == 0) broken[row] = is_bad || !is_finite;
  if (is_bad || !(slice.highest > NEVER)) {
    cluster_sync();  // no block leaves before it was read
    if (is_writer) out.write(row, slot, flags, 0);
    return;
  }
  slice.set_temperature(p.temperature);
  slice.has_weights = top_p < 1.0;
  slice.unit = static_cast<double>(1ull << weight_bits);
  Threshold kept = {0, NOBODY};
  if (top_k || slice.has_weights) slice.fill_coarse();
  u64 weight = 0;
  if (top_k) kept = slice.select(false, top_k, weight);
  if (slice.has_weights) {
    if (!top_k) weight = slice.find(work.coarse, true, 1).all;
    u64 target = __double2ull_ru(__dmul_rn(top_p, __ull2double_rn(weight)));
    target = min(max(target, 1ull), weight);
    u64 ignored;
    kept = slice.select(true, target, ignored);
  }
  Draw drawn(slice.temperature, noise_key(p.seed, position));
  const double lowest = __dadd_rn(slice.top, log_min_p);
  for (int j = threadIdx.x; j < slice.count; j += THREADS) {
    const float x = slice.x[j];
    const int id = share.begin + j;
    if (!(x > NEVER) || !kept.keeps(x, id)) continue;
    if (log_min_p > NEVER && !(__ddiv_rn(x, slice.temperature) >= lowest)) continue;
    if (drawn.upper(x, id) < drawn.limit) continue;
    drawn.take(x, id);
    drawn.set_limit(drawn.floor());
  }
  const Best found = warp_best<16>(drawn.best);
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = found;
  __syncthreads();
  if (threadIdx.x < 32) {
    const Best best = warp_best<16>(bests[threadIdx.x % WARPS]);
    if (threadIdx.x == 0) part.best = best;
  }
  cluster_sync();
  Best best = {NEVER, NOBODY};
  if (blockIdx.x == 0 && threadIdx.x < 32) {
    const volatile DrawPart* there = at_peer(&part, threadIdx.x % SPREAD);
    best.score = there->best.score, best.id = there->best.id;
    best = warp_best<16>(best);
  }
  cluster_sync();
  if (is_writer) out.write(row, slot, flags, best.id == NOBODY ? 0 : best.id);
}

// --- log-probabilities of raw logits

struct Top { int count; float value[MAX_TOP]; int id[MAX_TOP]; double sum; };

// out [rows, SCORES], of this rank's slice: log-sum-exp, the token's logit (-inf where it is elsewhere), the highest
// logits in order, their ids (-1: none). How many a row asks for (below 0: it is left out) is in its parameters,
// or, where slots is null, `asked` for all.
extern "C" __global__ void __cluster_dims__(SPREAD, 1, 1) __launch_bounds__(THREADS, 2)
    score(const float* logits, i64 stride, const Params* params, const int* slots, int asked, const int* token_ids,
          int first, int width, double* out) {
  __shared__ Work work;
  __shared__ Top top;
  __shared__ double sums[WARPS];
  __shared__ float values[MAX_TOP];
  __shared__ int ids[MAX_TOP];
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.y;
  if (slots != nullptr) {
    const Params& p = params[slots[row]];
    asked = p.flags & IDLE ? -1 : p.logprobs;
  }
  if (asked < 0) return;
  const Share share(width);
  Slice slice = {work, slice_values, share.begin, share.end - share.begin, 0};
  bool is_bad = false, is_finite = false;
  float mine = NEVER;
  auto read = [&](int i) { return logits[row * stride + i]; };
  for_each(share, read, [&](float x, int i) {
    is_bad |= !(x < INFINITE);
    is_finite |= x > NEVER;
    x = __fadd_rn(x, 0.0f);
    slice.x[i - share.begin] = x;
    mine = fmaxf(mine, x);
  });
  if (threadIdx.x == 0) top.count = 0;
  slice.join(is_bad, is_finite, mine);
  is_bad = work.whole.is_bad, is_finite = work.whole.is_finite;
  slice.set_temperature(1.0);
  slice.has_weights = false;

  double sum = 0.0;
  if (is_finite && !is_bad)
    for (int j = threadIdx.x; j < slice.count; j += THREADS) sum += exp(static_cast<double>(slice.x[j]) - slice.top);
#pragma unroll
  for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    top.sum = 0.0;
    for (int w = 0; w < WARPS; ++w) top.sum += sums[w];
  }
  const int number = is_bad ? 0 : min(min(asked, MAX_TOP), width);
  if (number) {
    slice.fill_coarse();
    u64 ignored;
    const Threshold kept = slice.select(false, number, ignored);
    for (int j = threadIdx.x; j < slice.count; j += THREADS) {
      if (!kept.keeps(slice.x[j], share.begin + j)) continue;
      const int place = atomicAdd(&top.count, 1);
      if (place < MAX_TOP) top.value[place] = slice.x[j], top.id[place] = first + share.begin + j;
    }
  }
  cluster_sync();
  if (blockIdx.x == 0) {
    double* to = out + static_cast<i64>(row) * SCORES;
    if (threadIdx.x == 0) {
      sum = 0.0;
      for (int block = 0; block < SPREAD; ++block) sum += at_peer(&top, block)->sum;
      to[0] = is_bad ? static_cast<double>(__int_as_float(0x7fffffff)) : is_finite ? slice.top + log(sum) : NEVER;
      const int column = token_ids[row] - first;
      to[1] = column >= 0 && column < width ? logits[row * stride + column] : NEVER;
    }
    if (threadIdx.x < MAX_TOP) {
      to[2 + threadIdx.x] = NEVER;
      to[2 + MAX_TOP + threadIdx.x] = -1.0;
      // Entry n of all blocks' lists, one after the other.
      int n = threadIdx.x;
      for (int block = 0; block < SPREAD && static_cast<int>(threadIdx.x) < number; ++block) {
        const volatile Top* there = at_peer(&top, block);
        const int held = there->count;
        if (n >= 0 && n < held) values[threadIdx.x] = there->value[n], ids[threadIdx.x] = there->id[n];
        n -= held;
      }
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < number) {
      const float value = values[threadIdx.x];
      const int id = ids[threadIdx.x];
      int place = 0;
      for (int i = 0; i < number; ++i) place += values[i] > value || (values[i] == value && ids[i] < id);
      to[2 + place] = value;
      to[2 + MAX_TOP + place] = id;
    }
  }
  cluster_sync();
}

// parts [ranks, rows, SCORES] of `score`. out [rows, SCORES]: the token's log-probability, the log-sum-exp (not finite
// where logits are broken), log-probabilities of the highest, their ids. A block a row, a thread an entry.
extern "C" __global__ void merge_scores(const double* parts, int ranks, int rows, const Params* params,
                                        const int* slots, int asked, double* out) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x;
  if (slots != nullptr) {
    const Params& p = params[slots[row]];
    asked = p.flags & IDLE ? -1 : p.logprobs;
  }
  if (asked < 0) return;
  const double* of_row = parts + static_cast<i64>(row) * SCORES;
  const i64 step = static_cast<i64>(rows) * SCORES;
  double highest = NEVER, logit = NEVER, sum = 0.0;
  for (int rank = 0; rank < ranks; ++rank) {
    highest = fmax(highest, of_row[rank * step]);
    logit = fmax(logit, of_row[rank * step + 1]);
  }
  for (int rank = 0; rank < ranks; ++rank) sum += exp(of_row[rank * step] - highest);
  const double total = highest + log(sum);
  double* to = out + static_cast<i64>(row) * SCORES;
  if (threadIdx.x == 0) to[0] = logit - total, to[1] = total;
  for (int e = threadIdx.x; e < ranks * MAX_TOP; e += blockDim.x) {
    const double* entry = of_row + e / MAX_TOP * step + 2 + e % MAX_TOP;
    const double value = entry[0], id = entry[MAX_TOP];
    if (id < 0.0) continue;
    int place = 0;
    for (int i = 0; i < ranks * MAX_TOP; ++i) {
      const double* other = of_row + i / MAX_TOP * step + 2 + i % MAX_TOP;
      if (other[MAX_TOP] >= 0.0 && (other[0] > value || (other[0] == value && other[MAX_TOP] < id))) ++place;
    }
    if (place < asked) to[2 + place] = value - total, to[2 + MAX_TOP + place] = id;
  }
}

// --- changes of rows

// staged: per changed row, where its record begins (in words of 8 bytes); a record is Params, specials, and for
// penalised rows pairs of column and Count. A block a record.
extern "C" __global__ void apply_rows(const u64* staged, Params* params, Count* counts, int count_stride,
                                      Special* specials, int capacity) {
  let_next_start();
  wait_for_previous();
  const u64* record = staged + staged[blockIdx.x];
  constexpr int WORDS = sizeof(Params) / 8;
  const Params& p = *reinterpret_cast<const Params*>(record);
  const i64 slot = p.slot;
  if (threadIdx.x < WORDS) reinterpret_cast<u64*>(params + slot)[threadIdx.x] = record[threadIdx.x];
  const Special* pairs = reinterpret_cast<const Special*>(record + WORDS);
  for (int i = threadIdx.x; i < p.num_specials; i += blockDim.x) specials[slot * capacity + i] = pairs[i];
  if (!(p.flags & PENALISED)) return;
  Count* line = counts + slot * count_stride;
  for (int i = threadIdx.x; i < count_stride / 4; i += blockDim.x) reinterpret_cast<u64*>(line)[i] = 0;
  __syncthreads();
  pairs += p.num_specials;
  for (int i = threadIdx.x; i < p.num_counts; i += blockDim.x)
    line[pairs[i].column] = static_cast<Count>(__float_as_uint(pairs[i].bias));
}
