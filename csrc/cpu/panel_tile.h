// SPDX-License-Identifier: Apache-2.0
// The same products as dot_tile.h, for many vectors: a block of the weight is turned on its side first, so that one
// register holds one element (or pair) of sixteen rows and no sum has to be folded up in the end. Turning costs a pass,
// so it pays from some thirty vectors on. AVX-512 only. Included between EIGENPRUNE_TARGET_BEGIN and _END.
//
// `Set` is that of dot_tile.h, with 32-bit units of one float or two bfloat16 in its parts, and
//   broadcast(p)   the unit at p, sixteen times

namespace eigenprune {
namespace {

constexpr int kPanelUnits = 256;   // depth of a panel: 64 columns x 256 units x 4 bytes, a small part of a level-2 cache
constexpr int kPanelColumns = 64;  // four registers wide
constexpr int kPanelVectors = 6;   // 6 x 4 sums + 4 + 1 of 32 registers

// panel[u * 16 * kWide + n] = unit u of weight row n, for `columns` rows and `count` elements; zeros elsewhere.
template <class Set, int kWide>
inline void fill_panel(const typename Set::Weight* weight, int columns, int64_t k, int count, int32_t* panel) {
  for (int wide = 0; wide < kWide; ++wide) {
    for (int i = 0; i < count; i += Set::kStep) {
      __m512i units[16];
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) {
        const int column = wide * 16 + row;
        if (column >= columns) {
          units[row] = _mm512_setzero_si512();
        } else if (count - i >= Set::kStep) {
          units[row] = Set::units(Set::weight(weight + column * k + i));
        } else {
          units[row] = Set::units(Set::weight(weight + column * k + i, count - i));
        }
      }
      transpose(units);
      int32_t* target = panel + (i / Set::kStep * 16 * kWide + wide) * 16;
#pragma GCC unroll 16
      for (int unit = 0; unit < 16; ++unit) _mm512_storeu_si512(target + unit * 16 * kWide, units[unit]);
    }
  }
}

// kVectors vectors times 16 * kWide columns, added to `out` unless this is the first panel of the sums.
template <class Set, int kWide, int kVectors>
inline void panel_tile(
    const int32_t* panel, int units, const typename Set::X* x, int64_t k, bool is_first, const __mmask16* columns,
    float* out, int64_t out_stride) {
  constexpr int kPerUnit = Set::kStep / 16;
  typename Set::Sum sums[kVectors][kWide];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int wide = 0; wide < kWide; ++wide) {
      sums[v][wide] = is_first ? Set::zero() : _mm512_maskz_loadu_ps(columns[wide], out + v * out_stride + wide * 16);
    }
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    typename Set::Part parts[kWide];
#pragma GCC unroll 4
    for (int wide = 0; wide < kWide; ++wide) parts[wide] = Set::part(panel + (unit * kWide + wide) * 16);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const typename Set::Part same = Set::broadcast(x + v * k + unit * kPerUnit);
#pragma GCC unroll 4
      for (int wide = 0; wide < kWide; ++wide) sums[v][wide] = Set::add(sums[v][wide], parts[wide], same);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int wide = 0; wide < kWide; ++wide) {
      _mm512_mask_storeu_ps(out + v * out_stride + wide * 16, columns[wide], sums[v][wide]);
    }
  }
}

template <class Set, int kWide, int kVectors>
inline void panel_vectors(
    const int32_t* panel, int units, const typename Set::X* x, int64_t x_rows, int64_t k, bool is_first,
    const __mmask16* columns, float* out, int64_t out_stride) {
  int64_t v = 0;
  for (; v + kVectors <= x_rows; v += kVectors) {
    panel_tile<Set, kWide, kVectors>(panel, units, x + v * k, k, is_first, columns, out + v * out_stride, out_stride);
  }
  if constexpr (kVectors > 1) {
    panel_vectors<Set, kWide, kVectors - 1>(
        panel, units, x + v * k, x_rows - v, k, is_first, columns, out + v * out_stride, out_stride);
  }
}

template <class Set, int kWide>
inline void panel_columns(
    const typename Set::Weight* weight, int columns, const typename Set::X* x, int64_t x_rows, int64_t k, float* out,
    int64_t out_stride) {
  constexpr int kPerUnit = Set::kStep / 16, kDepth = kPanelUnits * kPerUnit;
  alignas(64) int32_t panel[kPanelUnits * 16 * kWide];
  __mmask16 lanes[kWide];
  for (int wide = 0; wide < kWide; ++wide) {
    const int here = columns - wide * 16;
    lanes[wide] = static_cast<__mmask16>(here >= 16 ? 0xffffu : (1u << here) - 1u);
  }
  for (int64_t i = 0; i < k || i == 0; i += kDepth) {  // once at least: no element at all is a sum of zero
    const int count = static_cast<int>(k - i < kDepth ? k - i : kDepth);
    fill_panel<Set, kWide>(weight + i, columns, k, count, panel);
    panel_vectors<Set, kWide, kPanelVectors>(panel, count / kPerUnit, x + i, x_rows, k, i == 0, lanes, out, out_stride);
  }
}

template <class Set>
void panels(
    const void* weight_data, int64_t weight_rows, const void* x_data, int64_t x_rows, int64_t k, float* out,
    int64_t out_stride) {
  const auto* weight = static_cast<const typename Set::Weight*>(weight_data);
  const auto* x = static_cast<const typename Set::X*>(x_data);
  for (int64_t row = 0; row < weight_rows; row += kPanelColumns) {
    const int columns = static_cast<int>(weight_rows - row < kPanelColumns ? weight_rows - row : kPanelColumns);
    const typename Set::Weight* rows = weight + row * k;
    switch ((columns + 15) / 16) {
      case 4: panel_columns<Set, 4>(rows, columns, x, x_rows, k, out + row, out_stride); break;
      case 3: panel_columns<Set, 3>(rows, columns, x, x_rows, k, out + row, out_stride); break;
      case 2: panel_columns<Set, 2>(rows, columns, x, x_rows, k, out + row, out_stride); break;
      default: panel_columns<Set, 1>(rows, columns, x, x_rows, k, out + row, out_stride); break;
    }
  }
}

}  // namespace
}  // namespace eigenprune
