// SPDX-License-Identifier: Apache-2.0

#include "linear_path.h"

#include "level.h"

namespace eigenprune {
namespace {

constexpr int64_t kMaxPairRows = 1024;  // above, torch's bfloat16 products are quicker than panels; its others never
// float32 with many rows: on Intel torch's products (165 to 283 GF/s with 512 rows, benchmarks/results/linear_intel.jsonl) are
// quicker than panels, even with the pass that merges pivots; about as quick at 48 rows; and slower on AMD.
constexpr int64_t kMaxPanelRowsOnIntel = 48;
// One row: dots and tiles read weights about equally fast. Four rows, keep 0.9: tiles read 7 to 19 GB/s over the shapes of
// bench_linear.py, dots (with EIGENPRUNE_CPU_KERNELS=avx512_bf16) 5 to 14, and less than tiles in every one of them.
constexpr int64_t kMaxRowsBesideTiles = 1;

}  // namespace

LinearPath linear_path(Element element, int64_t rows, int64_t in, int64_t rank) {
  const CpuLevel level = cpu_level();
  if (element == Element::kOther || level < CpuLevel::kAvx2) return LinearPath::kTorch;
  if (element == Element::kBFloat16 && level >= CpuLevel::kAmx && rows > kMaxRowsBesideTiles) return LinearPath::kTiles;
  if (rows <= kMaxDotRows) return LinearPath::kDots;
  if (level < CpuLevel::kAvx512) return LinearPath::kTorch;
  if (element == Element::kFloat32 && rows > kMaxPanelRowsOnIntel && is_intel()) return LinearPath::kTorch;
  if (element != Element::kBFloat16 || level < CpuLevel::kAvx512Bf16) return LinearPath::kPanels;
  const bool has_pairs = in % 2 == 0 && rank % 2 == 0;  // panels of bfloat16 take two elements at a time
  return rows <= kMaxPairRows && has_pairs ? LinearPath::kPanels : LinearPath::kTorch;
}

const char* linear_path_name(LinearPath path) {
  switch (path) {
    case LinearPath::kDots: return "dots";
    case LinearPath::kPanels: return "panels";
    case LinearPath::kTiles: return "tiles";
    default: return "torch";
  }
}

}  // namespace eigenprune
