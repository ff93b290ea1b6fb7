// SPDX-License-Identifier: Apache-2.0
// Inner products of vectors with every row of a weight. One file per instruction set (dot_avx2.cpp, dot_avx512.cpp, dot_avx512_bf16.cpp); chosen at run time.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace eigenprune {

using torch::headeronly::ScalarType;

struct DotKernel {
  // out[v * out_stride + n] = sum over k of x[v][k] * weight[n][k], summed in float32.
  //   weight  [weight_rows, k], contiguous, of the dtype that was asked for
  //   x       [x_rows, k], contiguous, of `x_dtype`
  // The order of every sum depends on k alone, so a result is the same whichever thread, and in whatever company, it
  // is computed.
  using Multiply = void (*)(
      const void* weight, int64_t weight_rows, const void* x, int64_t x_rows, int64_t k, float* out,
      int64_t out_stride);

  // Rounds `count` sums to nearest-even in the dtype that was asked for.
  using Round = void (*)(const float* sums, int64_t count, void* out);

  Multiply dots;    // quick for few vectors
  Multiply panels;  // quick for many; null where there is none. With bfloat16 x, k must be even.
  Round round;
  ScalarType x_dtype;  // Float, or BFloat16 where the processor multiplies that itself
};

// The best kernel of this processor for weights of `dtype`; null where there is none (float64, no AVX2).
const DotKernel* dot_kernel(ScalarType dtype);

// Kernels of one instruction set, null where it has none for the dtype. Only to be called where the processor has it.
const DotKernel* avx2_dot_kernel(ScalarType dtype);
const DotKernel* avx512_dot_kernel(ScalarType dtype);
const DotKernel* avx512_bf16_dot_kernel(ScalarType dtype);

}  // namespace eigenprune
