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

  // The last step of pivot_linear: y[..., pivots] = z, y[..., the others, ascending] = rest
  //   z       [..., rank]        float32, bfloat16, float16, float64
  //   rest    [..., out - rank]  dtype and device of z
  //   pivots  [rank]             int32, distinct, in [0, out)
  library.def("merge_columns(Tensor z, Tensor rest, Tensor pivots) -> Tensor");

  // The way back, and the gradient of it: y [..., out] to z and rest as above.
  library.def("split_columns(Tensor y, Tensor pivots) -> (Tensor, Tensor)");

  // One y a layer, from one x. A layer with pivots is a pivot_linear, one without a low_rank_linear; every list has one
  // entry a layer, shapes as above.
  library.def("grouped_linear(Tensor x, Tensor[] right, Tensor[] left, Tensor?[] pivots, Tensor?[] bias) -> Tensor[]");

  // a[i] = left[i] diag(values[i]) right[i], the leading rank components, through the Gram of the short side
  //   a       [batch, short, long]  float32 or float64, finite
  //   double_precision              of the computation; float64 has no other
  //   right_decides                 the largest entry of right's vectors is positive, instead of left's
  //   left    [batch, short, rank], values [batch, rank], right [batch, rank, long]  dtype of a
  //   energy  [batch]               float64, ||a[i]||_F^2
  library.def(
      "gram_svd(Tensor a, int rank, bool double_precision, bool right_decides)"
      " -> (Tensor, Tensor, Tensor, Tensor)");

  // a = left diag(values) right + what is left out, the leading components; no compiled kernel of its own
  //   a       [..., m, n]       float32, float64, float16, bfloat16
  //   rank                      none (full), one, or one a matrix
  //   left    [..., m, rank], values [..., rank], right [..., rank, n]  float32, or float64 for float64
  //   error, excess  [...]      float64
  //   path    [...]             int64
  library.def(
      "truncated_svd(Tensor a, int[]? rank, bool vectors, float tolerance, int seed, str method)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
