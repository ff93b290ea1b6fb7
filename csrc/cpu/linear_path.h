// SPDX-License-Identifier: Apache-2.0
// Which way a factored linear goes on this processor: one function for the operators and for the report of
// `python -m eigenprune`. No torch header: csrc/module.cpp has it too.
#pragma once

#include <cstdint>

namespace eigenprune {

enum class LinearPath {
  kTorch,   // two of torch's own products
  kDots,    // inner products with every row of a weight, quick for few rows of x
  kPanels,  // blocks of a matrix product, quick for many
  kTiles,   // tiles of bfloat16 that the processor multiplies whole (Intel AMX)
};

enum class Element { kFloat32, kBFloat16, kFloat16, kOther };

constexpr int64_t kMaxDotRows = 16;  // above, panels are quicker than dots: benchmarks/bench_linear.py

// What is quickest for x [rows, in] through factors of `rank`.
LinearPath linear_path(Element element, int64_t rows, int64_t in, int64_t rank);

// "torch", "dots", "panels" or "tiles".
const char* linear_path_name(LinearPath path);

}  // namespace eigenprune
