// SPDX-License-Identifier: Apache-2.0
// The launchers of pivot_linear.cu: plain C, raw device pointers, no torch.
#pragma once

#include <stdint.h>

#include "dtypes.h"

#ifdef __cplusplus
extern "C" {
#endif

// Fills source[o] with the column of (z | mixed) that output position o takes; -1 everywhere when a pivot is out of
// range or repeated, so that no later kernel can read or write outside its arrays.
int eigenprune_pivot_sources(
    const int32_t* pivots,  // [rank], contiguous
    int64_t rank,
    int64_t out_features,
    int64_t* source,  // [out_features]
    void* stream);    // cudaStream_t

// y[row, o] = (z | mixed)[row, source[o]] + bias[o]; NaN where source[o] is -1.
int eigenprune_pivot_interleave(
    int dtype,              // EigenpruneDtype of z, mixed, bias and y
    const void* z,          // [rows, rank], contiguous
    const void* mixed,      // [rows, out_features - rank], contiguous
    const int64_t* source,  // [out_features]
    const void* bias,       // [out_features], contiguous, or null
    void* y,                // [rows, out_features], contiguous
    int64_t rows,
    int64_t rank,
    int64_t out_features,
    void* stream);  // cudaStream_t

#ifdef __cplusplus
}
#endif
