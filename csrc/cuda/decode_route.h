// SPDX-License-Identifier: Apache-2.0
// When a factored linear goes through the decode kernels, and how. Everything else goes through torch's own linear.
#pragma once

#include <cstdlib>
#include <vector>

#include "../products.h"
#include "decode_linear.h"
#include "host.h"

namespace eigenprune {

struct DecodeRule {
  ScalarType dtype;
  int64_t most_rows;
};

// UNMEASURED: written where there was no GPU, and so switched off. benchmarks/bench_linear_cuda.py, which switches them
// on, prints the values to put here. The reason for 16 is a count: up to there, reading the weights takes longer than the arithmetic, and the kernels read
// each weight once in two launches, where torch needs two launches (pair) or four (pivot). float64 is not for decoding.
constexpr DecodeRule kDecodeRules[] = {
    {ScalarType::Float, 16},
    {ScalarType::Half, 16},
    {ScalarType::BFloat16, 16},
};

// Only with EIGENPRUNE_CUDA_DECODE=1 in the environment, until the table above is measured. Read once.
inline bool decode_is_on() {
  static const char* const kWish = std::getenv("EIGENPRUNE_CUDA_DECODE");
  return kWish != nullptr && kWish[0] == '1';
}

// A factor that is no plain row-major matrix is left to torch, which need not copy it.
inline bool takes_decode(const Tensor& x, const Tensor& right, const Tensor& left) {
  if (!decode_is_on()) return false;
  const int64_t rows = count_rows(x);
  for (const DecodeRule& rule : kDecodeRules) {
    if (rule.dtype != x.scalar_type()) continue;
    return rows >= 1 && rows <= rule.most_rows && right.is_contiguous() && left.is_contiguous();
  }
  return false;
}

// After the checks, on the device of x, where takes_decode holds. Allocates by torch before it launches, so it may be
// captured; the scratch returns to torch's allocator in stream order.
inline Tensor decode_linear(
    const char* op, const Tensor& x, const Tensor& right, const Tensor& left, const std::optional<Tensor>& pivots,
    const std::optional<Tensor>& bias) {
  const int64_t rows = count_rows(x), rank = right.size(0), left_rows = left.size(0);
  const Tensor dense_x = dense(x);
  std::optional<Tensor> dense_pivots, dense_bias, rest;
  if (bias.has_value()) dense_bias = dense(*bias);
  if (pivots.has_value()) {
    dense_pivots = dense(*pivots);
    rest = torch::stable::new_empty(x, std::vector<int64_t>{1 + left_rows}, ScalarType::Long);
  }
  Tensor z = torch::stable::new_empty(x, std::vector<int64_t>{rows, rank});
  Tensor y = torch::stable::new_empty(x, output_shape(x, left_rows + (pivots.has_value() ? rank : 0)));

  EigenpruneDecodeProblem problem = {};
  problem.x = dense_x.const_data_ptr();
  problem.right = right.const_data_ptr();
  problem.left = left.const_data_ptr();
  problem.bias = dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr;
  problem.pivots = dense_pivots.has_value() ? dense_pivots->const_data_ptr<int32_t>() : nullptr;
  problem.z = z.mutable_data_ptr();
  problem.rest = rest.has_value() ? rest->mutable_data_ptr<int64_t>() : nullptr;
  problem.y = y.mutable_data_ptr();
  problem.in_features = right.size(1);
  problem.rank = rank;
  problem.left_rows = left_rows;
  void* stream = current_stream(op, x.get_device_index());
  check_launch(op, eigenprune_decode_linear(launcher_dtype(x.scalar_type()), &problem, 1, rows, stream));
  return y;
}

}  // namespace eigenprune
