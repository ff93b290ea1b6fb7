// SPDX-License-Identifier: Apache-2.0
// eigenprune::low_rank_linear on CPU: its own kernels where this processor has them, two of torch's own products elsewhere.

#include "../checks.h"
#include "../products.h"
#include "factored_linear.h"

namespace eigenprune {
namespace {

Tensor low_rank_linear_cpu(
    const Tensor& x, const Tensor& right, const Tensor& left, const std::optional<Tensor>& bias) {
  check_factors("eigenprune::low_rank_linear", x, right, left, bias, /*left_holds_all_rows=*/true);
  const int64_t rows = count_rows(x);
  if (!serves_factored_linear(x.scalar_type(), rows, x.size(x.dim() - 1), right.size(0))) return linear(linear(x, right), left, bias);

  const int64_t out_features = left.size(0);
  const Tensor dense_x = torch::stable::contiguous(x);
  const Tensor dense_right = torch::stable::contiguous(right), dense_left = torch::stable::contiguous(left);
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) dense_bias = torch::stable::contiguous(*bias);
  Tensor y = torch::stable::new_empty(x, output_shape(x, out_features));
  const FactoredLayer layer{
      .right = dense_right.const_data_ptr(),
      .left = dense_left.const_data_ptr(),
      .bias = dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr,
      .pivots = nullptr,
      .is_pivot = nullptr,
      .z_order = nullptr,
      .y = y.mutable_data_ptr(),
      .rank = right.size(0),
      .out = out_features};
  factored_linear(x.scalar_type(), dense_x.const_data_ptr(), rows, x.size(x.dim() - 1), {layer});
  return y;
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("low_rank_linear", TORCH_BOX(&eigenprune::low_rank_linear_cpu));
}
