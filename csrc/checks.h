// SPDX-License-Identifier: Apache-2.0
// Input checks in front of every backend; the twin of eigenprune/ops/_checks.py, with the same messages.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace eigenprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a message is about: an operator, or one layer of a call that has several.
struct Where {
  const char* op;
  int64_t layer;  // -1: the operator has but one

  Where(const char* op, int64_t layer = -1) : op(op), layer(layer) {}  // not explicit: a name alone will do
};

// Throws "<op>: <message>". Not STD_TORCH_CHECK, which puts the path of this file on the build machine in the text.
template <typename... Parts>
inline void check(bool holds, const Where& where, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  text << where.op << ": ";
  if (where.layer >= 0) text << "layer " << where.layer << ": ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

inline std::string shape_text(const char* name, const Tensor& tensor) {
  std::string text = std::string(name) + " [";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text += (dim ? ", " : "") + std::to_string(tensor.size(dim));
  }
  return text + "]";
}

inline std::string pair_text(const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  return " (" + shape_text(a_name, a) + ", " + shape_text(b_name, b) + ")";
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    default: return "another dtype";
  }
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
      dtype == ScalarType::BFloat16;
}

inline void check_same_kind(const Where& op, const char* name, const Tensor& tensor, const Tensor& x) {
  // The texts are built only when a check fails: this runs once per layer and token.
  if (tensor.scalar_type() != x.scalar_type()) {
    check(false, op, name, " and x must have one dtype (", dtype_text(tensor.scalar_type()), ", ",
          dtype_text(x.scalar_type()), ")");
  }
  check(tensor.device() == x.device(), op, name, " and x must be on the same device");
}

// x [..., in], right [rank, in], left [*, rank], bias [out_features] or none; one dtype, one device.
inline void check_factors(
    const Where& op, const Tensor& x, const Tensor& right, const Tensor& left, const std::optional<Tensor>& bias,
    bool left_holds_all_rows) {
  if (x.dim() < 1) check(false, op, "x must have at least one dimension", pair_text("x", x, "right", right));
  if (right.dim() != 2 || left.dim() != 2) {
    check(false, op, "right and left must be matrices", pair_text("right", right, "left", left));
  }
  if (x.size(x.dim() - 1) != right.size(1)) {
    check(false, op, "the last dimension of x must equal the columns of right", pair_text("x", x, "right", right));
  }
  if (left.size(1) != right.size(0)) {
    check(false, op, "the columns of left must equal the rows of right", pair_text("right", right, "left", left));
  }
  const int64_t out_features = left.size(0) + (left_holds_all_rows ? 0 : right.size(0));
  if (bias.has_value() && (bias->dim() != 1 || bias->size(0) != out_features)) {
    check(false, op, "bias must be [", out_features, "]", pair_text("left", left, "bias", *bias));
  }
  if (!is_supported(x.scalar_type())) {
    check(false, op, "x must be float32, bfloat16, float16 or float64, not ", dtype_text(x.scalar_type()));
  }
  check_same_kind(op, "right", right, x);
  check_same_kind(op, "left", left, x);
  if (bias.has_value()) check_same_kind(op, "bias", *bias, x);
}

// pivots int32 [rank] on the device of x. The values are checked where they are read.
inline void check_pivot_shape(const Where& op, const Tensor& right, const Tensor& pivots, const Tensor& x) {
  if (pivots.dim() != 1 || pivots.size(0) != right.size(0)) {
    check(false, op, "pivots must be [rank]", pair_text("right", right, "pivots", pivots));
  }
  check(pivots.scalar_type() == ScalarType::Int, op, "pivots must be torch.int32, not ",
        dtype_text(pivots.scalar_type()));
  check(pivots.device() == x.device(), op, "pivots and x must be on the same device");
}

// A tensor [..., columns] that pivots [rank] divide.
inline void check_columns(const Where& op, const char* name, const Tensor& tensor, const Tensor& pivots) {
  if (tensor.dim() < 1 || pivots.dim() != 1) {
    check(false, op, name, " must have at least one dimension, and pivots one", pair_text(name, tensor, "pivots", pivots));
  }
  if (!is_supported(tensor.scalar_type())) {
    check(false, op, name, " must be float32, bfloat16, float16 or float64, not ", dtype_text(tensor.scalar_type()));
  }
  check(pivots.scalar_type() == ScalarType::Int, op, "pivots must be torch.int32, not ",
        dtype_text(pivots.scalar_type()));
  check(pivots.device() == tensor.device(), op, "pivots and ", name, " must be on the same device");
}

// z [..., rank] and rest [..., out - rank], to be put together by pivots [rank].
inline void check_parts(const Where& op, const Tensor& z, const Tensor& rest, const Tensor& pivots) {
  check_columns(op, "z", z, pivots);
  bool fits = z.dim() == rest.dim() && z.size(z.dim() - 1) == pivots.size(0);
  for (int64_t dim = 0; fits && dim + 1 < z.dim(); ++dim) fits = z.size(dim) == rest.size(dim);
  if (!fits) {
    check(false, op, "z must be [..., rank], rest [..., out - rank] and pivots [rank]", pair_text("z", z, "rest", rest));
  }
  if (rest.scalar_type() != z.scalar_type()) {
    check(false, op, "rest and z must have one dtype (", dtype_text(rest.scalar_type()), ", ",
          dtype_text(z.scalar_type()), ")");
  }
  check(rest.device() == z.device(), op, "rest and z must be on the same device");
}

// A call with several layers has one entry for each in every list.
inline void check_equal_lengths(const Where& op, size_t right, size_t left, size_t pivots, size_t bias) {
  if (left == right && pivots == right && bias == right) return;
  check(false, op, "right, left, pivots and bias must have one entry a layer (they have ", right, ", ", left, ", ",
        pivots, " and ", bias, ")");
}

}  // namespace eigenprune
