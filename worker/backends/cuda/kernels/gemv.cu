// out[m, n] = sum over k of x[m, k] * weight[n, k] for few rows of x: a matter of reading weights once.
//
// A warp makes 16 * TILES outputs for all rows, alone or with the K_WARPS - 1 others that share the k's with it,
// 64 elements (a line of 128 bytes) of each weight row in turn. DEPTH pieces of 32 elements are always under way,
// the first of them before the kernel before has ended: in registers, or (RING) in shared memory, where a thread
// reads back only what it copied itself, so that nobody waits for anybody. Products go through mma.m16n8k16 with
// the weights as A and the rows of x as the 8 columns of B. Which k stands where inside a product does not matter
// as long as A and B agree, so a thread loads 8 neighbouring k's at a time.
// Sums are added in a fixed order: a row's result does not depend on the other rows.

struct Lane16 { u32 at[4]; };

__device__ __forceinline__ Lane16 stream16(const bf16* from, bool is_valid) {
  Lane16 x = {{0, 0, 0, 0}};
  if (is_valid)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
                 : "l"(from));
  return x;
}

__device__ __forceinline__ Lane16 read16(const bf16* from, bool is_valid) {
  Lane16 x = {{0, 0, 0, 0}};
  if (is_valid)
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
                 : "l"(from)
                 : "memory");
  return x;
}

__device__ __forceinline__ Lane16 read_shared16(u32 from) {
  Lane16 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
               : "r"(from)
               : "memory");
  return x;
}

// Zeros where the source is not valid: nothing is read then.
__device__ __forceinline__ void copy_shared16(u32 to, const bf16* from, bool is_valid) {
  const int bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void prefetch_line(const bf16* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

__device__ __forceinline__ void multiply(float (&c)[4], const Lane16& low, const Lane16& high, const Lane16& x) {
#pragma unroll
  for (int k = 0; k < 4; k += 2)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low.at[k]), "r"(high.at[k]), "r"(low.at[k + 1]), "r"(high.at[k + 1]), "r"(x.at[k]),
          "r"(x.at[k + 1]));
}

// n: outputs a row. GATED: weight is [gate | up], 2 n rows, and out = silu(gate) * up of the rounded products;
// even tiles are gates, the odd one after each its up. ahead: lines of each weight row that a warp asks for, after
// the first DEPTH pieces, into L2 while it waits for the kernel before.
template <int K_WARPS, int N_WARPS, int TILES, int COLUMNS, int DEPTH, bool RING, bool GATED>
__device__ __forceinline__ void gemv(const bf16* x, const bf16* weight, void* out, int rows, int n, int k, int ahead,
                                     int is_float) {
  static_assert(DEPTH % 2 == 0 && (!GATED || TILES % 2 == 0), "pieces are halves of lines, gates have ups");
  constexpr int ROWS = 16 * TILES, MADE = GATED ? ROWS / 2 : ROWS;
  constexpr int X_DEPTH = COLUMNS == 1 && !RING ? DEPTH : 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4 * 8;
  const int k_warp = warp % K_WARPS, n_warp = warp / K_WARPS;
  const int block_first = blockIdx.x * MADE * N_WARPS, first = block_first + n_warp * MADE;
  auto weight_row = [&](int row) {
    const int tile = row / 16;
    const int output = first + (GATED ? tile / 2 : tile) * 16 + row % 16;
    return weight + static_cast<i64>((output < n ? output : n - 1) + (GATED && tile % 2 ? n : 0)) * k;
  };
  const bf16* line[TILES][2];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) line[t][h] = weight_row(t * 16 + h * 8 + group);
  const int stages = 2 * ((k + 64 * K_WARPS - 1) / (64 * K_WARPS));
  const int mine = k_warp * 64 + part;
  auto at = [&](int stage) { return (stage >> 1) * (64 * K_WARPS) + (stage & 1) * 32 + mine; };

  extern __shared__ __align__(16) char ring[];  // [DEPTH][TILES][2][thread] of 16 bytes
  constexpr u32 THREADS = K_WARPS * N_WARPS * 32, SLOT_BYTES = TILES * 2 * THREADS * 16;
  const u32 ring_first = RING ? static_cast<u32>(__cvta_generic_to_shared(ring)) + threadIdx.x * 16 : 0;
  Lane16 w[RING ? 1 : DEPTH][TILES][2], b[X_DEPTH][COLUMNS];
  auto copy_weights = [&](u32 slot, int stage) {
    const int i = at(stage);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) copy_shared16(slot + (t * 2 + h) * THREADS * 16, line[t][h] + i, i < k);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  auto read_weights = [&](int slot, int stage) {
    const int i = at(stage);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) w[slot][t][h] = stream16(line[t][h] + i, i < k);
  };
  auto read_rows = [&](int slot, int stage) {
    const int i = at(stage);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int row = c * 8 + group;
      b[slot][c] = read16(x + row * k + i, row < rows && i < k);
    }
  };
  if constexpr (RING) {
    for (int d = 0; d < DEPTH; ++d) copy_weights(ring_first + d * SLOT_BYTES, d);
  } else {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) read_weights(d, d);
  }
  for (int i = lane; i < ahead * ROWS; i += 32) {
    const int from = at(DEPTH + i / ROWS * 2) - part;
    if (from < k) prefetch_line(weight_row(i % ROWS) + from);
  }
  let_next_start();
  wait_for_previous();
#pragma unroll
  for (int d = 0; d < X_DEPTH; ++d) read_rows(d, d);

  float sums[TILES][COLUMNS][4] = {};
  auto multiply_all = [&](int slot, int x_slot) {
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) multiply(sums[t][c], w[slot][t][0], w[slot][t][1], b[x_slot][c]);
  };
  if constexpr (RING) {
    u32 slot = ring_first;
    for (int stage = 0; stage < stages; stage += X_DEPTH) {
#pragma unroll
      for (int d = 0; d < X_DEPTH; ++d) {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) w[0][t][h] = read_shared16(slot + (t * 2 + h) * THREADS * 16);
        multiply_all(0, d);
        copy_weights(slot, stage + DEPTH + d);
        read_rows(d, stage + X_DEPTH + d);
        slot = slot == ring_first + (DEPTH - 1) * SLOT_BYTES ? ring_first : slot + SLOT_BYTES;
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    for (int stage = 0; stage < stages; stage += DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        multiply_all(d, d % X_DEPTH);
        read_weights(d, stage + DEPTH + d);
        read_rows(d % X_DEPTH, stage + X_DEPTH + d);
      }
    }
  }

  // [warp of the k's][column of x][weight row of the block], one float of padding a column.
  __shared__ float parts[K_WARPS][COLUMNS * 8][ROWS * N_WARPS + 1];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[k_warp][c * 8 + lane % 4 * 2 + i % 2][n_warp * ROWS + t * 16 + i / 2 * 8 + group] = sums[t][c][i];
  __syncthreads();
  constexpr int OUTPUTS = MADE * N_WARPS;
  for (int i = threadIdx.x; i < rows * OUTPUTS; i += THREADS) {
    const int row = i / OUTPUTS, output = i % OUTPUTS;
    const int from = GATED ? output / 16 * 32 + output % 16 : output;
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < K_WARPS; ++p) sum += parts[p][row][from];
    if constexpr (GATED) {
      float up = 0.0f;
#pragma unroll
      for (int p = 0; p < K_WARPS; ++p) up += parts[p][row][from + 16];
      sum = silu(to_float(from_float<bf16>(sum))) * to_float(from_float<bf16>(up));
    }
    if (block_first + output >= n) continue;
    const i64 to = static_cast<i64>(row) * n + block_first + output;
    if (is_float)
      static_cast<float*>(out)[to] = sum;
    else
      static_cast<bf16*>(out)[to] = from_float<bf16>(sum);
  }
}

// BLOCKS: how many must fit on a multiprocessor at once.
#define GEMV_AS(NAME, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS, RING, GATED)                              \
  extern "C" __global__ void __launch_bounds__(K_WARPS* N_WARPS * 32, BLOCKS)                                     \
      NAME##_##K_WARPS##_##N_WARPS##_##TILES##_##COLUMNS##_##DEPTH(const bf16* x, const bf16* weight, void* out,  \
                                                                   int rows, int n, int k, int ahead,             \
                                                                   int is_float) {                                \
    gemv<K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, RING, GATED>(x, weight, out, rows, n, k, ahead, is_float);      \
  }
#define GEMV(K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS) \
  GEMV_AS(gemv, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS, false, false)
#define RING(K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS) \
  GEMV_AS(ring, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS, true, false)
#define GATED(K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS) \
  GEMV_AS(gated, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS, false, true)
#define GATED_RING(K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS) \
  GEMV_AS(gated_ring, K_WARPS, N_WARPS, TILES, COLUMNS, DEPTH, BLOCKS, true, true)

// Up to 8 rows.
GEMV(1, 8, 1, 1, 8, 2)
GEMV(4, 1, 1, 1, 8, 4)
GEMV(8, 1, 1, 1, 4, 3)
GEMV(8, 1, 1, 1, 8, 2)
GEMV(16, 1, 1, 1, 4, 1)
RING(1, 4, 1, 1, 12, 4)
RING(1, 8, 1, 1, 8, 2)
RING(2, 4, 1, 1, 8, 2)
RING(4, 1, 1, 1, 12, 4)
RING(8, 1, 1, 1, 8, 3)
RING(8, 1, 1, 1, 12, 2)
GATED(2, 4, 2, 1, 4, 2)
GATED_RING(1, 4, 2, 1, 6, 4)
GATED_RING(2, 4, 2, 1, 6, 2)
GATED_RING(4, 1, 2, 1, 6, 4)
// Up to 16.
GEMV(8, 1, 1, 2, 4, 2)
RING(1, 4, 1, 2, 12, 4)
RING(1, 8, 1, 2, 8, 2)
RING(4, 1, 1, 2, 12, 4)
RING(8, 1, 1, 2, 12, 2)
GATED_RING(1, 4, 2, 2, 6, 4)
GATED_RING(2, 4, 2, 2, 6, 2)
// Up to 32.
RING(1, 8, 1, 4, 8, 2)
RING(1, 8, 2, 4, 4, 2)
RING(4, 1, 1, 4, 12, 4)
RING(4, 1, 2, 4, 6, 4)
RING(8, 1, 1, 4, 12, 2)
GATED_RING(1, 8, 2, 4, 4, 2)
GATED_RING(2, 4, 2, 4, 4, 2)
