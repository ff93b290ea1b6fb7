// SPDX-License-Identifier: Apache-2.0
// eigenprune::grouped_linear on CPU.

#include <torch/csrc/stable/library.h>

#include "linear_layers.h"

namespace eigenprune {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

std::vector<Tensor> grouped_linear_cpu(
    const Tensor& x, const Tensors& right, const Tensors& left, const OptionalTensors& pivots,
    const OptionalTensors& bias) {
  const char* op = "eigenprune::grouped_linear";
  check_equal_lengths(op, right.size(), left.size(), pivots.size(), bias.size());
  std::vector<LinearLayer> layers;
  layers.reserve(right.size());
  for (size_t i = 0; i < right.size(); ++i) {
    layers.push_back({{op, static_cast<int64_t>(i)}, right[i], left[i], pivots[i], bias[i]});
  }
  return apply_linear_layers(x, layers);
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("grouped_linear", TORCH_BOX(&eigenprune::grouped_linear_cpu));
}
