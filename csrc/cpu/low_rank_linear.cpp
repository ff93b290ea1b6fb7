// SPDX-License-Identifier: Apache-2.0
// eigenprune::low_rank_linear on CPU.

#include <torch/csrc/stable/library.h>

#include "linear_layers.h"

namespace eigenprune {
namespace {

Tensor low_rank_linear_cpu(
    const Tensor& x, const Tensor& right, const Tensor& left, const std::optional<Tensor>& bias) {
  return apply_linear_layers(x, {{"eigenprune::low_rank_linear", right, left, std::nullopt, bias}}).front();
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("low_rank_linear", TORCH_BOX(&eigenprune::low_rank_linear_cpu));
}
