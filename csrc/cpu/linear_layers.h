// SPDX-License-Identifier: Apache-2.0
// What every operator for factored linears does with its tensors, whether it has one layer or several.
#pragma once

#include <optional>
#include <vector>

#include "../checks.h"

namespace eigenprune {

// One factored linear as an operator was given it: any strides, unchecked.
struct LinearLayer {
  Where where;                   // the operator, for messages
  Tensor right;                  // [rank, in]
  Tensor left;                   // [out, rank]; with pivots [out - rank, rank]
  std::optional<Tensor> pivots;  // [rank] int32, in the order of right's rows; none: layout pair
  std::optional<Tensor> bias;    // [out]
};

// y [..., out] of every layer for the same x [..., in]. Checks all of them first. The layers that this processor has a
// kernel for are computed together; the others one by one by torch's own products.
std::vector<Tensor> apply_linear_layers(const Tensor& x, const std::vector<LinearLayer>& layers);

}  // namespace eigenprune
