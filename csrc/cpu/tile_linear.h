// SPDX-License-Identifier: Apache-2.0
// Factored linears in bfloat16 on AMX tiles (amx_tiles.h), both products in one go.
#pragma once

#include <cstdint>
#include <vector>

#include "factored_linear.h"

namespace eigenprune {

// Fills y of every layer from the same x [rows, in]; everything is bfloat16. Sums are formed in float32 and rounded once,
// between the products too. Neither the number of threads nor of rows changes what a row of y is.
void tile_linear(const void* x, int64_t rows, int64_t in, const std::vector<FactoredLayer>& layers);

}  // namespace eigenprune
