// Attention over a paged cache of latents, in its absorbed form: all heads attend to the lines themselves, as to one
// KV head whose keys are lines and whose values are their latents. A query is the first `latent` features of
// `absorbed` [tokens, heads, absorbed_dim] and the last `rope` of `queries` [tokens, heads, query_dim], which may be
// one tensor. Softmax is in base 2, sums are float32, and everything is added in a fixed order.
//
// Grid: (splits, head tiles, query tokens). How far a token's context is split follows from its length, read here,
// so a captured graph stays right as rows grow. Where the grid has splits, a token that is split leaves its parts
// in `partial`, and `merge_splits` makes them one.
constexpr int WARPS = 4, THREADS = 32 * WARPS, MOST_SPLITS = 128;

// Query token t is the only one of row t or, where there are `starts` [num_rows + 1], of the row whose tokens
// starts[row] .. starts[row + 1] - 1, less starts[0], it is among; they are the last ones of lengths[row].
struct Rows {
  const int *tables, *slots, *lengths, *starts;
  int num_rows, max_blocks, block_tokens;
};

struct Context { int slot, length; };

__device__ __forceinline__ Context context_of(const Rows& rows, int token) {
  if (!rows.starts) return Context{rows.slots[token], rows.lengths[token]};
  // Every warp looks for itself, 32 rows at a time.
  const int lane = threadIdx.x % 32, first = rows.starts[0];
  int row = 0;
  for (int base = 0; base < rows.num_rows; base += 32) {
    const int mine = base + lane;
    const u32 holders = __ballot_sync(~0u, mine < rows.num_rows && rows.starts[mine + 1] - first > token);
    if (holders) {
      row = base + __ffs(holders) - 1;
      break;
    }
  }
  return Context{rows.slots[row], rows.lengths[row] - (rows.starts[row + 1] - first - 1 - token)};
}

__device__ __forceinline__ int active_splits(int length, int splits, int split_tokens) {
  return max(1, min(splits, (length + split_tokens - 1) / split_tokens));
}

// A page of a float8 cache: a scale of each of its tokens, then their lines.
__device__ __forceinline__ i64 page_bytes(int block_tokens, int width) {
  return static_cast<i64>(block_tokens) * (width + 1);
}

// A part in `partial`: [token][split][head][latent + 2], the sums of a head, its maximum, its denominator.
__device__ __forceinline__ i64 part_at(int token, int splits, int split, int heads, int head, int latent) {
  return ((static_cast<i64>(token) * splits + split) * heads + head) * (latent + 2);
}

// bf16 queries on the tensor cores, with lines of 512 + 64 elements in bf16 or e4m3; block_tokens is a power of two
// from 16 on. Both products have tokens or dims as their rows (S^T = K Q^T, O^T = V^T P^T) and 8 heads as columns,
// HEAD_TILES of them. A block goes through tiles of 64 tokens, each read once from memory, for keys and for
// values: in the first product each warp has 16 of the tokens, in the second 128 of the dims. Shared memory: STAGES
// tiles; the e4m3 tiles' scales; the queries; the probabilities; each warp's maxima. Chunks of 16 bytes stand in
// an order that depends on their row, so that no banks collide.
constexpr int LATENT = 512, ROPE = 64, LINE = LATENT + ROPE, TILE = 64;

template <typename C, int HEAD_TILES, int STAGES>
__device__ void latent_tensor(const bf16* absorbed, const bf16* queries, const C* cache, Rows rows, bf16* out,
                              float* lse, float* partial, int heads, int absorbed_dim, int query_dim,
                              int split_tokens, float scale) {
  constexpr bool IS_E4M3 = sizeof(C) == 1;
  constexpr int HEADS = 8 * HEAD_TILES, LINE_BYTES = LINE * sizeof(C), TILE_BYTES = TILE * LINE_BYTES;
  constexpr int QUERY_BYTES = LINE * 2, STEPS = LINE / 32, PITCH = LATENT + 4;
  // A line is copied by so many lanes, each nine chunks of it, and so many lines at once.
  constexpr int LANES = LINE_BYTES / 16 / 9, AT_ONCE = THREADS / LANES, COPIES = TILE / AT_ONCE;
  extern __shared__ __align__(256) unsigned char ring[];
  unsigned char* scales = ring + STAGES * TILE_BYTES;
  unsigned char* asked = scales + (IS_E4M3 ? STAGES * TILE : 0);
  unsigned char* weights = asked + HEADS * QUERY_BYTES;
  float(*maxima)[HEADS] = reinterpret_cast<float(*)[HEADS]>(weights + HEADS * TILE * 2);
  static_assert((HEADS * PITCH + 2 * HEADS) * 4 <= STAGES * TILE_BYTES, "the ring holds what was found");
  let_next_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  const int eighth = lane / 8, within = lane % 8;
  const int token = blockIdx.z, first = blockIdx.y * HEADS, count = min(HEADS, heads - first);
  const u32 begin = shared_address(ring), end = begin + STAGES * TILE_BYTES;
  const u32 asked_at = shared_address(asked), weights_at = shared_address(weights);
  // Where a chunk of a line of row `row` of a tile stands: its low bits are turned by this.
  auto turned = [](int row) { return IS_E4M3 ? row / 2 % 4 : row % 8; };
  const int mine = threadIdx.x / LANES, chunk = threadIdx.x % LANES;
  const u32 copy_to = mine * LINE_BYTES + (chunk ^ turned(mine)) * 16;
  // A matrix of 8x8 takes its row `within` from lane 8 * matrix + within.
  const u32 key_at = (warp * 16 + eighth % 2 * 8 + within) * LINE_BYTES + (eighth / 2 ^ turned(within)) * 16;
  const u32 value_at = (eighth / 2 * 8 + within) * LINE_BYTES + (eighth % 2 ^ turned(within)) * 16;
  const u32 query_at = asked_at + within * QUERY_BYTES + (eighth ^ within) * 16;
  wait_for_previous();

  const Context context = context_of(rows, token);
  const int length = context.length, splits = active_splits(length, gridDim.x, split_tokens);
  if (blockIdx.x >= splits) return;
  const int* blocks = rows.tables + static_cast<i64>(context.slot) * rows.max_blocks;
  const int shift = 31 - __clz(rows.block_tokens), inside = rows.block_tokens - 1;
  const int tiles = (length + TILE - 1) / TILE;

  // The blocks that this thread's lines of a tile are in, looked up before they are needed.
  int found[COPIES], found_scales = 0;
  auto look_up = [&](int tile) {
#pragma unroll
    for (int j = 0; j < COPIES; ++j) {
      const int at = tile * TILE + j * AT_ONCE + mine;
      found[j] = at < length ? blocks[at >> shift] : 0;
    }
    if (IS_E4M3 && threadIdx.x < TILE / 16) {
      const int at = tile * TILE + threadIdx.x * 16;
      found_scales = at < length ? blocks[at >> shift] : 0;
    }
  };
  auto read = [&](int tile, u32 stage) {
    if (tile < tiles) {
#pragma unroll
      for (int j = 0; j < COPIES; ++j) {
        const int at = tile * TILE + j * AT_ONCE + mine;
        const C* from = cache + chunk * (16 / sizeof(C));
        if (IS_E4M3)
          from += found[j] * page_bytes(rows.block_tokens, LINE) + rows.block_tokens + (at & inside) * LINE;
        else
          from += ((static_cast<i64>(found[j]) << shift) + (at & inside)) * LINE;
#pragma unroll
        for (int k = 0; k < 9; ++k) {
          const u32 to = stage + copy_to + j * AT_ONCE * LINE_BYTES + k * LANES * 16;
          copy_16(to, from + k * LANES * (16 / sizeof(C)), at < length);
        }
      }
      if (IS_E4M3 && threadIdx.x < TILE / 16) {
        const int at = tile * TILE + threadIdx.x * 16;
        const u32 to = shared_address(scales) + (stage - begin) / TILE_BYTES * TILE + threadIdx.x * 16;
        copy_16(to, cache + found_scales * page_bytes(rows.block_tokens, LINE) + (at & inside), at < length);
      }
    }
    end_copies();
  };
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    const int tile = blockIdx.x + i * splits;
    look_up(tile);
    read(tile, begin + i * TILE_BYTES);
  }
  // The queries' features stand as the first product takes them: with e4m3 lines, four neighbours go to one thread,
  // two of them as a step's low half and two as its high half.
  for (int i = threadIdx.x; i < HEADS * (LINE / 2); i += THREADS) {
    const int head = i / (LINE / 2), pair = i % (LINE / 2), dim = pair * 2;
    u32 x = 0;
    if (head < count) {
      const i64 line = static_cast<i64>(token) * heads + first + head;
      const bf16* from = absorbed + line * absorbed_dim + dim;
      if (dim >= LATENT) from = queries + line * query_dim + query_dim - LINE + dim;
      x = *reinterpret_cast<const u32*>(from);
    }
    const int half = IS_E4M3 ? pair % 2 : pair % 8 / 4, place = IS_E4M3 ? pair % 8 / 2 : pair % 4;
    const int to = pair / 8 * 2 + half;
    *reinterpret_cast<u32*>(asked + head * QUERY_BYTES + (to ^ head % 8) * 16 + place * 4) = x;
  }

  float sums[8][HEAD_TILES][4] = {};
  float top[HEAD_TILES][2], total[HEAD_TILES][2];
#pragma unroll
  for (int n = 0; n < HEAD_TILES; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) top[n][h] = NONE, total[n][h] = 0.0f;
  u32 stage = begin;
  for (int tile = blockIdx.x; tile < tiles; tile += splits) {
    const int next = tile + STAGES * splits;
    look_up(next);
    await_copies<STAGES - 1>();
    __syncthreads();
    float s[HEAD_TILES][2][4] = {};
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      u32 a[4], b[4];
      if constexpr (IS_E4M3) {
        u32 x[4];
        read_matrices(x, ((stage + key_at) ^ (j % 2 * 32)) + j / 2 * 64);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i] = widened<FIRST_TWO>(x[i]), a[i + 2] = widened<LAST_TWO>(x[i]);
          b[i] = widened<FIRST_TWO>(x[i + 2]), b[i + 2] = widened<LAST_TWO>(x[i + 2]);
        }
      } else {
        read_matrices(a, ((stage + key_at) ^ (j % 2 * 64)) + j / 2 * 128);
        read_matrices(b, ((stage + key_at) ^ (j % 2 * 64 + 32)) + j / 2 * 128);
      }
#pragma unroll
      for (int n = 0; n < HEAD_TILES; ++n) {
        u32 q[4];
        read_matrices(q, ((query_at + n * 8 * QUERY_BYTES) ^ (j % 2 * 64)) + j / 2 * 128);
        multiply(s[n][0], a[0], a[1], a[2], a[3], q[0], q[1]);
        multiply(s[n][1], b[0], b[1], b[2], b[3], q[2], q[3]);
      }
    }
    // Of tokens `group` and group + 8 of the warp's; nothing counts beyond the context's end.
    float scaled[2] = {1.0f, 1.0f};
    bool is_seen[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = warp * 16 + j * 8 + group;
      is_seen[j] = tile * TILE + at < length;
      if (IS_E4M3) scaled[j] = is_seen[j] ? scale_of(scales[(stage - begin) / TILE_BYTES * TILE + at]) : 0.0f;
    }
    // s[n][0][0], [1]: token `group` and heads 8 * n + 2 * part, + 1; [2], [3]: token group + 8.
#pragma unroll
    for (int n = 0; n < HEAD_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[n][0][i] = is_seen[i / 2] ? (s[n][0][i] + s[n][1][i]) * scale * scaled[i / 2] : NONE;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float most = group_max(fmaxf(s[n][0][h], s[n][0][h + 2]));
        if (group == 0) maxima[warp][n * 8 + part * 2 + h] = most;
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < HEAD_TILES; ++n) {
      float p[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float new_top = top[n][h];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) new_top = fmaxf(new_top, maxima[w][n * 8 + part * 2 + h]);
        const float fade = weight_of(top[n][h], new_top);
        p[h] = exp_2(s[n][0][h] - new_top);
        p[h + 2] = exp_2(s[n][0][h + 2] - new_top);
        total[n][h] = total[n][h] * fade + p[h] + p[h + 2];
        top[n][h] = new_top;
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          sums[m][n][h] *= fade;
          sums[m][n][h + 2] *= fade;
        }
      }
      // Head 8 * n + group; tokens 2 * part, + 1 of the warp's lower and upper 8.
      unsigned char* to = weights + (n * 8 + group) * TILE * 2 + part * 4;
      const u32 low = transposed(p[0] * scaled[0], p[1] * scaled[0]);
      const u32 high = transposed(p[2] * scaled[1], p[3] * scaled[1]);
      *reinterpret_cast<u32*>(to + (warp * 2 ^ group) * 16) = low;
      *reinterpret_cast<u32*>(to + ((warp * 2 + 1) ^ group) * 16) = high;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < TILE / 32; ++k) {
      u32 p[HEAD_TILES][4];
#pragma unroll
      for (int n = 0; n < HEAD_TILES; ++n)
        read_matrices(p[n], weights_at + (n * 8 + within) * TILE * 2 + ((k * 4 + eighth) ^ within) * 16);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const u32 values = stage + value_at + (k * 2 + t) * 16 * LINE_BYTES + warp * 128 * sizeof(C);
#pragma unroll
        for (int m = 0; m < 8; m += IS_E4M3 ? 2 : 1) {
          u32 v[4];
          if constexpr (IS_E4M3) {
            read_transposed(v, (values ^ (m % 4 * 16)) + m / 4 * 64);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const u32 a0 = widened<EVEN_TWO>(v[i]), a1 = widened<ODD_TWO>(v[i]);
              const u32 a2 = widened<EVEN_TWO>(v[i + 2]), a3 = widened<ODD_TWO>(v[i + 2]);
#pragma unroll
              for (int n = 0; n < HEAD_TILES; ++n)
                multiply(sums[m + i][n], a0, a1, a2, a3, p[n][t * 2], p[n][t * 2 + 1]);
            }
          } else {
            read_transposed(v, (values ^ (m % 4 * 32)) + m / 4 * 128);
#pragma unroll
            for (int n = 0; n < HEAD_TILES; ++n)
              multiply(sums[m][n], v[0], v[1], v[2], v[3], p[n][t * 2], p[n][t * 2 + 1]);
          }
        }
      }
    }
    __syncthreads();
    read(next, stage);
    stage = stage + TILE_BYTES == end ? begin : stage + TILE_BYTES;
  }
  // sums[m][n][h], [h + 2]: of the warp's dims 16 * m + group and 8 more, or 16 * m + 2 * group and 1 more; head
  // 8 * n + 2 * part + h.
  await_copies<0>();
  float* whole = reinterpret_cast<float*>(ring);
  float(*totals)[HEADS] = reinterpret_cast<float(*)[HEADS]>(whole + HEADS * PITCH);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < HEAD_TILES; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = n * 8 + part * 2 + h;
      const float own = group_sum(total[n][h]);
      if (group == 0) maxima[warp][head] = own;
      if (group == 0 && warp == 0) totals[0][head] = top[n][h];
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        float* to = whole + head * PITCH + warp * 128 + m * 16 + (IS_E4M3 ? 2 * group : group);
        to[0] = sums[m][n][h];
        to[IS_E4M3 ? 1 : 8] = sums[m][n][h + 2];
      }
    }
  __syncthreads();
  for (int i = threadIdx.x; i < count * (LATENT / 4); i += THREADS) {
    const int head = i / (LATENT / 4), dim = i % (LATENT / 4) * 4;
    const float4 x = *reinterpret_cast<const float4*>(whole + head * PITCH + dim);
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all += maxima[w][head];
    if (splits == 1) {
      const float inverse = all > 0.0f ? 1.0f / all : 0.0f;
      const float mean[4] = {x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse};
      const i64 line = static_cast<i64>(token) * heads + first + head;
      store<bf16, 4>(out + line * LATENT + dim, mean);
      if (lse && dim == 0) lse[line] = log_sum(totals[0][head], all);
    } else {
      // The pitch is even, so two values are eight aligned bytes.
      float* to = partial + part_at(token, gridDim.x, blockIdx.x, heads, first + head, LATENT);
      reinterpret_cast<float2*>(to + dim)[0] = make_float2(x.x, x.y);
      reinterpret_cast<float2*>(to + dim)[1] = make_float2(x.z, x.w);
      if (dim == 0) to[LATENT] = totals[0][head], to[LATENT + 1] = all;
    }
  }
}

// The same on the CUDA cores: float32, and every shape up to 640 elements a line. A block for a head of a token.
__device__ __forceinline__ float element(const float* line, int i, float) { return line[i]; }
__device__ __forceinline__ float element(const bf16* line, int i, float) { return to_float(line[i]); }
__device__ __forceinline__ float element(const e4m3* line, int i, float scale) {
  const u32 code = line[i].bits;
  // The exponent in a float's place is 120 too small.
  return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f * scale;
}

template <typename C>
__device__ __forceinline__ const C* line_of(const C* cache, const Rows& rows, int block, int within, int width,
                                            float& scale) {
  scale = 1.0f;
  return cache + (static_cast<i64>(block) * rows.block_tokens + within) * width;
}
template <>
__device__ __forceinline__ const e4m3* line_of(const e4m3* cache, const Rows& rows, int block, int within, int width,
                                               float& scale) {
  const e4m3* page = cache + block * page_bytes(rows.block_tokens, width);
  scale = scale_of(page[within].bits);
  return page + rows.block_tokens + within * width;
}

template <typename T, typename C>
__device__ void latent_vector(const T* absorbed, const T* queries, const C* cache, Rows rows, T* out, float* lse,
                              float* partial, int heads, int latent, int rope, int absorbed_dim, int query_dim,
                              int split_tokens, float scale) {
  constexpr int EACH = 20, MOST = 32 * EACH;
  __shared__ float whole[WARPS][MOST];
  __shared__ float maxima[WARPS], totals[WARPS];
  let_next_start();
  wait_for_previous();
  const int token = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int width = latent + rope;
  const Context context = context_of(rows, token);
  const int length = context.length, splits = active_splits(length, gridDim.x, split_tokens);
  if (blockIdx.x >= splits) return;
  const int* blocks = rows.tables + static_cast<i64>(context.slot) * rows.max_blocks;
  const i64 line = static_cast<i64>(token) * heads + head;

  float q[EACH], sums[EACH];
#pragma unroll
  for (int c = 0; c < EACH; ++c) {
    const int i = c * 32 + lane;
    sums[c] = q[c] = 0.0f;
    if (i < latent) q[c] = to_float(absorbed[line * absorbed_dim + i]) * scale;
    else if (i < width) q[c] = to_float(queries[line * query_dim + query_dim - width + i]) * scale;
  }
  float top = NONE, total = 0.0f;
  for (int at = blockIdx.x * WARPS + warp; at < length; at += splits * WARPS) {
    float factor;
    const C* from = line_of(cache, rows, blocks[at / rows.block_tokens], at % rows.block_tokens, width, factor);
    float x[EACH], dot = 0.0f;
#pragma unroll
    for (int c = 0; c < EACH; ++c) {
      const int i = c * 32 + lane;
      x[c] = i < width ? element(from, i, factor) : 0.0f;
      dot += x[c] * q[c];
    }
    dot = warp_sum(dot);
    const float new_top = fmaxf(top, dot), fade = weight_of(top, new_top), p = exp_2(dot - new_top);
    total = total * fade + p;
    top = new_top;
#pragma unroll
    for (int c = 0; c < EACH; ++c) sums[c] = sums[c] * fade + p * x[c];
  }
#pragma unroll
  for (int c = 0; c < EACH; ++c) whole[warp][c * 32 + lane] = sums[c];
  if (lane == 0) maxima[warp] = top, totals[warp] = total;
  __syncthreads();
  float most = maxima[0], all = 0.0f, weights[WARPS];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) most = fmaxf(most, maxima[w]);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    weights[w] = weight_of(maxima[w], most);
    all += weights[w] * totals[w];
  }
  float* part = partial + part_at(token, gridDim.x, blockIdx.x, heads, head, latent);
  for (int i = threadIdx.x; i < latent; i += THREADS) {
    float x = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) x += weights[w] * whole[w][i];
    if (splits == 1) out[line * latent + i] = from_float<T>(all > 0.0f ? x / all : 0.0f);
    else part[i] = x;
  }
  if (threadIdx.x != 0) return;
  if (splits == 1) {
    if (lse) lse[line] = log_sum(most, all);
  } else {
    part[latent] = most, part[latent + 1] = all;
  }
}

// The parts of split tokens. Grid: (pieces of 128 dims, heads, query tokens); `splits`: of the grid that left them.
template <typename T>
__device__ void merge_splits(Rows rows, const float* partial, T* out, float* lse, int heads, int latent, int splits,
                             int split_tokens) {
  __shared__ float weights[MOST_SPLITS];
  let_next_start();
  wait_for_previous();
  const int token = blockIdx.z, head = blockIdx.y, lane = threadIdx.x % 32;
  const int active = active_splits(context_of(rows, token).length, splits, split_tokens);
  if (active == 1) return;
  const float* from = partial + part_at(token, splits, 0, heads, head, latent);
  const i64 pitch = static_cast<i64>(heads) * (latent + 2);
  float maxima[MOST_SPLITS / 32], totals[MOST_SPLITS / 32], top = NONE, total = 0.0f;
#pragma unroll
  for (int s = 0; s < MOST_SPLITS / 32; ++s) {
    const int split = s * 32 + lane;
    maxima[s] = split < active ? __ldcg(from + split * pitch + latent) : NONE;
    totals[s] = split < active ? __ldcg(from + split * pitch + latent + 1) : 0.0f;
    top = fmaxf(top, maxima[s]);
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
#pragma unroll
  for (int s = 0; s < MOST_SPLITS / 32; ++s) {
    const float weight = weight_of(maxima[s], top);
    if (threadIdx.x < 32) weights[s * 32 + lane] = weight;
    total += weight * totals[s];
  }
  total = warp_sum(total);
  __syncthreads();
  const int dim = blockIdx.x * THREADS + threadIdx.x;
  if (dim >= latent) return;
  float x = 0.0f;
#pragma unroll 8
  for (int s = 0; s < active; ++s) x += weights[s] * __ldcg(from + s * pitch + dim);
  const i64 line = static_cast<i64>(token) * heads + head;
  out[line * latent + dim] = from_float<T>(total > 0.0f ? x / total : 0.0f);
  if (lse && dim == 0) lse[line] = log_sum(top, total);
}

// Rotate neighbours in place: the last `rope` features of the heads' queries and of the token's line, which goes to
// its cache slot then; a slot below 0 is nobody's. Where the cache is in e4m3, the line is rounded in place to what
// the cache holds of it. rotation: [tokens, 3, rope / 2]: cos, -sin, sin.
// Grid: (tokens, 1 + pieces of a token's queries); the blocks at y = 0 have the lines, `pitch` elements apart.
struct Turn {
  float cosine, sine;
  template <typename T> __device__ Turn(const T* rotation, i64 token, int rope, int pair) {
    cosine = to_float(rotation[token * 3 * (rope / 2) + pair]);
    sine = to_float(rotation[token * 3 * (rope / 2) + rope + pair]);
  }
  template <typename T> __device__ void apply(T* at) const {
    const float x = to_float(at[0]), y = to_float(at[1]);
    at[0] = from_float<T>(x * cosine - y * sine);
    at[1] = from_float<T>(y * cosine + x * sine);
  }
};

__device__ __forceinline__ e4m3 encoded(float x) {
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return e4m3{static_cast<unsigned char>(pair)};
}

__device__ __forceinline__ float block_max(float x) {
  __shared__ float parts[WARPS];
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) x = fmaxf(x, parts[w]);
  return x;
}

template <typename T, typename C>
__device__ void rope_store(T* queries, T* lines, const T* rotation, const i64* slots, C* cache, int heads,
                           int query_dim, int latent, int rope, int pitch, int block_tokens) {
  constexpr bool IS_E4M3 = sizeof(C) == 1;
  let_next_start();
  wait_for_previous();
  const i64 token = blockIdx.x;
  const int half = rope / 2;
  if (blockIdx.y > 0) {
    const int item = (blockIdx.y - 1) * THREADS + threadIdx.x;
    if (item >= heads * half) return;
    const int head = item / half, pair = item % half;
    T* at = queries + (token * heads + head) * query_dim + query_dim - rope + pair * 2;
    Turn(rotation, token, rope, pair).apply(at);
    return;
  }
  T* line = lines + token * pitch;
  for (int pair = threadIdx.x; pair < half; pair += THREADS)
    Turn(rotation, token, rope, pair).apply(line + latent + pair * 2);
  __syncthreads();
  const i64 slot = slots[token];
  const int width = latent + rope;
  if constexpr (IS_E4M3) {
    float largest = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) largest = fmaxf(largest, fabsf(to_float(line[i])));
    largest = block_max(largest);
    // The least power of two with which the largest magnitude is at most 448, e4m3's largest: a mantissa above that
    // of 448 = 1.75 * 2^8 carries into the exponent.
    const int exponent = static_cast<int>((__float_as_uint(largest) + 0x1fffff) >> 23) - 8;
    const u32 scale = max(1, min(247, exponent));
    const float factor = scale_of(scale), inverse = scale_of(254 - scale);
    C* page = cache + slot / block_tokens * page_bytes(block_tokens, width);
    C* to = page + block_tokens + slot % block_tokens * width;
    if (slot >= 0 && threadIdx.x == 0) page[slot % block_tokens].bits = static_cast<unsigned char>(scale);
    for (int i = threadIdx.x; i < width; i += THREADS) {
      const C code = encoded(to_float(line[i]) * inverse);
      if (slot >= 0) to[i] = code;
      line[i] = from_float<T>(element(&code, 0, factor));
    }
  } else if (slot >= 0) {
    for (int i = threadIdx.x; i < width; i += THREADS) cache[slot * width + i] = line[i];
  }
}

// Lines of cached tokens as the expanded form wants them: token i of the grid's x is token firsts[row] + i -
// starts[row] of the row that holds it, by starts [num_rows + 1]. Its latent goes to latents [tokens, latent], its
// rotated part to the end of the keys of every head, [tokens, heads, key_dim].
template <typename C>
__device__ void gather_lines(const C* cache, Rows rows, const int* firsts, bf16* latents, bf16* keys, int heads,
                             int key_dim, int latent, int rope) {
  let_next_start();
  wait_for_previous();
  const int lane = threadIdx.x % 32, token = blockIdx.x;
  int row = 0;
  for (int base = 0; base < rows.num_rows; base += 32) {
    const int mine = base + lane;
    const u32 holders = __ballot_sync(~0u, mine < rows.num_rows && rows.starts[mine + 1] > token);
    if (holders) {
      row = base + __ffs(holders) - 1;
      break;
    }
  }
  const int at = firsts[row] + token - rows.starts[row];
  const int block = rows.tables[static_cast<i64>(rows.slots[row]) * rows.max_blocks + at / rows.block_tokens];
  float scale;
  const C* line = line_of(cache, rows, block, at % rows.block_tokens, latent + rope, scale);
  for (int i = threadIdx.x * 2; i < latent; i += THREADS * 2) {
    const float x[2] = {element(line, i, scale), element(line, i + 1, scale)};
    store<bf16, 2>(latents + static_cast<i64>(token) * latent + i, x);
  }
  for (int i = threadIdx.x * 2; i < heads * rope; i += THREADS * 2) {
    const int head = i / rope, dim = i % rope;
    const float x[2] = {element(line, latent + dim, scale), element(line, latent + dim + 1, scale)};
    store<bf16, 2>(keys + (static_cast<i64>(token) * heads + head) * key_dim + key_dim - rope + dim, x);
  }
}

// Two attentions of the same queries to different tokens, merged into the first: means [tokens, heads, dim] and
// the base-2 logarithms of their denominators [tokens, heads]. Grid: (heads, tokens); dim threads at most.
__device__ __forceinline__ void merge_means(bf16* means, float* lse, const bf16* others, const float* others_lse,
                                            int heads, int dim) {
  let_next_start();
  wait_for_previous();
  const i64 line = static_cast<i64>(blockIdx.y) * heads + blockIdx.x;
  const float a = lse[line], b = others_lse[line], top = fmaxf(a, b);
  const float x = weight_of(a, top), y = weight_of(b, top), inverse = x + y > 0.0f ? 1.0f / (x + y) : 0.0f;
  __syncthreads();
  for (int i = threadIdx.x; i < dim; i += THREADS)
    means[line * dim + i] = from_float<bf16>((x * to_float(means[line * dim + i]) +
                                              y * to_float(others[line * dim + i])) * inverse);
  if (threadIdx.x == 0) lse[line] = top == NONE ? NONE : top + log_2(x + y);
}

#define ROWS const int *tables, const int *slots, const int *lengths, const int *starts, int num_rows, \
             int max_blocks, int block_tokens
#define GIVEN Rows{tables, slots, lengths, starts, num_rows, max_blocks, block_tokens}
#define TENSOR(NAME, C, HEAD_TILES, STAGES)                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) latent_tensor_##NAME(                                \
      const bf16* absorbed, const bf16* queries, const C* cache, ROWS, bf16* out, float* lse, float* partial,     \
      int heads, int absorbed_dim, int query_dim, int split_tokens, float scale) {                                \
    latent_tensor<C, HEAD_TILES, STAGES>(absorbed, queries, cache, GIVEN, out, lse, partial, heads, absorbed_dim, \
                                         query_dim, split_tokens, scale);                                         \
  }
TENSOR(8, bf16, 1, 2)
TENSOR(16, bf16, 2, 2)
TENSOR(32, bf16, 4, 2)
TENSOR(8_e4m3, e4m3, 1, 4)
TENSOR(16_e4m3, e4m3, 2, 4)
TENSOR(32_e4m3, e4m3, 4, 4)

#define VECTOR(NAME, T, C)                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS) latent_vector_##NAME(                                    \
      const T* absorbed, const T* queries, const C* cache, ROWS, T* out, float* lse, float* partial, int heads,  \
      int latent, int rope, int absorbed_dim, int query_dim, int split_tokens, float scale) {                    \
    latent_vector<T, C>(absorbed, queries, cache, GIVEN, out, lse, partial, heads, latent, rope, absorbed_dim,   \
                        query_dim, split_tokens, scale);                                                         \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS) rope_store_##NAME(                                       \
      T* queries, T* lines, const T* rotation, const i64* slots, C* cache, int heads, int query_dim, int latent, \
      int rope, int pitch, int block_tokens) {                                                                   \
    rope_store<T, C>(queries, lines, rotation, slots, cache, heads, query_dim, latent, rope, pitch,              \
                     block_tokens);                                                                              \
  }
VECTOR(bf16, bf16, bf16)
VECTOR(f32, float, float)
VECTOR(bf16_e4m3, bf16, e4m3)
VECTOR(f32_e4m3, float, e4m3)

#define MERGE(NAME, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS) merge_splits_##NAME(                                      \
      ROWS, const float* partial, T* out, float* lse, int heads, int latent, int splits, int split_tokens) {      \
    merge_splits<T>(GIVEN, partial, out, lse, heads, latent, splits, split_tokens);                               \
  }
MERGE(bf16, bf16)
MERGE(f32, float)

#define GATHER(NAME, C)                                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS) gather_lines_##NAME(                                      \
      const C* cache, ROWS, const int* firsts, bf16* latents, bf16* keys, int heads, int key_dim, int latent,     \
      int rope) {                                                                                                 \
    gather_lines<C>(cache, GIVEN, firsts, latents, keys, heads, key_dim, latent, rope);                           \
  }
GATHER(bf16, bf16)
GATHER(bf16_e4m3, e4m3)

extern "C" __global__ void __launch_bounds__(THREADS) merge_means_bf16(bf16* means, float* lse, const bf16* others,
                                                                       const float* others_lse, int heads, int dim) {
  merge_means(means, lse, others, others_lse, heads, dim);
}
