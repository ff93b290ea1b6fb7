// SPDX-License-Identifier: Apache-2.0
// Every operator signature, and nothing else. eigenprune/ops/_library.py repeats them for builds without this file.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(eigenprune, library) {
  // y = (x @ right.T) @ left.T + bias
  //   x      [..., in]    float32, bfloat16, float16, float64
  //   right  [rank, in]   dtype and device of x
  //   left   [out, rank]  dtype and device of x
  //   bias   [out]        dtype and device of x
  library.def("low_rank_linear(Tensor x, Tensor right, Tensor left, Tensor? bias) -> Tensor");

  // z = x @ right.T; y[pivots] = z; y[the others, ascending] = z @ left.T; then + bias
  //   x       [..., in]           float32, bfloat16, float16, float64
  //   right   [rank, in]          dtype and device of x: the pivot rows of the weight
  //   left    [out - rank, rank]  dtype and device of x: the mix that gives the others
  //   pivots  [rank]              int32, distinct, in [0, out), in the order of right's rows
  //   bias    [out]               dtype and device of x
  library.def("pivot_linear(Tensor x, Tensor right, Tensor left, Tensor pivots, Tensor? bias) -> Tensor");

  // One y a layer, from one x. A layer with pivots is a pivot_linear, one without a low_rank_linear; every list has one
  // entry a layer, shapes as above.
  library.def("grouped_linear(Tensor x, Tensor[] right, Tensor[] left, Tensor?[] pivots, Tensor?[] bias) -> Tensor[]");
}
