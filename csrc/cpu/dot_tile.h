// SPDX-License-Identifier: Apache-2.0
// The loops of every dot kernel. Included between EIGENPRUNE_TARGET_BEGIN and _END of one instruction set, once per file.
//
// `Set` describes the instruction set and the dtypes:
//   Weight, X               element types in memory
//   Part                    a register of kStep elements, ready to multiply
//   Sum                     a register of partial sums
//   kStep                   elements per step
//   kRows, kVectors         rows of the weight (2 or 4) and vectors that are multiplied side by side: as many as there
//                           are registers for kRows x kVectors sums, kVectors parts of x and one of the weight
//   weight(p), weight(p, n) kStep elements, or n < kStep of them and zeros
//   x(p), x(p, n)           likewise
//   zero(), add(sum, a, b)  sum + a * b
//   totals(a, b, c, d)      the sums of the lanes of four registers, as an __m128

namespace eigenprune {
namespace {

// Asks for what lies `elements` behind p, to have it in the level-2 cache. By number: it may lie behind the weight, where
// a pointer must not go, and asking does no harm.
template <typename T>
inline void prefetch(const T* p, int64_t elements) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + elements * sizeof(T)), _MM_HINT_T1);
}

// kRows rows of the weight times kVectors vectors: every element that is loaded is used kRows or kVectors times.
template <class Set, int kRows, int kVectors>
inline void dot_tile(
    const typename Set::Weight* weight, const typename Set::X* x, int64_t k, float* out, int64_t out_stride) {
  typename Set::Sum sums[4][kVectors];  // rows past kRows stay zero
#pragma GCC unroll 4
  for (int row = 0; row < 4; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[row][v] = Set::zero();
  }
  int64_t i = 0;
  for (; i + Set::kStep <= k; i += Set::kStep) {
    typename Set::Part parts[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) parts[v] = Set::x(x + v * k + i);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      prefetch(weight + row * k + i, kRows * k);
      const typename Set::Part part = Set::weight(weight + row * k + i);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[row][v] = Set::add(sums[row][v], part, parts[v]);
    }
  }
  if (i < k) {
    const int rest = static_cast<int>(k - i);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const typename Set::Part part = Set::x(x + v * k + i, rest);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        sums[row][v] = Set::add(sums[row][v], Set::weight(weight + row * k + i, rest), part);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const __m128 totals = Set::totals(sums[0][v], sums[1][v], sums[2][v], sums[3][v]);
    float* target = out + v * out_stride;
    if constexpr (kRows == 4) {
      _mm_storeu_ps(target, totals);
    } else {
      float some[4];
      _mm_storeu_ps(some, totals);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) target[row] = some[row];
    }
  }
}

template <class Set, int kRows, int kVectors>
inline void dot_vectors(
    const typename Set::Weight* weight, const typename Set::X* x, int64_t x_rows, int64_t k, float* out,
    int64_t out_stride) {
  int64_t v = 0;
  for (; v + kVectors <= x_rows; v += kVectors) {
    dot_tile<Set, kRows, kVectors>(weight, x + v * k, k, out + v * out_stride, out_stride);
  }
  if constexpr (kVectors > 1) {
    dot_vectors<Set, kRows, kVectors - 1>(weight, x + v * k, x_rows - v, k, out + v * out_stride, out_stride);
  }
}

// All rows, kRows at a time, then fewer.
template <class Set, int kRows>
inline void dot_rows(
    const typename Set::Weight* weight, int64_t weight_rows, const typename Set::X* x, int64_t x_rows, int64_t k,
    float* out, int64_t out_stride) {
  int64_t row = 0;
  for (; row + kRows <= weight_rows; row += kRows) {
    dot_vectors<Set, kRows, Set::kVectors>(weight + row * k, x, x_rows, k, out + row, out_stride);
  }
  if constexpr (kRows > 1) {
    dot_rows<Set, kRows - 1>(weight + row * k, weight_rows - row, x, x_rows, k, out + row, out_stride);
  }
}

template <class Set>
void dots(
    const void* weight, int64_t weight_rows, const void* x, int64_t x_rows, int64_t k, float* out,
    int64_t out_stride) {
  dot_rows<Set, Set::kRows>(
      static_cast<const typename Set::Weight*>(weight), weight_rows, static_cast<const typename Set::X*>(x), x_rows, k,
      out, out_stride);
}

// Compiled to vector instructions of the set; the loops below are what the compiler recognises best.

[[maybe_unused]] void round_to_float(const float* sums, int64_t count, void* out_data) {
  float* out = static_cast<float*>(out_data);
  for (int64_t i = 0; i < count; ++i) out[i] = sums[i];
}

[[maybe_unused]] void round_to_bfloat16(const float* sums, int64_t count, void* out_data) {
  uint16_t* out = static_cast<uint16_t*>(out_data);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, sums[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);  // NaN stays NaN
  }
}

}  // namespace
}  // namespace eigenprune
