// out[slot, n] = sum over k of x[row(slot), k] * weight[expert(slot), n, k]: products with the experts' weights.
//
// Slots are sorted by expert and cut into tiles of up to 8 * COLUMNS slots of one expert (moe.cu). A block makes
// 16 * TILES * N_WARPS outputs of each of a tile's slots; K_WARPS warps share the k's, a run of pieces each. A piece is
// 64 bytes of each weight row for int4 (128 k's) and 128 for bf16 (64 k's; TURNED: these lie k by k, [k, n]). DEPTH
// pieces are always under way into a ring in shared memory that is the warp's own, so nobody waits for another warp
// before the sums. Products go through mma.m16n8k16 with the weights as A and the slots as the 8 columns of B. Which k
// stands where inside a product does not matter as long as A and B agree: a thread takes 16 neighbouring bytes of a
// row at a time. Sums are added in a fixed order: a slot's result does not depend on the other slots.
//
// Blocks of NEIGHBOURS pieces of the outputs stand beside each other for one tile, then the same for the next tile:
// tiles of one expert run at the same time and read its weights from memory once, and so do neighbours in a turned row.

constexpr int NEIGHBOURS = 8;

struct alignas(16) Lane16 { u32 at[4]; };
struct alignas(16) Tile { int expert, first, count, unused; };

__device__ __forceinline__ u32 shared_address(const void* at) {
  return static_cast<u32>(__cvta_generic_to_shared(at));
}

// Zeros where the source is not valid: nothing is read then.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool is_valid) {
  const int bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The same where the rest of the line is wanted next.
__device__ __forceinline__ void copy16_of_line(u32 to, const void* from, bool is_valid) {
  const int bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Through the first-level cache: the neighbours of these eight bytes are wanted soon.
__device__ __forceinline__ void copy8(u32 to, const void* from, bool is_valid) {
  const int bytes = is_valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT> __device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ Lane16 read16(u32 from) {
  Lane16 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
               : "r"(from)
               : "memory");
  return x;
}

__device__ __forceinline__ u32 read2(u32 from) {
  unsigned short x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
  return x;
}

// a * b + c of two pairs, rounded once.
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four blocks of 8 by 8, each row at the address that a lane gives, and turned: lane 4 a + b gets column a of rows
// 2 b and 2 b + 1.
__device__ __forceinline__ Lane16 read_turned(u32 from) {
  Lane16 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
               : "r"(from)
               : "memory");
  return x;
}

// The weight of the pair (i, i + 4) of a word's eight codes, a code c standing for c - 8: (c - 8) * scale, rounded.
// 0x4300 is 128 in bf16, whose last bits count ones; 0xc308 is -136.
__device__ __forceinline__ u32 weight_pair(u32 word, int i, u32 scales) {
  const u32 codes = (word >> (4 * i) & 0x000f000fu) | 0x43004300u;
  return fma_pair(fma_pair(codes, 0x3f803f80u, 0xc308c308u), scales, 0x80008000u);
}

// n: outputs of a slot. GATED: an expert's weight is [gate | up], 2 n rows, and out = silu(gate) * up of the rounded
// products; even tiles of weight rows are gates, the odd one after each its up. rows: a slot's row of x; null: the
// slot itself.
enum Kind { BF16, INT4_WORDS, TURNED };

template <Kind KIND, int K_WARPS, int N_WARPS, int TILES, int COLUMNS, int DEPTH, bool GATED>
__device__ __forceinline__ void grouped(const bf16* x, const int* rows, const char* weight, const bf16* scales,
                                        bf16* out, const Tile* tiles, const int* num_tiles, int n, int k) {
  static_assert(!GATED || TILES % 2 == 0, "gates have ups");
  static_assert(KIND != TURNED || TILES == 2 || TILES == 4, "places are known for 4 and 8 chunks");
  constexpr bool INT4 = KIND == INT4_WORDS;
  constexpr int ROWS = 16 * TILES, MADE = GATED ? ROWS / 2 : ROWS, THREADS = K_WARPS * N_WARPS * 32;
  constexpr int A_CHUNKS = INT4 ? 1 : 2, B_CHUNKS = INT4 ? 16 : 8, PIECE = B_CHUNKS * 8;
  constexpr int A_BYTES = TILES * 2 * A_CHUNKS * 512, B_BYTES = COLUMNS * 8 * B_CHUNKS * 16;
  constexpr int STAGE = A_BYTES + B_BYTES + (INT4 ? ROWS * 8 : 0);
  extern __shared__ __align__(128) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  const int k_warp = warp % K_WARPS, n_warp = warp / K_WARPS;
  const int block_first = (blockIdx.y * NEIGHBOURS + blockIdx.x % NEIGHBOURS) * (MADE * N_WARPS);
  const int first = block_first + n_warp * MADE;
  let_next_start();
  wait_for_previous();
  if (block_first >= n) return;
  // The grid has as many tiles as are likely. Where there are more, blocks go on.
  const int count = *num_tiles;
  for (int index = blockIdx.x / NEIGHBOURS; index < count; index += gridDim.x / NEIGHBOURS) {
    const Tile tile = tiles[index];
    const u32 row_bytes = INT4 ? k / 2 : k * 2, row_scales = k / 32, turned_bytes = n * (GATED ? 4 : 2);
    const i64 expert_row = static_cast<i64>(tile.expert) * n * (GATED ? 2 : 1);
    auto weight_row = [&](int row) {
      const int of = row / 16;
      const int output = first + (GATED ? of / 2 : of) * 16 + row % 16;
      return static_cast<u32>((output < n ? output : n - 1) + (GATED && of % 2 ? n : 0));
    };
    const char* weights = weight + expert_row * row_bytes;
    u32 line[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) line[t][h] = weight_row(t * 16 + h * 8 + group) * row_bytes + part * 16;
    i64 source[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int slot = c * 8 + group;
      source[c] = -1;
      if (slot < tile.count) source[c] = static_cast<i64>(rows ? rows[tile.first + slot] : tile.first + slot) * k;
    }
    const int pieces = (k + PIECE - 1) / PIECE, each = (pieces + K_WARPS - 1) / K_WARPS, began = k_warp * each;
    const u32 ring = shared_address(memory) + warp * (DEPTH * STAGE);

    // Chunks of 16 bytes of a slot's piece stand so that neither writing nor reading them meets on a bank.
    auto place = [&](int chunk) { return chunk ^ (INT4 ? chunk >> 3 ^ 6 * (group & 1) : 4 * (group & 1)); };
    // The same for those of a k of turned weights, eight of which are read at a time: see below which.
    auto turned_place = [&](int row, int chunk) {
      return chunk ^ (TILES == 4 ? (row & 1) | (row >> 3 & 3) << 1 : row >> 3 & 3);
    };
    auto copy = [&](u32 stage, int i) {
      const int piece = began + i;
      const bool is_mine = i < each && piece < pieces;
      if constexpr (KIND == TURNED) {
        constexpr int CHUNKS = ROWS / 8;  // of a k
#pragma unroll
        for (int j = 0; j < PIECE * CHUNKS / 32; ++j) {
          const int index = j * 32 + lane, row = index / CHUNKS, chunk = index % CHUNKS, of = chunk / 2;
          const int output = first + (GATED ? of / 2 : of) * 16 + chunk % 2 * 8, at = piece * PIECE + row;
          const bool is_valid = is_mine && output < n && at < k;
          const i64 from = static_cast<i64>(at) * turned_bytes + (output + (GATED && of % 2 ? n : 0)) * 2;
          copy16(stage + (row * CHUNKS + turned_place(row, chunk)) * 16, weights + (is_valid ? from : 0), is_valid);
        }
      }
#pragma unroll
      for (int t = 0; t < (KIND == TURNED ? 0 : TILES); ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int c = 0; c < A_CHUNKS; ++c) {
            const u32 from = static_cast<u32>(piece * A_CHUNKS + c) * 64;
            const bool is_valid = is_mine && from + part * 16 < row_bytes;
            copy16_of_line(stage + ((t * 2 + h) * A_CHUNKS + c) * 512 + lane * 16,
                           weights + (is_valid ? line[t][h] + from : 0), is_valid);
          }
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int j = 0; j < B_CHUNKS / 4; ++j) {
          const int chunk = j * 4 + part, from = piece * PIECE + chunk * 8;
          const bool is_valid = is_mine && source[c] >= 0 && from < k;
          copy16_of_line(stage + A_BYTES + ((c * 8 + group) * B_CHUNKS + place(chunk)) * 16,
                         x + (is_valid ? source[c] + from : 0), is_valid);
        }
      if constexpr (INT4) {
#pragma unroll
        for (int row = lane; row < ROWS; row += 32) {
          const i64 at = (expert_row + weight_row(row)) * row_scales + piece * 4;
          const u32 to = stage + A_BYTES + B_BYTES + row * 8;
          if (row_scales % 4 == 0) {
            copy8(to, scales + (is_mine ? at : 0), is_mine);
          } else {
            // Rows that no eight bytes are aligned in: small ones, for which waiting here will do.
            bf16* four = reinterpret_cast<bf16*>(memory + (to - shared_address(memory)));
            for (int i = 0; i < 4; ++i) four[i] = is_mine && piece * 4 + i < row_scales ? scales[at + i] : 0;
          }
        }
      }
      commit_copies();
    };
    float sums[TILES][COLUMNS][4] = {};
    auto multiply_all = [&](u32 stage) {
      Lane16 a[TILES][2];
      u32 scale[TILES][2];
      if constexpr (INT4) {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            a[t][h] = read16(stage + (t * 2 + h) * 512 + lane * 16);
            scale[t][h] = read2(stage + A_BYTES + B_BYTES + (t * 16 + h * 8 + group) * 8 + part * 2) * 0x10001u;
          }
      }
#pragma unroll
      for (int w = 0; w < B_CHUNKS / 4; ++w) {
        Lane16 b[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const int chunk = INT4 ? part * 4 + w : w * 4 + part;
          b[c] = read16(stage + A_BYTES + ((c * 8 + group) * B_CHUNKS + place(chunk)) * 16);
          if constexpr (INT4) {
            const Lane16 from = b[c];
            b[c].at[0] = __byte_perm(from.at[0], from.at[2], 0x5410);
            b[c].at[1] = __byte_perm(from.at[0], from.at[2], 0x7632);
            b[c].at[2] = __byte_perm(from.at[1], from.at[3], 0x5410);
            b[c].at[3] = __byte_perm(from.at[1], from.at[3], 0x7632);
          }
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          Lane16 pairs[2];
          if constexpr (KIND == TURNED) {
            // Blocks: weight rows 0 to 7 and 8 to 15 of a pair, then those of the next; row 2 b of a block is the first k
            // of a pair of lane part b.
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
              const int row = w * 32 + lane % 8 / 2 * 8 + (i + lane / 16) * 2 + lane % 2;
              const Lane16 found = read_turned(stage + (row * (ROWS / 8) + turned_place(row, t * 2 + lane / 8 % 2)) * 16);
              pairs[0].at[i] = found.at[0];
              pairs[1].at[i] = found.at[1];
              pairs[0].at[i + 1] = found.at[2];
              pairs[1].at[i + 1] = found.at[3];
            }
          }
#pragma unroll
          for (int h = 0; h < (KIND == TURNED ? 0 : 2); ++h) {
            if constexpr (INT4) {
#pragma unroll
              for (int i = 0; i < 4; ++i) pairs[h].at[i] = weight_pair(a[t][h].at[w], i, scale[t][h]);
            } else {
              pairs[h] = read16(stage + ((t * 2 + h) * A_CHUNKS + w) * 512 + lane * 16);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; i += 2)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
              multiply(sums[t][c], pairs[0].at[i], pairs[1].at[i], pairs[0].at[i + 1], pairs[1].at[i + 1], b[c].at[i],
                       b[c].at[i + 1]);
        }
      }
    };
    for (int d = 0; d < DEPTH; ++d) copy(ring + d * STAGE, d);
    u32 stage = ring;
    for (int i = 0; i < each; ++i) {
      await_copies<DEPTH - 1>();
      __syncwarp();
      multiply_all(stage);
      __syncwarp();
      copy(stage, i + DEPTH);
      stage = stage == ring + (DEPTH - 1) * STAGE ? ring : stage + STAGE;
    }
    await_copies<0>();
    __syncthreads();

    // [warp of the k's][slot][weight row of the block], one float of padding a slot; in the ring's place.
    float* parts = reinterpret_cast<float*>(memory);
    constexpr int STRIDE = ROWS * N_WARPS + 1;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          parts[(k_warp * COLUMNS * 8 + c * 8 + part * 2 + i % 2) * STRIDE + n_warp * ROWS + t * 16 + i / 2 * 8 + group] =
              sums[t][c][i];
    __syncthreads();
    constexpr int OUTPUTS = MADE * N_WARPS;
    for (int i = threadIdx.x; i < tile.count * OUTPUTS; i += THREADS) {
      const int slot = i / OUTPUTS, output = i % OUTPUTS;
      if (block_first + output >= n) continue;
      const int from = slot * STRIDE + (GATED ? output / 16 * 32 + output % 16 : output);
      float sum = 0.0f;
#pragma unroll
      for (int p = 0; p < K_WARPS; ++p) sum += parts[p * COLUMNS * 8 * STRIDE + from];
      if constexpr (GATED) {
        float up = 0.0f;
#pragma unroll
        for (int p = 0; p < K_WARPS; ++p) up += parts[p * COLUMNS * 8 * STRIDE + from + 16];
        sum = silu(to_float(from_float<bf16>(sum))) * to_float(from_float<bf16>(up));
      }
      out[static_cast<i64>(tile.first + slot) * n + block_first + output] = from_float<bf16>(sum);
    }
    __syncthreads();
  }
}

// BLOCKS: how many must fit on a multiprocessor at once.
#define GROUPED_AS(NAME, KIND, GATED, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)                                 \
  extern "C" __global__ void __launch_bounds__(K_WARPS* N_WARPS * 32, BLOCKS)                                          \
      NAME##_##K_WARPS##_##N_WARPS##_##TILES##_##COLUMNS##_##DEPTH(                                                    \
          const bf16* x, const int* rows, const char* weight, const bf16* scales, bf16* out, const Tile* tiles,        \
          const int* num_tiles, int n, int k) {                                                                        \
    grouped<KIND, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, GATED>(x, rows, weight, scales, out, tiles, num_tiles, n,   \
                                                                  k);                                                  \
  }
#define INT4_KERNELS(K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)                           \
  GROUPED_AS(int4, INT4_WORDS, false, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)                \
  GROUPED_AS(int4_gated, INT4_WORDS, true, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)
#define BF16_KERNELS(K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)                           \
  GROUPED_AS(bf16, BF16, false, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)               \
  GROUPED_AS(bf16_gated, BF16, true, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)
#define TURNED_KERNELS(K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)                         \
  GROUPED_AS(turned, TURNED, false, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)            \
  GROUPED_AS(turned_gated, TURNED, true, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS)

INT4_KERNELS(8, 1, 2, 1, 3, 2)
INT4_KERNELS(8, 1, 4, 1, 2, 2)
INT4_KERNELS(4, 1, 4, 1, 4, 2)
INT4_KERNELS(1, 8, 2, 1, 2, 3)
INT4_KERNELS(4, 1, 4, 2, 3, 2)
INT4_KERNELS(1, 4, 4, 2, 2, 3)
INT4_KERNELS(4, 1, 4, 4, 2, 2)
INT4_KERNELS(1, 4, 4, 4, 2, 2)
INT4_KERNELS(4, 1, 4, 8, 2, 1)
INT4_KERNELS(1, 4, 4, 8, 2, 1)
BF16_KERNELS(8, 1, 2, 1, 2, 2)
BF16_KERNELS(4, 1, 4, 1, 3, 2)
BF16_KERNELS(1, 8, 2, 1, 2, 2)
BF16_KERNELS(4, 1, 4, 2, 2, 2)
BF16_KERNELS(1, 4, 4, 2, 2, 2)
BF16_KERNELS(4, 1, 4, 4, 2, 2)
BF16_KERNELS(1, 4, 4, 4, 2, 2)
BF16_KERNELS(4, 1, 4, 8, 3, 1)
BF16_KERNELS(1, 4, 4, 8, 3, 1)
TURNED_KERNELS(8, 1, 2, 1, 2, 2)
TURNED_KERNELS(4, 1, 4, 1, 3, 2)
TURNED_KERNELS(4, 1, 4, 2, 2, 2)
TURNED_KERNELS(1, 4, 4, 2, 2, 2)
TURNED_KERNELS(4, 1, 4, 4, 2, 2)
TURNED_KERNELS(1, 4, 4, 4, 2, 2)
TURNED_KERNELS(4, 1, 4, 8, 3, 1)
TURNED_KERNELS(1, 4, 4, 8, 3, 1)

// The same in float32 multiply-adds, a thread an output of a slot and a block 16 outputs of 16 slots: for small models
// in float32. W: float, or u32 for words of int4 whose scales are S.
template <typename W, typename S, bool IS_INT4, bool IS_TURNED>
__device__ __forceinline__ void plain(const float* x, const int* rows, const W* weight, const S* scales, float* out,
                                      const Tile* tiles, const int* num_tiles, int n, int k) {
  constexpr int SIDE = 16;
  __shared__ float a[SIDE][SIDE + 1], b[SIDE][SIDE + 1];
  let_next_start();
  wait_for_previous();
  const int first = (blockIdx.y * NEIGHBOURS + blockIdx.x % NEIGHBOURS) * SIDE;
  if (first >= n) return;
  const int count = *num_tiles, across = threadIdx.x % SIDE, down = threadIdx.x / SIDE;
  for (int index = blockIdx.x / NEIGHBOURS; index < count; index += gridDim.x / NEIGHBOURS) {
    const Tile tile = tiles[index];
    const bool is_output = first + down < n, is_slot = down < tile.count;
    const i64 row = static_cast<i64>(tile.expert) * n + first + down;
    const i64 source = is_slot ? (rows ? rows[tile.first + down] : tile.first + down) : 0;
    float sum = 0.0f;
    for (int from = 0; from < k; from += SIDE) {
      const int at = from + across;
      float w = 0.0f;
      if (is_output && at < k) {
        if constexpr (IS_INT4) {
          const u32 word = weight[row * (k / 8) + at / 8];
          w = (static_cast<int>(word >> (at % 8 * 4) & 15u) - 8) * to_float(scales[row * (k / 32) + at / 32]);
        } else if constexpr (IS_TURNED) {
          w = weight[(static_cast<i64>(tile.expert) * k + at) * n + first + down];
        } else {
          w = weight[row * k + at];
        }
      }
      a[down][across] = w;
      b[down][across] = is_slot && at < k ? x[source * k + at] : 0.0f;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < SIDE; ++i) sum += a[across][i] * b[down][i];
      __syncthreads();
    }
    if (is_slot && first + across < n) out[static_cast<i64>(tile.first + down) * n + first + across] = sum;
  }
}

#define PLAIN(NAME, W, S, IS_INT4, IS_TURNED)                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                                              \
      NAME(const float* x, const int* rows, const W* weight, const S* scales, float* out, const Tile* tiles,      \
           const int* num_tiles, int n, int k) {                                                                 \
    plain<W, S, IS_INT4, IS_TURNED>(x, rows, weight, scales, out, tiles, num_tiles, n, k);                                           \
  }
PLAIN(float32_plain, float, float, false, false)
PLAIN(float32_turned, float, float, false, true)
PLAIN(int4_plain_float32, u32, float, true, false)
PLAIN(int4_plain_bf16, u32, bf16, true, false)
