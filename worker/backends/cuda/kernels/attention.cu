// Causal attention over a paged cache. A token's line holds the keys of all KV heads, then the values; token t of
// a row lies in block tables[slot * max_blocks + t / block_tokens]. Dims are multiples of 8. Softmax is in base 2,
// sums are float32, and everything is added in a fixed order.
//
// Decode (one query token a row): grid (splits, kv_heads * head tiles, rows). How far a row is split follows from
// its length, read here, so a captured graph stays right as rows grow. The last block of a (row, head tile) to
// finish merges the others' parts. `lse`, null or [rows, heads]: the base-2 logarithms of the softmaxes' denominators,
// with which attentions to parts of a context are merged; NONE for a row without tokens, whose means are zeros.

constexpr int WARPS = 4, THREADS = 32 * WARPS, MOST_SPLITS = 128;

struct Lane16 { u32 at[4]; };

// Streamed: a line of the cache is read once a step.
__device__ __forceinline__ Lane16 stream16(const bf16* from, bool is_valid) {
  Lane16 x = {{0, 0, 0, 0}};
  if (is_valid)
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
                 : "l"(from));
  return x;
}

struct Rows {
  const int* tables;
  const int* slots;
  const int* lengths;
  int max_blocks, block_tokens;

  __device__ const int* blocks(int row) const { return tables + static_cast<i64>(slots[row]) * max_blocks; }
  __device__ i64 line(const int* blocks, int token) const {
    return static_cast<i64>(blocks[token / block_tokens]) * block_tokens + token % block_tokens;
  }
};

struct Shape {
  int heads, kv_heads, key_dim, value_dim;

  __device__ int width() const { return kv_heads * (key_dim + value_dim); }
};

__device__ __forceinline__ int active_splits(int length, int split_tokens) {
  return max(1, min(static_cast<int>(gridDim.x), (length + split_tokens - 1) / split_tokens));
}

// What the warps of a block found: unnormalised sums, maxima and denominators of HEADS heads.
template <int HEADS, int DIMS, int WARPS = ::WARPS> struct Parts {
  alignas(16) float sums[WARPS][HEADS][DIMS];
  float maxima[WARPS][HEADS];
  float totals[WARPS][HEADS];
  float weights[HEADS][MOST_SPLITS];
  float inverse[HEADS];
  int ticket;
};

// A head of a block: four dims of the sum over its warps, with the maximum and the denominator.
struct Merged { float sum[4], top, total; };

template <int HEADS, int DIMS, int WARPS>
__device__ __forceinline__ Merged merge_warps(const Parts<HEADS, DIMS, WARPS>& parts, int head, int dim) {
  Merged merged = {{}, parts.maxima[0][head], 0.0f};
#pragma unroll
  for (int w = 1; w < WARPS; ++w) merged.top = fmaxf(merged.top, parts.maxima[w][head]);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float weight = weight_of(parts.maxima[w][head], merged.top);
    const float4 x = *reinterpret_cast<const float4*>(&parts.sums[w][head][dim]);
    merged.sum[0] += weight * x.x;
    merged.sum[1] += weight * x.y;
    merged.sum[2] += weight * x.z;
    merged.sum[3] += weight * x.w;
    merged.total += weight * parts.totals[w][head];
  }
  return merged;
}

template <typename T> __device__ __forceinline__ void store_mean(T* to, Merged& merged) {
  const float inverse = merged.total > 0.0f ? 1.0f / merged.total : 0.0f;
#pragma unroll
  for (int k = 0; k < 4; ++k) merged.sum[k] *= inverse;
  store<T, 4>(to, merged.sum);
}

// Merge the warps, then the splits. `out` and `lse` are those of the first of `count` heads of one token.
// partial: [row and head tile][split][head of the tile][value_dim + 2]: sums, maximum, total.
template <typename T, int HEADS, int DIMS, int WARPS>
__device__ void finish(Parts<HEADS, DIMS, WARPS>& parts, T* out, float* lse, float* partial, int* done, int count,
                       int value_dim, int splits) {
  constexpr int THREADS = 32 * WARPS;
  const int pair = blockIdx.z * gridDim.y + blockIdx.y;
  const int pitch = value_dim + 2;
  float* mine = partial + (static_cast<i64>(pair) * gridDim.x + blockIdx.x) * HEADS * pitch;
  __syncthreads();
  for (int i = 4 * threadIdx.x; i < count * value_dim; i += 4 * THREADS) {
    const int head = i / value_dim, dim = i % value_dim;
    Merged merged = merge_warps(parts, head, dim);
    if (splits == 1) {
      if (lse && dim == 0) lse[head] = log_sum(merged.top, merged.total);
      store_mean(out + i, merged);
    } else {
      // The pitch is even, so two values are eight aligned bytes.
      float2* to = reinterpret_cast<float2*>(mine + head * pitch + dim);
      to[0] = make_float2(merged.sum[0], merged.sum[1]);
      to[1] = make_float2(merged.sum[2], merged.sum[3]);
      if (dim == 0) {
        mine[head * pitch + value_dim] = merged.top;
        mine[head * pitch + value_dim + 1] = merged.total;
      }
    }
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) parts.ticket = atomicAdd(done + pair, 1);
  __syncthreads();
  if (parts.ticket != splits - 1) return;
  __threadfence();
  if (threadIdx.x == 0) done[pair] = 0;
  const float* all = partial + static_cast<i64>(pair) * gridDim.x * HEADS * pitch;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int head = warp; head < count; head += WARPS) {
    float maxima[MOST_SPLITS / 32], totals[MOST_SPLITS / 32];
    float top = NONE, total = 0.0f;
#pragma unroll
    for (int s = 0; s < MOST_SPLITS / 32; ++s) {
      const int split = s * 32 + lane;
      const float* from = all + (static_cast<i64>(split) * HEADS + head) * pitch + value_dim;
      maxima[s] = split < splits ? __ldcg(from) : NONE;
      totals[s] = split < splits ? __ldcg(from + 1) : 0.0f;
      top = fmaxf(top, maxima[s]);
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
#pragma unroll
    for (int s = 0; s < MOST_SPLITS / 32; ++s) {
      const float weight = weight_of(maxima[s], top);
      parts.weights[head][s * 32 + lane] = weight;
      total += weight * totals[s];
    }
    total = warp_sum(total);
    if (lane == 0) parts.inverse[head] = total > 0.0f ? 1.0f / total : 0.0f;
    if (lse && lane == 0) lse[head] = log_sum(top, total);
  }
  __syncthreads();
  for (int i = 2 * threadIdx.x; i < count * value_dim; i += 2 * THREADS) {
    const int head = i / value_dim, dim = i % value_dim;
    const float* from = all + head * pitch + dim;
    float low = 0.0f, high = 0.0f;
#pragma unroll 8
    for (int s = 0; s < splits; ++s) {
      const float2 x = __ldcg(reinterpret_cast<const float2*>(from + static_cast<i64>(s) * HEADS * pitch));
      const float weight = parts.weights[head][s];
      low += weight * x.x;
      high += weight * x.y;
    }
    out[i] = from_float<T>(low * parts.inverse[head]);
    out[i + 1] = from_float<T>(high * parts.inverse[head]);
  }
}

// bf16 decode on the tensor cores, straight from global memory to registers: tokens are the rows of both products
// (S^T = K Q^T, O^T = V^T P^T), up to 8 query heads of one KV head their columns. A warp takes tiles of 16 tokens;
// block_tokens is a multiple of 16. In the first product it does not matter which dim stands where, as long as
// K and Q agree, so a thread loads 8 neighbours; in the second, which row of the result is which dim.
template <int DIMS>
__device__ void decode_tensor(const bf16* queries, const bf16* cache, Rows rows, bf16* out, float* lse,
                              float* partial, int* done, Shape shape, int split_tokens, float scale) {
  constexpr int STEPS = DIMS / 32, HALVES = DIMS / 64, HEADS = 8;
  __shared__ Parts<HEADS, DIMS> parts;
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.z, length = rows.lengths[row];
  const int splits = active_splits(length, split_tokens);
  if (blockIdx.x >= splits) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  const int ratio = shape.heads / shape.kv_heads, head_tiles = (ratio + HEADS - 1) / HEADS;
  const int kv_head = blockIdx.y / head_tiles, first = blockIdx.y % head_tiles * HEADS;
  const int count = min(HEADS, ratio - first);
  const i64 head = static_cast<i64>(row) * shape.heads + kv_head * ratio + first;
  const int width = shape.width();
  const int* blocks = rows.blocks(row);
  const bf16* keys = cache + kv_head * shape.key_dim;
  const bf16* values = cache + shape.kv_heads * shape.key_dim + kv_head * shape.value_dim;

  const int tiles = (length + 15) / 16, stride = splits * WARPS;
  int tile = blockIdx.x * WARPS + warp;
  auto line_of = [&](int i) { return rows.line(blocks, i * 16); };
  Lane16 k[2][STEPS], v[4][HALVES], q[STEPS];
  auto read_keys = [&](i64 line, int i) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        const int token = h * 8 + group, dim = j * 32 + part * 8;
        k[h][j] = stream16(keys + (line + token) * width + dim, i * 16 + token < length && dim < shape.key_dim);
      }
  };
  i64 line = 0, next_line = 0;
  if (tile < tiles) {
    line = line_of(tile);
    read_keys(line, tile);
  }
#pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    const int dim = j * 32 + part * 8;
    q[j] = stream16(queries + (head + group) * shape.key_dim + dim, group < count && dim < shape.key_dim);
  }
  float sums[HALVES][4][4] = {};
  float top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f};
  for (; tile < tiles; tile += stride) {
    const int next = tile + stride;
    if (next < tiles) next_line = line_of(next);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        const int token = t / 2 * 8 + part * 2 + t % 2, dim = h * 64 + group * 8;
        v[t][h] = stream16(values + (line + token) * width + dim,
                           tile * 16 + token < length && dim < shape.value_dim);
      }
    float s[4] = {};
#pragma unroll
    for (int j = 0; j < STEPS; ++j)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        multiply(s, k[0][j].at[i], k[1][j].at[i], k[0][j].at[i + 1], k[1][j].at[i + 1], q[j].at[i],
                 q[j].at[i + 1]);
    if (next < tiles) read_keys(next_line, next);
    // s[0], s[1]: token `group` and heads 2 * part, 2 * part + 1; s[2], s[3]: token group + 8.
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = tile * 16 + i / 2 * 8 + group < length ? s[i] * scale : NONE;
    float p[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float new_top = fmaxf(top[h], group_max(fmaxf(s[h], s[h + 2])));
      const float fade = weight_of(top[h], new_top);
      p[h] = exp_2(s[h] - new_top);
      p[h + 2] = exp_2(s[h + 2] - new_top);
      total[h] = total[h] * fade + p[h] + p[h + 2];
      top[h] = new_top;
#pragma unroll
      for (int i = 0; i < HALVES; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j][h] *= fade;
          sums[i][j][h + 2] *= fade;
        }
    }
    const u32 p_low = transposed(p[0], p[1]), p_high = transposed(p[2], p[3]);
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        multiply(sums[h][i], __byte_perm(v[0][h].at[i], v[1][h].at[i], 0x5410),
                 __byte_perm(v[0][h].at[i], v[1][h].at[i], 0x7632),
                 __byte_perm(v[2][h].at[i], v[3][h].at[i], 0x5410),
                 __byte_perm(v[2][h].at[i], v[3][h].at[i], 0x7632), p_low, p_high);
    line = next_line;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float whole = group_sum(total[h]);
    if (group == 0) {
      parts.maxima[warp][part * 2 + h] = top[h];
      parts.totals[warp][part * 2 + h] = whole;
    }
#pragma unroll
    for (int i = 0; i < HALVES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int d = 0; d < 2; ++d)
          parts.sums[warp][part * 2 + h][i * 64 + group * 8 + j * 2 + d] = sums[i][j][d * 2 + h];
  }
  finish<bf16>(parts, out + head * shape.value_dim, lse ? lse + head : lse, partial, done, count, shape.value_dim,
               splits);
}

// The same products for dims of 128, with a ring of STAGES tiles of 16 tokens in shared memory for each warp:
// many bytes are under way, and the warps of a block meet only at the end. A tile is the keys, then the values; a
// token's chunks of 16 bytes, 16 in bf16 and 8 in e4m3, stand in an order that depends on the token, so that no banks
// collide. Behind the tiles of e4m3 stand their tokens' scales, the keys' and then the values'. Its chunks are moved by
// the same instructions as pairs of elements, so each product has its dims in an order of its own.
// Where CLUSTER > 1, the grid's x is a cluster of so many blocks; they share a row, whatever its length, and
// merge through each other's shared memory. block_tokens and split_tokens are powers of two.
constexpr int TILE_TOKENS = 16;

// Here, and not only where the value is needed: two such reads are under way together.
__device__ __forceinline__ int read_now(const int* from) {
  int x;
  asm volatile("ld.volatile.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ float4 read_peer(u32 at, int block) {
  float4 x;
  asm volatile("{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %4, %5;\n\t"
               "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n\t}"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(at), "r"(block)
               : "memory");
  return x;
}

// What a block of a cluster found: the sums, then the maximum and the denominator, of each head.
template <int HEADS, int DIMS> struct Whole { alignas(16) float heads[HEADS][DIMS + 4]; };

// Each block writes its share of the outputs of `count` heads.
template <int CLUSTER, int HEADS, int DIMS, int PITCH, int WARPS>
__device__ void finish_cluster(const Parts<HEADS, PITCH, WARPS>& parts, Whole<HEADS, DIMS>& whole, bf16* out,
                               float* lse, int count) {
  constexpr int PACKS = DIMS / 4;
  __syncthreads();
  for (int i = threadIdx.x; i < count * PACKS; i += 32 * WARPS) {
    const int head = i / PACKS, dim = i % PACKS * 4;
    const Merged m = merge_warps(parts, head, dim);
    float4* to = reinterpret_cast<float4*>(&whole.heads[head][dim]);
    *to = make_float4(m.sum[0], m.sum[1], m.sum[2], m.sum[3]);
    if (dim == 0) whole.heads[head][DIMS] = m.top, whole.heads[head][DIMS + 1] = m.total;
  }
  cluster_sync();
  const int share = count * PACKS / CLUSTER;
  for (int i = threadIdx.x; i < share; i += 32 * WARPS) {
    const int pack = blockIdx.x * share + i, head = pack / PACKS, dim = pack % PACKS * 4;
    const u32 from = shared_address(&whole.heads[head][0]);
    float4 ends[CLUSTER], x[CLUSTER];
    Merged m = {{}, NONE, 0.0f};
#pragma unroll
    for (int c = 0; c < CLUSTER; ++c) {
      ends[c] = read_peer(from + DIMS * 4, c);
      x[c] = read_peer(from + dim * 4, c);
      m.top = fmaxf(m.top, ends[c].x);
    }
#pragma unroll
    for (int c = 0; c < CLUSTER; ++c) {
      const float weight = weight_of(ends[c].x, m.top);
      m.sum[0] += weight * x[c].x;
      m.sum[1] += weight * x[c].y;
      m.sum[2] += weight * x[c].z;
      m.sum[3] += weight * x[c].w;
      m.total += weight * ends[c].y;
    }
    if (lse && dim == 0) lse[head] = log_sum(m.top, m.total);
    store_mean(out + pack * 4, m);
  }
  cluster_sync();  // no block leaves before it was read
}

template <typename C, int WARPS, int STAGES, int CLUSTER>
__device__ void decode_ring(const bf16* queries, const C* cache, Rows rows, bf16* out, float* lse, float* partial,
                            int* done, Shape shape, int split_tokens, float scale) {
  constexpr bool IS_E4M3 = sizeof(C) == 1;
  constexpr int DIMS = 128, HEADS = 8, STEPS = DIMS / 16, TOKEN_BYTES = DIMS * sizeof(C);
  constexpr int KEYS_BYTES = TILE_TOKENS * TOKEN_BYTES, TILE_BYTES = 2 * KEYS_BYTES;
  // A token is copied by so many lanes, and so many tokens at once.
  constexpr int LANES = TOKEN_BYTES / 16, AT_ONCE = 32 / LANES, COPIES = 8 / AT_ONCE;
  extern __shared__ __align__(256) unsigned char ring[];
  // Four floats more a head than there are dims: the heads that a warp writes at once lie in banks of their own.
  using Found = Parts<HEADS, DIMS + 4, WARPS>;
  using Ours = Whole<HEADS, DIMS>;
  static_assert(sizeof(Found) + sizeof(Ours) <= WARPS * STAGES * TILE_BYTES, "the ring holds what was found");
  let_next_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  const int chunk = lane % LANES, mine = lane / LANES, eighth = lane / 8, within = lane % 8;
  const u32 begin = shared_address(ring) + warp * STAGES * TILE_BYTES, end = begin + STAGES * TILE_BYTES;
  // Copies go to token AT_ONCE * j + mine; a matrix of 8x8 takes its row `within` from lane 8 * matrix + within.
  u32 copy_to[COPIES];
#pragma unroll
  for (int j = 0; j < COPIES; ++j) {
    const int token = AT_ONCE * j + mine;
    copy_to[j] = token * TOKEN_BYTES + (chunk ^ token) * 16;
  }
  const u32 key_at = (eighth % 2 * 8 + within) * TOKEN_BYTES + (eighth / 2 ^ within) * 16;
  const u32 value_at = KEYS_BYTES + (eighth / 2 * 8 + within) * TOKEN_BYTES + (eighth % 2 ^ within) * 16;
  const int ratio = shape.heads / shape.kv_heads, head_tiles = (ratio + HEADS - 1) / HEADS;
  const int kv_head = blockIdx.y / head_tiles, first = blockIdx.y % head_tiles * HEADS;
  const int count = min(HEADS, ratio - first);
  const int row = blockIdx.z;
  const i64 head = static_cast<i64>(row) * shape.heads + kv_head * ratio + first;
  const int width = shape.width();
  const C* keys = cache + static_cast<i64>(mine) * width + kv_head * DIMS + chunk * (16 / sizeof(C));
  const int values = shape.kv_heads * DIMS;
  const Pages pages{shape.kv_heads, width, rows.block_tokens};
  unsigned char* scales = ring + WARPS * STAGES * TILE_BYTES + warp * STAGES * 2 * TILE_TOKENS;
  wait_for_previous();

  const int length = read_now(rows.lengths + row), slot = read_now(rows.slots + row);
  const int* blocks = rows.tables + static_cast<i64>(slot) * rows.max_blocks;
  const int wanted = (length + split_tokens - 1) >> (31 - __clz(split_tokens));
  const int splits = CLUSTER > 1 ? CLUSTER : max(1, min(static_cast<int>(gridDim.x), wanted));
  if (blockIdx.x >= splits) return;
  const int tiles = (length + TILE_TOKENS - 1) / TILE_TOKENS, stride = splits * WARPS;
  const int first_tile = CLUSTER > 1 ? warp * CLUSTER + blockIdx.x : blockIdx.x * WARPS + warp;
  const int block_shift = 31 - __clz(rows.block_tokens);
  // The cache lines of the warp's next 32 tiles, one a lane, looked up together and long before they are needed.
  auto look_up = [&](int i) {
    const int token = (first_tile + (i + lane) * stride) * TILE_TOKENS;
    if (token >= length) return 0;
    return (blocks[token >> block_shift] << block_shift) + (token & (rows.block_tokens - 1));
  };
  int lines = look_up(0), later_lines = look_up(32);
  auto read = [&](int i, u32 stage) {
    if (i % 32 == 0 && i > 0) {
      lines = later_lines;
      later_lines = look_up(i + 32);
    }
    const int line = __shfl_sync(~0u, lines, i % 32), tile = first_tile + i * stride;
    if (tile < tiles) {
      const int block = line >> block_shift, token = line & (rows.block_tokens - 1);
      const C* from = keys + (IS_E4M3 ? pages.line(block, token) : static_cast<i64>(line) * width);
      const int left = length - tile * TILE_TOKENS - mine;
#pragma unroll
      for (int j = 0; j < TILE_TOKENS / AT_ONCE; ++j) {
        const u32 to = stage + copy_to[j % COPIES] + j / COPIES * 8 * TOKEN_BYTES;
        copy_16(to, from, AT_ONCE * j < left);
        copy_16(to + KEYS_BYTES, from + values, AT_ONCE * j < left);
        from += AT_ONCE * width;
      }
      if (IS_E4M3 && lane < 2) {
        const u32 to = shared_address(scales) + ((stage - begin) / TILE_BYTES * 2 + lane) * TILE_TOKENS;
        copy_16(to, cache + pages.scale(block, token, kv_head, lane), true);
      }
    }
    end_copies();
  };
#pragma unroll
  for (int i = 0; i < STAGES; ++i) read(i, begin + i * TILE_BYTES);
  u32 q[STEPS][2] = {};
  if (group < count) {
    const u32* from = reinterpret_cast<const u32*>(queries + (head + group) * DIMS) + part * (IS_E4M3 ? 2 : 1);
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      q[j][0] = from[j * 8];
      q[j][1] = from[j * 8 + (IS_E4M3 ? 1 : 4)];
    }
  }

  float sums[STEPS][4] = {};
  float top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f};
  u32 stage = begin;
  for (int i = 0, tile = first_tile; tile < tiles; ++i, tile += stride) {
    await_copies<STAGES - 1>();
    __syncwarp();
    float s[4] = {}, t[4] = {};
#pragma unroll
    for (int j = 0; j < STEPS; j += 2) {
      u32 a[4], b[4];
      if constexpr (IS_E4M3) {
        u32 x[4];
        read_matrices(x, (stage + key_at) ^ (j * 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i] = widened<FIRST_TWO>(x[i]), a[i + 2] = widened<LAST_TWO>(x[i]);
          b[i] = widened<FIRST_TWO>(x[i + 2]), b[i + 2] = widened<LAST_TWO>(x[i + 2]);
        }
      } else {
        read_matrices(a, (stage + key_at) ^ (j * 32));
        read_matrices(b, (stage + key_at) ^ (j * 32 + 32));
      }
      multiply(s, a[0], a[1], a[2], a[3], q[j][0], q[j][1]);
      multiply(t, b[0], b[1], b[2], b[3], q[j + 1][0], q[j + 1][1]);
    }
    // Of the keys and values of tokens `group` and group + 8; nothing counts beyond the row's end.
    float key_scales[2] = {1.0f, 1.0f}, value_scales[2] = {1.0f, 1.0f};
    if constexpr (IS_E4M3) {
      const unsigned char* found = scales + (stage - begin) / TILE_BYTES * 2 * TILE_TOKENS + group;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        key_scales[j] = scale_of(found[j * 8]);
        value_scales[j] = tile * TILE_TOKENS + j * 8 + group < length ? scale_of(found[TILE_TOKENS + j * 8]) : 0.0f;
      }
    }
    // s[0], s[1]: token `group` and heads 2 * part, 2 * part + 1; s[2], s[3]: token group + 8.
#pragma unroll
    for (int j = 0; j < 4; ++j)
      s[j] = tile * TILE_TOKENS + j / 2 * 8 + group < length ? (s[j] + t[j]) * scale * key_scales[j / 2] : NONE;
    float p[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float new_top = fmaxf(top[h], group_max(fmaxf(s[h], s[h + 2])));
      const float fade = weight_of(top[h], new_top);
      p[h] = exp_2(s[h] - new_top);
      p[h + 2] = exp_2(s[h + 2] - new_top);
      total[h] = total[h] * fade + p[h] + p[h + 2];
      top[h] = new_top;
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        sums[j][h] *= fade;
        sums[j][h + 2] *= fade;
      }
    }
    const u32 p_low = transposed(p[0] * value_scales[0], p[1] * value_scales[0]);
    const u32 p_high = transposed(p[2] * value_scales[1], p[3] * value_scales[1]);
#pragma unroll
    for (int j = 0; j < STEPS; j += IS_E4M3 ? 2 : 1) {
      u32 v[4];
      read_transposed(v, (stage + value_at) ^ (j * (IS_E4M3 ? 16 : 32)));
      if constexpr (IS_E4M3) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          multiply(sums[j + i], widened<EVEN_TWO>(v[i]), widened<ODD_TWO>(v[i]), widened<EVEN_TWO>(v[i + 2]),
                   widened<ODD_TWO>(v[i + 2]), p_low, p_high);
      } else {
        multiply(sums[j], v[0], v[1], v[2], v[3], p_low, p_high);
      }
    }
    __syncwarp();
    read(i + STAGES, stage);
    stage = stage + TILE_BYTES == end ? begin : stage + TILE_BYTES;
  }
  // sums[j][h], sums[j][h + 2]: dims 16 * j + group and 8 more, or 16 * j + 2 * group and 1 more; head 2 * part + h.
  __syncthreads();
  Found& parts = *reinterpret_cast<Found*>(ring);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float whole = group_sum(total[h]);
    if (group == 0) {
      parts.maxima[warp][part * 2 + h] = top[h];
      parts.totals[warp][part * 2 + h] = whole;
    }
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      float* to = &parts.sums[warp][part * 2 + h][j * 16 + (IS_E4M3 ? 2 * group : group)];
      to[0] = sums[j][h];
      to[IS_E4M3 ? 1 : 8] = sums[j][h + 2];
    }
  }
  if (lse) lse += head;
  if constexpr (CLUSTER > 1)
    finish_cluster<CLUSTER>(parts, *reinterpret_cast<Ours*>(ring + sizeof(Found)), out + head * DIMS, lse, count);
  else
    finish<bf16>(parts, out + head * DIMS, lse, partial, done, count, DIMS, splits);
}

// A token's line of the cache, eight neighbouring elements of a head at a time.
template <typename C> struct Line {
  const C* elements;
  Shape shape;

  __device__ Line(const C* cache, const Rows& rows, const int* blocks, int token, const Shape& shape)
      : elements(cache + rows.line(blocks, token) * shape.width()), shape(shape) {}
  __device__ void key(int head, int dim, float (&x)[8]) const {
    load<C, 8>(elements + head * shape.key_dim + dim, x);
  }
  __device__ void value(int head, int dim, float (&x)[8]) const {
    load<C, 8>(elements + shape.kv_heads * shape.key_dim + head * shape.value_dim + dim, x);
  }
};

template <> struct Line<e4m3> {
  const e4m3* cache;
  Pages pages;
  Shape shape;
  int block, token;

  __device__ Line(const e4m3* cache, const Rows& rows, const int* blocks, int token, const Shape& shape)
      : cache(cache), pages{shape.kv_heads, shape.width(), rows.block_tokens}, shape(shape),
        block(blocks[token / rows.block_tokens]), token(token % rows.block_tokens) {}
  __device__ void key(int head, int dim, float (&x)[8]) const { read(head, 0, head * shape.key_dim + dim, x); }
  __device__ void value(int head, int dim, float (&x)[8]) const {
    read(head, 1, shape.kv_heads * shape.key_dim + head * shape.value_dim + dim, x);
  }
  __device__ void read(int head, int part, int at, float (&x)[8]) const {
    const float scale = scale_of(cache[pages.scale(block, token, head, part)].bits);
    const Pack<e4m3, 8> codes = *reinterpret_cast<const Pack<e4m3, 8>*>(cache + pages.line(block, token) + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 code = codes.at[i].bits;
      // The exponent in a float's place is 120 too small.
      x[i] = __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f * scale;
    }
  }
};

// Decode on the CUDA cores, for float32 and for what the tensor cores' kernel does not take. `lanes` lanes, a
// power of two, hold a token's dims, 8 each; each such group of lanes goes its own way over the tokens.
template <typename T, typename C>
__device__ void decode_vector(const T* queries, const C* cache, Rows rows, T* out, float* lse, float* partial,
                              int* done, Shape shape, int split_tokens, float scale, int lanes) {
  constexpr int HEADS = 4, AHEAD = 4;
  __shared__ Parts<HEADS, 256> parts;
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.z, length = rows.lengths[row];
  const int splits = active_splits(length, split_tokens);
  if (blockIdx.x >= splits) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = lane % lanes * 8;
  const int ratio = shape.heads / shape.kv_heads, head_tiles = (ratio + HEADS - 1) / HEADS;
  const int kv_head = blockIdx.y / head_tiles, first = blockIdx.y % head_tiles * HEADS;
  const int count = min(HEADS, ratio - first);
  const i64 head = static_cast<i64>(row) * shape.heads + kv_head * ratio + first;
  const int* blocks = rows.blocks(row);
  const bool has_key = dim < shape.key_dim, has_value = dim < shape.value_dim;

  float q[HEADS][8] = {}, sums[HEADS][8] = {}, top[HEADS], total[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    top[h] = NONE;
    total[h] = 0.0f;
    if (h < count && has_key) load<T, 8>(queries + (head + h) * shape.key_dim + dim, q[h]);
#pragma unroll
    for (int i = 0; i < 8; ++i) q[h][i] *= scale;
  }
  const int groups = 32 / lanes, warp_first = (blockIdx.x * WARPS + warp) * groups;
  const int stride = splits * WARPS * groups;
  for (int base = warp_first; base < length; base += AHEAD * stride) {
    float k[AHEAD][8] = {}, v[AHEAD][8] = {};
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int token = base + lane / lanes + a * stride;
      if (token < length) {
        const Line<C> line(cache, rows, blocks, token, shape);
        if (has_key) line.key(kv_head, dim, k[a]);
        if (has_value) line.value(kv_head, dim, v[a]);
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float s[AHEAD];
      float new_top = top[h];
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) dot += q[h][i] * k[a][i];
        for (int step = lanes / 2; step; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
        s[a] = base + lane / lanes + a * stride < length ? dot : NONE;
        new_top = fmaxf(new_top, s[a]);
      }
      const float fade = weight_of(top[h], new_top);
      total[h] *= fade;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] *= fade;
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        const float p = weight_of(s[a], new_top);
        total[h] += p;
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[h][i] += p * v[a][i];
      }
      top[h] = new_top;
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    for (int step = lanes; step < 32; step <<= 1) {
      const float other = __shfl_xor_sync(~0u, top[h], step), new_top = fmaxf(top[h], other);
      const float fade = weight_of(top[h], new_top), add = weight_of(other, new_top);
      total[h] = total[h] * fade + __shfl_xor_sync(~0u, total[h], step) * add;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] = sums[h][i] * fade + __shfl_xor_sync(~0u, sums[h][i], step) * add;
      top[h] = new_top;
    }
    if (lane == 0) {
      parts.maxima[warp][h] = top[h];
      parts.totals[warp][h] = total[h];
    }
    if (lane < lanes)
#pragma unroll
      for (int i = 0; i < 8; ++i) parts.sums[warp][h][dim + i] = sums[h][i];
  }
  finish<T>(parts, out + head * shape.value_dim, lse ? lse + head : lse, partial, done, count, shape.value_dim,
            splits);
}

// Rows of any number of query tokens: a block takes 32 of one row's for one head, and 32 keys at a time.
// Grid: (tiles of all rows, heads). Query tokens of row r are starts[r] .. starts[r + 1] - 1, less starts[0].
constexpr int TILE = 32;

__device__ __forceinline__ void fill(float* to, int pitch, const float (&x)[8], int token, int i) {
#pragma unroll
  for (int k = 0; k < 8; k += 4)
    *reinterpret_cast<float4*>(to + token * pitch + i + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
}

template <typename T, typename C, int DIMS>
__device__ void prefill(const T* queries, const C* cache, Rows rows, const int* starts, T* out, Shape shape,
                        int num_rows, float scale) {
  extern __shared__ float4 shared[];
  const int key_pitch = shape.key_dim + 4, value_pitch = shape.value_dim + 4;
  float* q = reinterpret_cast<float*>(shared);
  float* k = q + TILE * key_pitch;
  float* v = k + TILE * key_pitch;
  __shared__ float p[TILE][TILE + 1];
  let_next_start();
  wait_for_previous();

  // Which row this tile belongs to: every warp looks for itself, 32 rows at a time.
  const int lane = threadIdx.x % 32;
  int row = 0, tile = blockIdx.x;
  for (int base = 0; base < num_rows; base += 32) {
    const int mine = base + lane;
    const int tiles = mine < num_rows ? (starts[mine + 1] - starts[mine] + TILE - 1) / TILE : 0;
    int upto = tiles;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int before = __shfl_up_sync(~0u, upto, step);
      if (lane >= step) upto += before;
    }
    const u32 holders = __ballot_sync(~0u, tile < upto);
    if (holders) {
      const int holder = __ffs(holders) - 1;
      row = base + holder;
      tile -= __shfl_sync(~0u, upto - tiles, holder);
      break;
    }
    tile -= __shfl_sync(~0u, upto, 31);
  }
  const int begin = starts[row], tokens = starts[row + 1] - begin, length = rows.lengths[row];
  const i64 first = begin - starts[0] + tile * TILE;
  const int here = min(TILE, tokens - tile * TILE);
  const int head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads);
  const int* blocks = rows.blocks(row);

  const int key_chunks = shape.key_dim / 8, value_chunks = shape.value_dim / 8;
  for (int c = threadIdx.x; c < TILE * key_chunks; c += THREADS) {
    const int token = c / key_chunks, i = c % key_chunks * 8;
    float x[8] = {};
    if (token < here) load<T, 8>(queries + ((first + token) * shape.heads + head) * shape.key_dim + i, x);
    fill(q, key_pitch, x, token, i);
  }
  const int query = threadIdx.x / 4, part = threadIdx.x % 4;
  const int position = length - tokens + tile * TILE + query;
  const int end = min(length, length - tokens + tile * TILE + here);
  float4 sums[DIMS / 16];
#pragma unroll
  for (int i = 0; i < DIMS / 16; ++i) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float top = NONE, total = 0.0f;
  for (int base = 0; base < end; base += TILE) {
    __syncthreads();
    for (int c = threadIdx.x; c < TILE * key_chunks; c += THREADS) {
      const int token = c / key_chunks, i = c % key_chunks * 8;
      float x[8] = {};
      if (base + token < end) Line<C>(cache, rows, blocks, base + token, shape).key(kv_head, i, x);
      fill(k, key_pitch, x, token, i);
    }
    for (int c = threadIdx.x; c < TILE * value_chunks; c += THREADS) {
      const int token = c / value_chunks, i = c % value_chunks * 8;
      float x[8] = {};
      if (base + token < end) Line<C>(cache, rows, blocks, base + token, shape).value(kv_head, i, x);
      fill(v, value_pitch, x, token, i);
    }
    __syncthreads();
    float s[TILE / 4] = {};
    for (int i = 0; i < shape.key_dim; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(q + query * key_pitch + i);
#pragma unroll
      for (int j = 0; j < TILE / 4; ++j) {
        const float4 y = *reinterpret_cast<const float4*>(k + (j * 4 + part) * key_pitch + i);
        s[j] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
      }
    }
    float new_top = top;
#pragma unroll
    for (int j = 0; j < TILE / 4; ++j) {
      s[j] = base + j * 4 + part <= position ? s[j] * scale : NONE;
      new_top = fmaxf(new_top, s[j]);
    }
    new_top = fmaxf(new_top, __shfl_xor_sync(~0u, new_top, 1));
    new_top = fmaxf(new_top, __shfl_xor_sync(~0u, new_top, 2));
    const float fade = weight_of(top, new_top);
    total *= fade;
#pragma unroll
    for (int j = 0; j < TILE / 4; ++j) {
      const float x = weight_of(s[j], new_top);
      total += x;
      p[query][j * 4 + part] = x;
    }
    top = new_top;
#pragma unroll
    for (int i = 0; i < DIMS / 16; ++i) {
      sums[i].x *= fade;
      sums[i].y *= fade;
      sums[i].z *= fade;
      sums[i].w *= fade;
    }
    __syncwarp();
    for (int j = 0; j < TILE; ++j) {
      const float x = p[query][j];
#pragma unroll
      for (int i = 0; i < DIMS / 16; ++i)
        if (i * 16 + part * 4 < shape.value_dim) {
          const float4 y = *reinterpret_cast<const float4*>(v + j * value_pitch + i * 16 + part * 4);
          sums[i].x += x * y.x;
          sums[i].y += x * y.y;
          sums[i].z += x * y.z;
          sums[i].w += x * y.w;
        }
    }
  }
  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  if (query >= here) return;
  const float inverse = 1.0f / total;
  T* to = out + ((first + query) * shape.heads + head) * shape.value_dim;
#pragma unroll
  for (int i = 0; i < DIMS / 16; ++i)
    if (i * 16 + part * 4 < shape.value_dim) {
      const float x[4] = {sums[i].x * inverse, sums[i].y * inverse, sums[i].z * inverse, sums[i].w * inverse};
      store<T, 4>(to + i * 16 + part * 4, x);
    }
}

// The block ids that rows need, one row after another: at starts[row], or a line of max_blocks each.
extern "C" __global__ void __launch_bounds__(128) gather_blocks(const int* tables, const int* slots,
                                                                const int* lengths, const int* starts, int* out,
                                                                int max_blocks, int block_tokens) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x;
  const int count = min(max_blocks, (lengths[row] + block_tokens - 1) / block_tokens);
  const int* from = tables + static_cast<i64>(slots[row]) * max_blocks;
  int* to = out + (starts ? static_cast<i64>(starts[row]) : static_cast<i64>(row) * max_blocks);
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// Pages of an e4m3 cache in bf16, which holds them exactly: page i of `out` is block blocks[i]. Grid: (pages, pieces
// of a page); a thread takes eight elements.
extern "C" __global__ void __launch_bounds__(256) expand_pages(const e4m3* cache, const int* blocks, bf16* out,
                                                               int kv_heads, int key_dim, int value_dim,
                                                               int block_tokens) {
  let_next_start();
  wait_for_previous();
  const Shape shape{kv_heads, kv_heads, key_dim, value_dim};
  const int width = shape.width(), item = blockIdx.y * blockDim.x + threadIdx.x;
  if (item >= block_tokens * (width / 8)) return;
  const int token = item / (width / 8), at = item % (width / 8) * 8, keys = kv_heads * key_dim;
  const Line<e4m3> line(cache, Rows{blocks + blockIdx.x, nullptr, nullptr, 0, block_tokens}, blocks + blockIdx.x,
                        token, shape);
  float x[8];
  if (at < keys)
    line.key(at / key_dim, at % key_dim, x);
  else
    line.value((at - keys) / value_dim, (at - keys) % value_dim, x);
  store<bf16, 8>(out + (static_cast<i64>(blockIdx.x) * block_tokens + token) * width + at, x);
}

#define ROWS const int *tables, const int *slots, const int *lengths, int max_blocks, int block_tokens
#define SHAPE int heads, int kv_heads, int key_dim, int value_dim
#define TENSOR(DIMS, BLOCKS)                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode_tensor_##DIMS(                         \
      const bf16* queries, const bf16* cache, ROWS, bf16* out, float* lse, float* partial, int* done, SHAPE,  \
      int split_tokens, float scale) {                                                                        \
    decode_tensor<DIMS>(queries, cache, Rows{tables, slots, lengths, max_blocks, block_tokens}, out, lse,     \
                        partial, done, Shape{heads, kv_heads, key_dim, value_dim}, split_tokens, scale);      \
  }
TENSOR(64, 4)
TENSOR(128, 3)
TENSOR(256, 2)

#define RING(NAME, C, WARPS, STAGES, BLOCKS, CLUSTER, ATTRIBUTE)                                              \
  extern "C" __global__ void ATTRIBUTE __launch_bounds__(32 * WARPS, BLOCKS) decode_ring_##NAME(               \
      const bf16* queries, const C* cache, ROWS, bf16* out, float* lse, float* partial, int* done, SHAPE,      \
      int split_tokens, float scale) {                                                                         \
    decode_ring<C, WARPS, STAGES, CLUSTER>(                                                                    \
        queries, cache, Rows{tables, slots, lengths, max_blocks, block_tokens}, out, lse, partial, done,       \
        Shape{heads, kv_heads, key_dim, value_dim}, split_tokens, scale);                                      \
  }
RING(2x3, bf16, 2, 3, 4, 1, )
RING(4x2, bf16, 4, 2, 3, 1, )
RING(8x2, bf16, 8, 2, 1, 1, )
RING(8x2_by_2, bf16, 8, 2, 1, 2, __cluster_dims__(2, 1, 1))
RING(2x6_e4m3, e4m3, 2, 6, 4, 1, )
RING(4x4_e4m3, e4m3, 4, 4, 3, 1, )
RING(8x4_e4m3, e4m3, 8, 4, 1, 1, )
RING(8x4_by_2_e4m3, e4m3, 8, 4, 1, 2, __cluster_dims__(2, 1, 1))

#define VECTOR(NAME, T, C)                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS) decode_vector_##NAME(                                  \
      const T* queries, const C* cache, ROWS, T* out, float* lse, float* partial, int* done, SHAPE,            \
      int split_tokens, float scale, int lanes) {                                                              \
    decode_vector<T, C>(queries, cache, Rows{tables, slots, lengths, max_blocks, block_tokens}, out, lse,      \
                        partial, done, Shape{heads, kv_heads, key_dim, value_dim}, split_tokens, scale, lanes); \
  }
VECTOR(bf16, bf16, bf16)
VECTOR(f32, float, float)
VECTOR(bf16_e4m3, bf16, e4m3)
VECTOR(f32_e4m3, float, e4m3)

#define PREFILL(NAME, T, C, DIMS)                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS) prefill_##NAME##_##DIMS(                            \
      const T* queries, const C* cache, ROWS, const int* starts, T* out, SHAPE, int num_rows,               \
      float scale) {                                                                                        \
    prefill<T, C, DIMS>(queries, cache, Rows{tables, slots, lengths, max_blocks, block_tokens}, starts,     \
                        out, Shape{heads, kv_heads, key_dim, value_dim}, num_rows, scale);                  \
  }
#define PREFILLS(NAME, T, C) PREFILL(NAME, T, C, 64) PREFILL(NAME, T, C, 128) PREFILL(NAME, T, C, 256)
PREFILLS(bf16, bf16, bf16)
PREFILLS(f32, float, float)
PREFILLS(bf16_e4m3, bf16, e4m3)
PREFILLS(f32_e4m3, float, e4m3)
