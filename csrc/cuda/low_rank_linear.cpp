// SPDX-License-Identifier: Apache-2.0
// eigenprune::low_rank_linear on CUDA: the decode kernels for a few rows, two of torch's own products for many.

#include "decode_route.h"

namespace eigenprune {
namespace {

constexpr const char* kOp = "eigenprune::low_rank_linear";

Tensor low_rank_linear_cuda(
    const Tensor& x, const Tensor& right, const Tensor& left, const std::optional<Tensor>& bias) {
  check_factors(kOp, x, right, left, bias, /*left_holds_all_rows=*/true);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (takes_decode(x, right, left)) return decode_linear(kOp, x, right, left, std::nullopt, bias);
  return linear(linear(x, right), left, bias);
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CUDA, library) {
  library.impl("low_rank_linear", TORCH_BOX(&eigenprune::low_rank_linear_cuda));
}
