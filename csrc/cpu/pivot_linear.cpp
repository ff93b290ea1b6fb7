// SPDX-License-Identifier: Apache-2.0
// eigenprune::pivot_linear on CPU.

#include <torch/csrc/stable/library.h>

#include "linear_layers.h"

namespace eigenprune {
namespace {

Tensor pivot_linear_cpu(
    const Tensor& x, const Tensor& right, const Tensor& left, const Tensor& pivots,
    const std::optional<Tensor>& bias) {
  return apply_linear_layers(x, {{"eigenprune::pivot_linear", right, left, pivots, bias}}).front();
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("pivot_linear", TORCH_BOX(&eigenprune::pivot_linear_cpu));
}
