// SPDX-License-Identifier: Apache-2.0
// eigenprune::pivot_linear on CPU: its own kernels where this processor has them; elsewhere two of torch's own products,
// then a pass that merges their columns and adds the bias.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../checks.h"
#include "../products.h"
#include "factored_linear.h"
#include "merge.h"

namespace eigenprune {
namespace {

constexpr const char* kOp = "eigenprune::pivot_linear";

// A thread gets at least this many output elements: torch's own grain for element-wise work (at::internal::GRAIN_SIZE).
constexpr int64_t kGrainElements = 32768;

// Which columns of the output are pivots, as bits. Throws where one is out of range or repeated.
std::vector<uint64_t> pivot_bits(const Tensor& pivots, int64_t out_features) {
  std::vector<uint64_t> bits(static_cast<size_t>(out_features / 64 + 1), 0);
  const int32_t* values = pivots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < pivots.size(0); ++i) {
    const int64_t pivot = values[i];
    if (pivot < 0 || pivot >= out_features) check(false, kOp, "pivot ", pivot, " is outside [0, ", out_features, ")");
    const uint64_t bit = uint64_t{1} << (pivot % 64);
    if (bits[pivot / 64] & bit) check(false, kOp, "pivot ", pivot, " is repeated");
    bits[pivot / 64] |= bit;
  }
  return bits;
}

// Merging wants pivots in ascending order, and this package writes them so; others are sorted here.
struct AscendingPivots {
  Tensor columns;               // [rank] int32, ascending
  std::optional<Tensor> order;  // [rank] int64, which of the given pivots they are; none: as given

  explicit AscendingPivots(const Tensor& pivots) : columns(torch::stable::contiguous(pivots)) {
    const int32_t* values = columns.const_data_ptr<int32_t>();
    if (std::is_sorted(values, values + columns.size(0))) return;
    order = argsort(columns);
    columns = index_select(columns, 0, *order);
  }
};

template <typename T>
void add_bias(const T* bias, int64_t count, T* y) {
  // Rounded twice, as in `linear(...) + bias`.
  for (int64_t c = 0; c < count; ++c) y[c] = static_cast<T>(y[c] + bias[c]);
}

template <typename T>
void merge_columns(
    const Tensor& z,                       // [rows, rank], contiguous
    const Tensor& mixed,                   // [rows, out - rank], contiguous
    const std::vector<uint64_t>& is_pivot,
    const std::optional<Tensor>& bias,     // [out], contiguous
    Tensor& y,                             // [rows, out], contiguous
    int64_t rows, int64_t rank, int64_t out_features) {
  const T* z_data = z.const_data_ptr<T>();
  const T* mixed_data = mixed.const_data_ptr<T>();
  const T* bias_data = bias.has_value() ? bias->const_data_ptr<T>() : nullptr;
  T* y_data = y.mutable_data_ptr<T>();
  const MergeFunction merge = merge_function(sizeof(T));
  const int64_t grain_rows = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, out_features));
  const auto merge_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* target = y_data + row * out_features;
      merge(is_pivot.data(), 0, out_features, z_data + row * rank, mixed_data + row * (out_features - rank), target);
      if (bias_data != nullptr) add_bias(bias_data, out_features, target);
    }
  };
  torch::stable::parallel_for(0, rows, grain_rows, merge_rows);
}

Tensor pivot_linear_cpu(
    const Tensor& x, const Tensor& right, const Tensor& left, const Tensor& pivots,
    const std::optional<Tensor>& bias) {
  check_factors(kOp, x, right, left, bias, /*left_holds_all_rows=*/false);
  check_pivot_shape(kOp, right, pivots, x);
  const int64_t rank = right.size(0), rows = count_rows(x);
  const int64_t out_features = left.size(0) + rank;
  const AscendingPivots ascending(pivots);
  const std::vector<uint64_t> is_pivot = pivot_bits(ascending.columns, out_features);
  Tensor y = torch::stable::new_empty(x, output_shape(x, out_features));
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) dense_bias = torch::stable::contiguous(*bias);

  if (serves_factored_linear(x.scalar_type(), rows, x.size(x.dim() - 1), right.size(0))) {
    const Tensor dense_x = torch::stable::contiguous(x);
    const Tensor dense_right = torch::stable::contiguous(right), dense_left = torch::stable::contiguous(left);
    const FactoredLayer layer{
        .right = dense_right.const_data_ptr(),
        .left = dense_left.const_data_ptr(),
        .bias = dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr,
        .pivots = ascending.columns.const_data_ptr<int32_t>(),
        .is_pivot = is_pivot.data(),
        .z_order = ascending.order.has_value() ? ascending.order->const_data_ptr<int64_t>() : nullptr,
        .y = y.mutable_data_ptr(),
        .rank = rank,
        .out = out_features};
    factored_linear(x.scalar_type(), dense_x.const_data_ptr(), rows, x.size(x.dim() - 1), {layer});
    return y;
  }

  Tensor z = linear_for_pointer(x, right);
  const Tensor mixed = linear_for_pointer(z, left);
  if (ascending.order.has_value()) z = index_select(z, x.dim() - 1, *ascending.order);
  const auto merge = [&]<typename T>() {
    merge_columns<T>(z, mixed, is_pivot, dense_bias, y, rows, rank, out_features);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: merge.template operator()<float>(); break;
    case ScalarType::Double: merge.template operator()<double>(); break;
    case ScalarType::Half: merge.template operator()<c10::Half>(); break;
    case ScalarType::BFloat16: merge.template operator()<c10::BFloat16>(); break;
    default: check(false, kOp, "x has an unsupported dtype");
  }
  return y;
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("pivot_linear", TORCH_BOX(&eigenprune::pivot_linear_cpu));
}
