// SPDX-License-Identifier: Apache-2.0
// eigenprune::merge_columns on CPU.

#include <torch/csrc/stable/library.h>

#include "merge.h"
#include "pivot_columns.h"

namespace eigenprune {
namespace {

constexpr const char* kOp = "eigenprune::merge_columns";

Tensor merge_columns_cpu(const Tensor& z, const Tensor& rest, const Tensor& pivots) {
  check_parts(kOp, z, rest, pivots);
  const int64_t rank = pivots.size(0), others = rest.size(rest.dim() - 1), out = rank + others;
  const PivotColumns found(kOp, pivots, out);
  const Tensor pivot_values = dense(found.order.has_value() ? index_select(z, z.dim() - 1, *found.order) : z);
  const Tensor other_values = dense(rest);
  Tensor y = torch::stable::new_empty(z, output_shape(z, out));
  const auto size = static_cast<int64_t>(y.element_size());
  const auto* from_pivots = static_cast<const char*>(pivot_values.const_data_ptr());
  const auto* from_others = static_cast<const char*>(other_values.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const MergeFunction merge = merge_function(size);
  parallel_for_rows(count_rows(z), out, [&](int64_t row) {
    merge(found.bits.data(), 0, out, from_pivots + row * rank * size, from_others + row * others * size,
          to + row * out * size);
  });
  return y;
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("merge_columns", TORCH_BOX(&eigenprune::merge_columns_cpu));
}
