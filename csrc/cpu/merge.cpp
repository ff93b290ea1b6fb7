// SPDX-License-Identifier: Apache-2.0

#include "merge.h"

#include "level.h"
#include "target.h"

namespace eigenprune {
namespace {

template <typename Element>
void merge_one_by_one(
    const uint64_t* is_pivot, int64_t begin, int64_t end, const void* pivot_values, const void* other_values,
    void* merged) {
  const auto* pivots = static_cast<const Element*>(pivot_values);
  const auto* others = static_cast<const Element*>(other_values);
  auto* out = static_cast<Element*>(merged);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t bit = static_cast<int64_t>(is_pivot[c / 64] >> (c % 64) & 1u);
    const Element* const next[] = {others, pivots};  // no branch: which way a column goes cannot be foreseen
    *out++ = *next[bit];
    pivots += bit;
    others += 1 - bit;
  }
}

}  // namespace
}  // namespace eigenprune

#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12 warns of variables inside its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

EIGENPRUNE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")

namespace eigenprune {
namespace {

struct Four {
  using Element = int32_t;
  static constexpr int kLanes = 16;
  static uint64_t first(int64_t count) { return _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count)); }
  static __m512i spread(const Element* p, uint64_t lanes, int count) {
    const auto read = static_cast<__mmask16>(first(count));
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(lanes), _mm512_maskz_loadu_epi32(read, p));
  }
  static void store(Element* p, uint64_t lanes, __m512i values) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(lanes), values);
  }
};

struct Two {
  using Element = int16_t;
  static constexpr int kLanes = 32;
  static uint64_t first(int64_t count) { return Four::first(count); }
  static __m512i spread(const Element* p, uint64_t lanes, int count) {
    const auto read = static_cast<__mmask32>(first(count));
    return _mm512_maskz_expand_epi16(static_cast<__mmask32>(lanes), _mm512_maskz_loadu_epi16(read, p));
  }
  static void store(Element* p, uint64_t lanes, __m512i values) {
    _mm512_mask_storeu_epi16(p, static_cast<__mmask32>(lanes), values);
  }
};

// Thirty-two bits or more from bit c on; nothing past the word of bit `end` is read.
inline uint64_t bits_from(const uint64_t* bits, int64_t c, int64_t end) {
  const int64_t word = c / 64, shift = c % 64;
  if (shift <= 32 || word == end / 64) return bits[word] >> shift;
  return bits[word] >> shift | bits[word + 1] << (64 - shift);
}

// A register of columns a step: each source is read without gaps, and its elements are spread to where their bits are.
template <class Size>
void merge_avx512(
    const uint64_t* is_pivot, int64_t begin, int64_t end, const void* pivot_values, const void* other_values,
    void* merged) {
  const auto* pivots = static_cast<const typename Size::Element*>(pivot_values);
  const auto* others = static_cast<const typename Size::Element*>(other_values);
  auto* out = static_cast<typename Size::Element*>(merged);
  for (int64_t c = begin; c < end; c += Size::kLanes) {
    const uint64_t columns = Size::first(end - c < Size::kLanes ? end - c : Size::kLanes);
    const uint64_t from_pivots = bits_from(is_pivot, c, end) & columns, from_others = ~from_pivots & columns;
    const int pivot_count = __builtin_popcountll(from_pivots), other_count = __builtin_popcountll(from_others);
    const __m512i pivot_part = Size::spread(pivots, from_pivots, pivot_count);
    Size::store(out, columns, _mm512_or_si512(pivot_part, Size::spread(others, from_others, other_count)));
    pivots += pivot_count;
    others += other_count;
    out += Size::kLanes;
  }
}

}  // namespace
}  // namespace eigenprune

EIGENPRUNE_TARGET_END
#endif

namespace eigenprune {

MergeFunction merge_function(int64_t element_size) {
#if defined(__x86_64__)
  if (cpu_level() >= CpuLevel::kAvx512) {
    __builtin_cpu_init();
    static const bool can_spread =
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (can_spread && element_size == 4) return &merge_avx512<Four>;
    if (can_spread && element_size == 2) return &merge_avx512<Two>;
  }
#endif
  switch (element_size) {
    case 2: return &merge_one_by_one<int16_t>;
    case 4: return &merge_one_by_one<int32_t>;
    default: return &merge_one_by_one<int64_t>;
  }
}

}  // namespace eigenprune
