// SPDX-License-Identifier: Apache-2.0
// The launcher of decode_linear.cu: factored linears for the few rows of a decoding step. Plain C, no torch.
#pragma once

#include <stdint.h>

#include "dtypes.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { kEigenpruneDecodeMostRows = 16, kEigenpruneDecodeMostProblems = 8 };

// One factored linear. All arrays are contiguous, of one dtype, on one device, aligned as the dtype needs it.
// Without pivots (null): y = (x right^T) left^T + bias, left_rows = out.
// With pivots: y[pivots] = x right^T, y[the others, ascending] = (x right^T) left^T, + bias; left_rows = out - rank.
typedef struct {
  const void* x;          // [rows, in_features]
  const void* right;      // [rank, in_features]
  const void* left;       // [left_rows, rank]
  const void* bias;       // [out] or null
  const int32_t* pivots;  // [rank] or null; wrong ones turn all of y into NaN, nothing foreign is touched
  void* z;                // [rows, rank], scratch
  int64_t* rest;          // [1 + left_rows], scratch; needed with pivots only
  void* y;                // [rows, out]
  int64_t in_features;
  int64_t rank;
  int64_t left_rows;
} EigenpruneDecodeProblem;

// Two launches for all problems together: the products with `right`, then those with `left`. z is rounded to the dtype
// in between, as two linears would. No allocation, no synchronisation: it may be captured into a graph.
int eigenprune_decode_linear(
    int dtype,  // EigenpruneDtype, not float64
    const EigenpruneDecodeProblem* problems,  // on the host, read before the call returns
    int count,                                // of problems: 1 .. kEigenpruneDecodeMostProblems
    int64_t rows,                             // 1 .. kEigenpruneDecodeMostRows
    void* stream);                            // cudaStream_t

#ifdef __cplusplus
}
#endif
