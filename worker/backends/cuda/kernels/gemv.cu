// out[m, n] = sum over k of x[m, k] * weight[n, k] for few rows of x: a matter of reading weights once.
//
// A block makes 16 * TILES outputs for all rows. Its warps share the k's, 64 elements a line; each thread keeps
// DEPTH reads of weights in flight in registers, the first of them before the kernel before has ended. Products
// go through mma.m16n8k16 with the weights as A and the rows of x as the 8 columns of B. Which k stands where
// inside a product does not matter as long as A and B agree, so a thread loads 8 neighbouring k's at a time.
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

__device__ __forceinline__ void multiply(float (&c)[4], const Lane16& low, const Lane16& high, const Lane16& x) {
#pragma unroll
  for (int k = 0; k < 4; k += 2)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low.at[k]), "r"(high.at[k]), "r"(low.at[k + 1]), "r"(high.at[k + 1]), "r"(x.at[k]),
          "r"(x.at[k + 1]));
}

template <int WARPS, int TILES, int COLUMNS, int DEPTH>
__device__ void gemv(const bf16* x, const bf16* weight, bf16* out, int rows, int n, int k) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4 * 8;
  const int first = blockIdx.x * 16 * TILES;
  const bf16* line[TILES][2];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + t * 16 + h * 8 + group;
      line[t][h] = weight + static_cast<i64>(row < n ? row : n - 1) * k;
    }
  const int stages = 2 * ((k + 64 * WARPS - 1) / (64 * WARPS));
  auto at = [&](int stage) { return (stage / 2) * 64 * WARPS + warp * 64 + stage % 2 * 32 + part; };

  Lane16 w[DEPTH][TILES][2], b[DEPTH][COLUMNS];
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
      b[slot][c] = read16(x + static_cast<i64>(row) * k + i, row < rows && i < k);
    }
  };
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) read_weights(d, d);
  let_next_start();
  wait_for_previous();
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) read_rows(d, d);

  float sums[TILES][COLUMNS][4] = {};
  for (int stage = 0; stage < stages; stage += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) multiply(sums[t][c], w[d][t][0], w[d][t][1], b[d][c]);
      read_weights(d, stage + DEPTH + d);
      read_rows(d, stage + DEPTH + d);
    }
  }

  // [warp][column of x][output of the block], one float of padding a column.
  constexpr int OUTPUTS = 16 * TILES, PITCH = OUTPUTS + 1;
  __shared__ float parts[WARPS][COLUMNS * 8][PITCH];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[warp][c * 8 + lane % 4 * 2 + i % 2][t * 16 + i / 2 * 8 + group] = sums[t][c][i];
  __syncthreads();
  for (int i = threadIdx.x; i < rows * OUTPUTS; i += WARPS * 32) {
    const int row = i / OUTPUTS, output = i % OUTPUTS;
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < WARPS; ++p) sum += parts[p][row][output];
    if (first + output < n) out[static_cast<i64>(row) * n + first + output] = from_float<bf16>(sum);
  }
}

#define GEMV(WARPS, TILES, COLUMNS, DEPTH)                                                             \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) gemv_##WARPS##_##TILES##_##COLUMNS##_##DEPTH( \
      const bf16* x, const bf16* weight, bf16* out, int rows, int n, int k) {                          \
    gemv<WARPS, TILES, COLUMNS, DEPTH>(x, weight, out, rows, n, k);                                    \
  }
GEMV(4, 1, 1, 8)
GEMV(8, 1, 1, 4)
GEMV(8, 1, 1, 8)
GEMV(16, 1, 1, 4)
GEMV(8, 2, 1, 4)
GEMV(16, 2, 1, 2)
GEMV(8, 1, 2, 4)
GEMV(8, 2, 2, 4)
GEMV(16, 2, 2, 2)
GEMV(8, 2, 4, 2)
GEMV(16, 2, 4, 2)
