// What kernels on the tensor cores share, put between common.cuh and the text of the files that ask for it.

#define NONE __int_as_float(0xff800000)

__device__ __forceinline__ float exp_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Weight of something whose maximum is `part` under the maximum `whole`; nothing weighs 0.
__device__ __forceinline__ float weight_of(float part, float whole) {
  return part == NONE ? 0.0f : exp_2(part - whole);
}

__device__ __forceinline__ float log_2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Base-2 logarithm of a denominator of so much over 2^top.
__device__ __forceinline__ float log_sum(float top, float total) { return total > 0.0f ? top + log_2(total) : NONE; }

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two probabilities as bf16, transposed over the warp as an 8x8 matrix: a product's result becomes an operand.
__device__ __forceinline__ u32 transposed(float low, float high) {
  u32 x, y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int step = 4; step < 32; step <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = 4; step < 32; step <<= 1) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

__device__ __forceinline__ u32 shared_address(const void* at) {
  return static_cast<u32>(__cvta_generic_to_shared(at));
}

// Zeros where it is not valid: then `from` is not read.
__device__ __forceinline__ void copy_16(u32 to, const void* from, bool is_valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :: "r"(to), "l"(from), "r"(is_valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for this thread's copies but those ended by the last PENDING calls of `end_copies`.
template <int PENDING> __device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

__device__ __forceinline__ void read_matrices(u32 (&x)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

__device__ __forceinline__ void read_transposed(u32 (&x)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

// Times 2^120, both halves: what takes bf16's exponent from e4m3's.
__device__ __forceinline__ u32 rebias(u32 x) {
  u32 y;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0x7b807b80u));
  return y;
}

// Two of four e4m3 codes as bf16; PICK names the bytes to become the high ones of the halves.
constexpr u32 FIRST_TWO = 0x1404, LAST_TWO = 0x3424, EVEN_TWO = 0x2404, ODD_TWO = 0x3414;
template <u32 PICK> __device__ __forceinline__ u32 widened(u32 codes) {
  const u32 x = __byte_perm(codes, 0, PICK);
  return rebias((x & 0x80008000u) | (x >> 4 & 0x07f007f0u));
}
