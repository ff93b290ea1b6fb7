// SPDX-License-Identifier: Apache-2.0
// How float32, float16 and bfloat16 are stored, rounded, loaded 16 bytes at a time, and multiplied by tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace eigenprune {

// 16 bytes of a row: four floats or eight halves, the first one in the low bits of word[0].
struct Chunk {
  uint32_t word[4];
};

#ifdef __CUDACC__

// For what is read once in a launch: past the first-level cache, which then keeps the vectors.
__device__ __forceinline__ Chunk load_once(const void* from) {
  Chunk chunk;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.word[0]), "=r"(chunk.word[1]), "=r"(chunk.word[2]), "=r"(chunk.word[3])
               : "l"(__cvta_generic_to_global(from)));
  return chunk;
}

// For what every block reads again.
__device__ __forceinline__ Chunk load_kept(const void* from) {
  const uint4 loaded = *static_cast<const uint4*>(from);
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}

// sum [16, 8] += a [16, 16] @ b [16, 8] over the lanes of a whole warp, PTX ISA "Matrix Fragments for mma.m16n8k16":
// with g = lane / 4 and t = lane % 4, each register holding two columns of a or two rows of b,
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);  b: (2t, g), (2t + 8, g);
//   sum: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#define EIGENPRUNE_MMA(NAME, TYPE)                                                                               \
  __device__ __forceinline__ void NAME(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                                  \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                            \
  }
EIGENPRUNE_MMA(multiply_f16, "f16")
EIGENPRUNE_MMA(multiply_bf16, "bf16")
#undef EIGENPRUNE_MMA

#else  // a C++ compiler: tests/ops/cuda_emulation runs these files on a CPU and defines the four

Chunk load_once(const void* from);
Chunk load_kept(const void* from);
void multiply_f16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#endif

struct Float32 {
  using Bits = uint32_t;
  static __device__ float widen(Bits bits) { return __uint_as_float(bits); }
  static __device__ Bits round(float value) { return __float_as_uint(value); }
};

struct Float16 {
  using Bits = uint16_t;
  static __device__ float widen(Bits bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ Bits round(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static __device__ void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_f16(sum, a, b);
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static __device__ float widen(Bits bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
  static __device__ Bits round(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
  static __device__ void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_bf16(sum, a, b);
  }
};

template <typename Element>
constexpr int kPerChunk = sizeof(Chunk) / sizeof(typename Element::Bits);

// The elements [at, at + kPerChunk) of a row, zero from `length` on.
//   kVector  one 16-byte load: `row` is aligned to 16 bytes, `length` and `at` are multiples of kPerChunk
//   kOnce    with kVector: load_once instead of load_kept
template <typename Element, bool kVector, bool kOnce>
__device__ __forceinline__ Chunk load_chunk(const typename Element::Bits* row, int64_t at, int64_t length) {
  Chunk chunk = {{0, 0, 0, 0}};
  if constexpr (kVector) {
    if (at < length) chunk = kOnce ? load_once(row + at) : load_kept(row + at);
  } else {
    constexpr int kBits = 8 * sizeof(typename Element::Bits);
#pragma unroll
    for (int i = 0; i < kPerChunk<Element>; ++i) {
      if (at + i < length) chunk.word[i * kBits / 32] |= static_cast<uint32_t>(row[at + i]) << (i * kBits % 32);
    }
  }
  return chunk;
}

}  // namespace eigenprune
