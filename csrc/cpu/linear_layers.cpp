// SPDX-License-Identifier: Apache-2.0

#include "linear_layers.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../products.h"
#include "factored_linear.h"
#include "merge.h"
#include "pivot_columns.h"

namespace eigenprune {
namespace {

// One layer of a call: its inputs, checked, and what is made of them.
class Layer {
 public:
  Layer(const LinearLayer& given, const Tensor& x) : given_(given) {
    check_factors(given.where, x, given.right, given.left, given.bias, !given.pivots.has_value());
    if (given.pivots.has_value()) check_pivot_shape(given.where, given.right, *given.pivots, x);
    rank_ = given.right.size(0);
    out_ = given.left.size(0) + (given.pivots.has_value() ? rank_ : 0);
    if (given.pivots.has_value()) pivots_.emplace(given.where, *given.pivots, out_);
    if (given.bias.has_value()) bias_ = dense(*given.bias);
  }

  int64_t rank() const { return rank_; }
  const Tensor& y() const { return *y_; }

  // For this package's own kernels: everything contiguous, and room for y.
  FactoredLayer pointers(const Tensor& x) {
    right_ = dense(given_.right);
    left_ = dense(given_.left);
    y_ = torch::stable::new_empty(x, output_shape(x, out_));
    const bool has_order = pivots_.has_value() && pivots_->order.has_value();
    return {
        .right = right_->const_data_ptr(),
        .left = left_->const_data_ptr(),
        .bias = bias_data(),
        .pivots = pivots_.has_value() ? pivots_->columns.const_data_ptr<int32_t>() : nullptr,
        .is_pivot = pivots_.has_value() ? pivots_->bits.data() : nullptr,
        .z_order = has_order ? pivots_->order->const_data_ptr<int64_t>() : nullptr,
        .y = y_->mutable_data_ptr(),
        .rank = rank_,
        .out = out_};
  }

  // Two of torch's own products; in layout pivot then a pass that merges their columns and adds the bias.
  void use_torch(const Tensor& x) {
    if (!pivots_.has_value()) {
      y_ = linear(linear(x, given_.right), given_.left, given_.bias);
      return;
    }
    Tensor z = linear_for_pointer(x, given_.right);
    const Tensor mixed = linear_for_pointer(z, given_.left);
    if (pivots_->order.has_value()) z = index_select(z, x.dim() - 1, *pivots_->order);
    y_ = torch::stable::new_empty(x, output_shape(x, out_));
    switch (x.scalar_type()) {
      case ScalarType::Float: return merge_columns<float>(z, mixed, count_rows(x));
      case ScalarType::Double: return merge_columns<double>(z, mixed, count_rows(x));
      case ScalarType::Half: return merge_columns<c10::Half>(z, mixed, count_rows(x));
      case ScalarType::BFloat16: return merge_columns<c10::BFloat16>(z, mixed, count_rows(x));
      default: check(false, given_.where, "x has an unsupported dtype");
    }
  }

 private:
  const void* bias_data() const { return bias_.has_value() ? bias_->const_data_ptr() : nullptr; }

  // z [rows, rank] and mixed [rows, out - rank], contiguous, to y [rows, out].
  template <typename T>
  void merge_columns(const Tensor& z, const Tensor& mixed, int64_t rows) {
    const T* z_data = z.const_data_ptr<T>();
    const T* mixed_data = mixed.const_data_ptr<T>();
    const T* bias = static_cast<const T*>(bias_data());
    T* y_data = y_->mutable_data_ptr<T>();
    const MergeFunction merge = merge_function(sizeof(T));
    parallel_for_rows(rows, out_, [&](int64_t row) {
      T* target = y_data + row * out_;
      merge(pivots_->bits.data(), 0, out_, z_data + row * rank_, mixed_data + row * (out_ - rank_), target);
      if (bias == nullptr) return;
      // Rounded twice, as in `linear(...) + bias`.
      for (int64_t c = 0; c < out_; ++c) target[c] = static_cast<T>(target[c] + bias[c]);
    });
  }

  const LinearLayer& given_;
  int64_t rank_, out_;
  std::optional<PivotColumns> pivots_;
  std::optional<Tensor> right_, left_, bias_, y_;
};

}  // namespace

std::vector<Tensor> apply_linear_layers(const Tensor& x, const std::vector<LinearLayer>& given) {
  std::vector<Layer> layers;
  layers.reserve(given.size());
  for (const LinearLayer& layer : given) layers.emplace_back(layer, x);
  if (layers.empty()) return {};

  const int64_t rows = count_rows(x), in = x.size(x.dim() - 1);
  std::vector<FactoredLayer> together;
  for (Layer& layer : layers) {
    if (serves_factored_linear(x.scalar_type(), rows, in, layer.rank())) {
      together.push_back(layer.pointers(x));
    } else {
      layer.use_torch(x);
    }
  }
  if (!together.empty()) {
    const Tensor dense_x = dense(x);
    factored_linear(x.scalar_type(), dense_x.const_data_ptr(), rows, in, together);
  }
  std::vector<Tensor> outputs;
  for (const Layer& layer : layers) outputs.push_back(layer.y());
  return outputs;
}

}  // namespace eigenprune
