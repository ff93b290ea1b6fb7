// SPDX-License-Identifier: Apache-2.0
// eigenprune::low_rank_linear on CUDA: two of torch's own products behind one check.

#include "../checks.h"
#include "../products.h"

namespace eigenprune {
namespace {

Tensor low_rank_linear_cuda(
    const Tensor& x, const Tensor& right, const Tensor& left, const std::optional<Tensor>& bias) {
  check_factors("eigenprune::low_rank_linear", x, right, left, bias, /*left_holds_all_rows=*/true);
  return linear(linear(x, right), left, bias);
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CUDA, library) {
  library.impl("low_rank_linear", TORCH_BOX(&eigenprune::low_rank_linear_cuda));
}
