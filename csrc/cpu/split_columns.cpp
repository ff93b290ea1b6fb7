// SPDX-License-Identifier: Apache-2.0
// eigenprune::split_columns on CPU.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "merge.h"
#include "pivot_columns.h"

namespace eigenprune {
namespace {

constexpr const char* kOp = "eigenprune::split_columns";

std::tuple<Tensor, Tensor> split_columns_cpu(const Tensor& y, const Tensor& pivots) {
  check_columns(kOp, "y", y, pivots);
  const int64_t rank = pivots.size(0), out = y.size(y.dim() - 1), others = out - rank;
  const PivotColumns found(kOp, pivots, out);
  const Tensor merged = dense(y);
  Tensor z = torch::stable::new_empty(y, output_shape(y, rank));
  Tensor rest = torch::stable::new_empty(y, output_shape(y, others));
  const auto size = static_cast<int64_t>(y.element_size());
  const auto* from = static_cast<const char*>(merged.const_data_ptr());
  auto* to_pivots = static_cast<char*>(z.mutable_data_ptr());
  auto* to_others = static_cast<char*>(rest.mutable_data_ptr());
  const SplitFunction split = split_function(size);
  parallel_for_rows(count_rows(y), out, [&](int64_t row) {
    split(found.bits.data(), 0, out, from + row * out * size, to_pivots + row * rank * size,
          to_others + row * others * size);
  });
  if (found.order.has_value()) z = index_select(z, z.dim() - 1, argsort(*found.order));
  return {z, rest};
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("split_columns", TORCH_BOX(&eigenprune::split_columns_cpu));
}
