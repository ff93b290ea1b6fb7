// SPDX-License-Identifier: Apache-2.0
// What the operators take from torch: its linear (its BLAS, its threads, its choice for low precision), and its sorting.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <vector>

namespace eigenprune {

using torch::stable::Tensor;

// x [..., in], weight [out, in], bias [out] or none -> x @ weight.T + bias, [..., out].
inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias = std::nullopt) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The same, for code that reads the result through a raw pointer: it must be what the pointer's type says.
inline Tensor linear_for_pointer(const Tensor& x, const Tensor& weight) {
  Tensor y = linear(x, weight);
  if (y.scalar_type() != x.scalar_type()) {  // an autocast that was not cast for in front of the operator
    throw std::runtime_error("eigenprune: torch's linear returned another dtype than its input's");
  }
  return torch::stable::contiguous(y);
}

// The order that sorts a vector, int64.
inline Tensor argsort(const Tensor& values) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(values), torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::argsort", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor index_select(const Tensor& tensor, int64_t dim, const Tensor& index) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(tensor), torch::stable::detail::from(dim), torch::stable::detail::from(index)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The shape of x with its last dimension replaced.
inline std::vector<int64_t> output_shape(const Tensor& x, int64_t out_features) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.data(), sizes.data() + sizes.size());
  shape.back() = out_features;
  return shape;
}

// Number of vectors in x: the product of all dimensions but the last.
inline int64_t count_rows(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) rows *= x.size(dim);
  return rows;
}

}  // namespace eigenprune
