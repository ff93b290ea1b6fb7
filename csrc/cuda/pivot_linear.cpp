// SPDX-License-Identifier: Apache-2.0
// eigenprune::pivot_linear on CUDA: the decode kernels for a few rows; for many, two of torch's own products, then the
// kernels of pivot_linear.cu.

#include "pivot_linear.h"

#include "decode_route.h"

namespace eigenprune {
namespace {

constexpr const char* kOp = "eigenprune::pivot_linear";

Tensor pivot_linear_cuda(
    const Tensor& x, const Tensor& right, const Tensor& left, const Tensor& pivots,
    const std::optional<Tensor>& bias) {
  check_factors(kOp, x, right, left, bias, /*left_holds_all_rows=*/false);
  check_pivot_shape(kOp, right, pivots, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (takes_decode(x, right, left)) return decode_linear(kOp, x, right, left, pivots, bias);
  const int64_t rank = right.size(0);
  const int64_t out_features = left.size(0) + rank;

  const Tensor z = linear_for_pointer(x, right);
  const Tensor mixed = linear_for_pointer(z, left);
  const Tensor dense_pivots = dense(pivots);
  Tensor source = torch::stable::new_empty(x, std::vector<int64_t>{out_features}, ScalarType::Long);
  Tensor y = torch::stable::new_empty(x, output_shape(x, out_features));
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) dense_bias = dense(*bias);

  void* stream = current_stream(kOp, x.get_device_index());
  check_launch(kOp, eigenprune_pivot_sources(
      dense_pivots.const_data_ptr<int32_t>(), rank, out_features, source.mutable_data_ptr<int64_t>(), stream));
  check_launch(kOp, eigenprune_pivot_interleave(
      launcher_dtype(x.scalar_type()), z.const_data_ptr(), mixed.const_data_ptr(), source.const_data_ptr<int64_t>(),
      dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), count_rows(x), rank,
      out_features, stream));
  return y;
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CUDA, library) {
  library.impl("pivot_linear", TORCH_BOX(&eigenprune::pivot_linear_cuda));
}
