// SPDX-License-Identifier: Apache-2.0
// eigenprune::pivot_linear on CPU: two of torch's own products, then one pass that interleaves their rows and adds bias.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../checks.h"
#include "../products.h"

namespace eigenprune {
namespace {

constexpr const char* kOp = "eigenprune::pivot_linear";

// A thread gets at least this many output elements: torch's own grain for element-wise work (at::internal::GRAIN_SIZE).
constexpr int64_t kGrainElements = 32768;

// Where every column of (z | mixed) goes in the output: pivots as given, then the other positions ascending.
std::vector<int64_t> column_targets(const Tensor& pivots, int64_t out_features) {
  const int64_t rank = pivots.size(0);
  const int64_t stride = rank > 0 ? pivots.stride(0) : 0;  // in elements
  const int32_t* values = pivots.const_data_ptr<int32_t>();
  std::vector<int64_t> targets(static_cast<size_t>(out_features));
  std::vector<char> is_pivot(static_cast<size_t>(out_features), 0);  // bytes: twice as quick as packed bits
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t pivot = values[i * stride];
    check(pivot >= 0 && pivot < out_features, kOp, "pivot ", pivot, " is outside [0, ", out_features, ")");
    check(!is_pivot[pivot], kOp, "pivot ", pivot, " is repeated");
    is_pivot[pivot] = 1;
    targets[i] = pivot;
  }
  int64_t next = rank;
  for (int64_t position = 0; position < out_features; ++position) {
    if (!is_pivot[position]) targets[next++] = position;
  }
  return targets;
}

template <typename T>
void scatter_row(const T* source, const int64_t* targets, int64_t count, const T* bias, T* y) {
  if (bias == nullptr) {
    for (int64_t i = 0; i < count; ++i) y[targets[i]] = source[i];
  } else {
    for (int64_t i = 0; i < count; ++i) y[targets[i]] = source[i] + bias[targets[i]];
  }
}

template <typename T>
void interleave(
    const Tensor& z,                      // [rows, rank], contiguous
    const Tensor& mixed,                  // [rows, out - rank], contiguous
    const std::vector<int64_t>& targets,  // [out]
    const std::optional<Tensor>& bias,    // [out], contiguous
    Tensor& y,                            // [rows, out], contiguous
    int64_t rows, int64_t rank) {
  const int64_t out_features = static_cast<int64_t>(targets.size());
  const T* z_data = z.const_data_ptr<T>();
  const T* mixed_data = mixed.const_data_ptr<T>();
  const T* bias_data = bias.has_value() ? bias->const_data_ptr<T>() : nullptr;
  T* y_data = y.mutable_data_ptr<T>();
  const int64_t grain_rows = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, out_features));
  const auto scatter_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* target = y_data + row * out_features;
      scatter_row(z_data + row * rank, targets.data(), rank, bias_data, target);
      scatter_row(mixed_data + row * (out_features - rank), targets.data() + rank, out_features - rank, bias_data,
                  target);
    }
  };
  torch::stable::parallel_for(0, rows, grain_rows, scatter_rows);
}

Tensor pivot_linear_cpu(
    const Tensor& x, const Tensor& right, const Tensor& left, const Tensor& pivots,
    const std::optional<Tensor>& bias) {
  check_factors(kOp, x, right, left, bias, /*left_holds_all_rows=*/false);
  check_pivot_shape(kOp, right, pivots, x);
  const int64_t rank = right.size(0);
  const int64_t out_features = left.size(0) + rank;
  const std::vector<int64_t> targets = column_targets(pivots, out_features);

  const Tensor z = linear_for_pointer(x, right);
  const Tensor mixed = linear_for_pointer(z, left);
  Tensor y = torch::stable::new_empty(x, output_shape(x, out_features));
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) dense_bias = torch::stable::contiguous(*bias);

  const int64_t rows = count_rows(x);
  switch (x.scalar_type()) {
    case ScalarType::Float: interleave<float>(z, mixed, targets, dense_bias, y, rows, rank); break;
    case ScalarType::Double: interleave<double>(z, mixed, targets, dense_bias, y, rows, rank); break;
    case ScalarType::Half: interleave<c10::Half>(z, mixed, targets, dense_bias, y, rows, rank); break;
    case ScalarType::BFloat16: interleave<c10::BFloat16>(z, mixed, targets, dense_bias, y, rows, rank); break;
    default: check(false, kOp, "x has an unsupported dtype");
  }
  return y;
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("pivot_linear", TORCH_BOX(&eigenprune::pivot_linear_cpu));
}
