// SPDX-License-Identifier: Apache-2.0

#include "linear_path.h"

#include "level.h"

namespace eigenprune {
namespace {

constexpr int64_t kMaxPairRows = 1024;  // above, torch's bfloat16 products are quicker than panels; its others never
// One row: dots and tiles read weights equally fast, dots with less work before. Four rows: tiles read 12 to 19 GB/s where
// dots read 5 to 14 (linear_amx.jsonl, keep 0.9, all shapes), for dots multiply four times as much with the same weight.
constexpr int64_t kMaxRowsBesideTiles = 1;

}  // namespace

LinearPath linear_path(Element element, int64_t rows, int64_t in, int64_t rank) {
  const CpuLevel level = cpu_level();
  if (element == Element::kOther || level < CpuLevel::kAvx2) return LinearPath::kTorch;
  if (element == Element::kBFloat16 && level >= CpuLevel::kAmx && rows > kMaxRowsBesideTiles) return LinearPath::kTiles;
  if (rows <= kMaxDotRows) return LinearPath::kDots;
  if (level < CpuLevel::kAvx512) return LinearPath::kTorch;
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
