// SPDX-License-Identifier: Apache-2.0
// Factored linears on CPU: both products in one go, with the work divided over the threads once.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace eigenprune {

using torch::headeronly::ScalarType;

// One factored layer of a call. All pointers are to contiguous data; the weights, bias and y are of one dtype.
struct FactoredLayer {
  const void* right;         // [rank, in]
  const void* left;          // [out, rank]; layout pivot: [out - rank, rank]
  const void* bias;          // [out], or null
  const int32_t* pivots;     // [rank] ascending columns of y that are x @ right.T itself; null: layout pair
  const uint64_t* is_pivot;  // the same as bits, with at least one bit more than there are columns; null: layout pair
  const int64_t* z_order;    // [rank] where the columns of x @ right.T stand that go there; null: in this order
  void* y;                   // [rows, out]
  int64_t rank;
  int64_t out;

  int64_t left_rows() const { return out - (pivots == nullptr ? 0 : rank); }

  // How many pivots stand before row `row` of `left` in y.
  int64_t pivots_before(int64_t row) const {
    if (pivots == nullptr || row == 0) return 0;
    int64_t low = 0, high = rank;
    while (low < high) {  // pivots[i] - i, the rows of `left` before pivot i, never falls
      const int64_t middle = (low + high) / 2;
      if (pivots[middle] - middle <= row - 1) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Whether this processor has a kernel for the dtype that is quicker than torch's products at these sizes.
bool serves_factored_linear(ScalarType dtype, int64_t rows, int64_t in, int64_t rank);

// Fills y of every layer from the same x [rows, in]. Sums are formed in float32; between the products they are rounded
// only where the processor multiplies the dtype itself (bfloat16 with AVX-512-BF16). The result does not depend on the
// number of threads.
void factored_linear(
    ScalarType dtype, const void* x, int64_t rows, int64_t in, const std::vector<FactoredLayer>& layers);

}  // namespace eigenprune
