// SPDX-License-Identifier: Apache-2.0
// The pivots of a layer as the CPU kernels want them: checked, ascending, and as bits.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../products.h"

namespace eigenprune {

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A thread gets at least this many output elements: torch's own grain for element-wise work (at::internal::GRAIN_SIZE).
constexpr int64_t kGrainElements = 32768;

// work(row) for every row of `columns` elements, over torch's threads.
template <typename Work>
inline void parallel_for_rows(int64_t rows, int64_t columns, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
}

// Pivots as merging wants them: in ascending order, as this package writes them; others are sorted here.
class PivotColumns {
 public:
  PivotColumns(const Where& where, const Tensor& pivots, int64_t out_features)
      : columns(dense(pivots)), bits(static_cast<size_t>(out_features / 64 + 1), 0) {
    mark(where, out_features);
    const int32_t* values = columns.const_data_ptr<int32_t>();
    if (std::is_sorted(values, values + columns.size(0))) return;
    order = argsort(columns);
    columns = index_select(columns, 0, *order);
  }

  Tensor columns;               // [rank] int32, ascending
  std::vector<uint64_t> bits;   // which columns of the output are pivots
  std::optional<Tensor> order;  // [rank] int64, which of the given pivots they are; none: as given

 private:
  // Throws where a pivot is out of range or repeated.
  void mark(const Where& where, int64_t out_features) {
    const int32_t* values = columns.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < columns.size(0); ++i) {
      const int64_t pivot = values[i];
      if (pivot < 0 || pivot >= out_features) {
        check(false, where, "pivot ", pivot, " is outside [0, ", out_features, ")");
      }
      const uint64_t bit = uint64_t{1} << (pivot % 64);
      if (bits[pivot / 64] & bit) check(false, where, "pivot ", pivot, " is repeated");
      bits[pivot / 64] |= bit;
    }
  }
};

}  // namespace eigenprune
