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

template <typename Element>
void split_one_by_one(
    const uint64_t* is_pivot, int64_t begin, int64_t end, const void* merged, void* pivot_values, void* other_values) {
  const auto* in = static_cast<const Element*>(merged);
  auto* pivots = static_cast<Element*>(pivot_values);
  auto* others = static_cast<Element*>(other_values);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t bit = static_cast<int64_t>(is_pivot[c / 64] >> (c % 64) & 1u);
    Element* const next[] = {others, pivots};
    *next[bit] = *in++;
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
  static __m512i load(const Element* p, uint64_t lanes) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), p);
  }
  static __m512i gather(uint64_t lanes, __m512i values) {
    return _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), values);
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
  static __m512i load(const Element* p, uint64_t lanes) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes), p);
  }
  static __m512i gather(uint64_t lanes, __m512i values) {
    return _mm512_maskz_compress_epi16(static_cast<__mmask32>(lanes), values);
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

// A register of columns a step: the elements of each side are drawn together, and written without gaps.
template <class Size>
void split_avx512(
    const uint64_t* is_pivot, int64_t begin, int64_t end, const void* merged, void* pivot_values, void* other_values) {
  const auto* in = static_cast<const typename Size::Element*>(merged);
  auto* pivots = static_cast<typename Size::Element*>(pivot_values);
  auto* others = static_cast<typename Size::Element*>(other_values);
  for (int64_t c = begin; c < end; c += Size::kLanes) {
    const uint64_t columns = Size::first(end - c < Size::kLanes ? end - c : Size::kLanes);
    const uint64_t to_pivots = bits_from(is_pivot, c, end) & columns, to_others = ~to_pivots & columns;
    const int pivot_count = __builtin_popcountll(to_pivots), other_count = __builtin_popcountll(to_others);
    const __m512i values = Size::load(in, columns);
    Size::store(pivots, Size::first(pivot_count), Size::gather(to_pivots, values));
    Size::store(others, Size::first(other_count), Size::gather(to_others, values));
    pivots += pivot_count;
    others += other_count;
    in += Size::kLanes;
  }
}

}  // namespace
}  // namespace eigenprune

EIGENPRUNE_TARGET_END
#endif

namespace eigenprune {
namespace {

bool can_spread() {
#if defined(__x86_64__)
  if (cpu_level() < CpuLevel::kAvx512) return false;
  __builtin_cpu_init();
  static const bool has_instructions =
      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  return has_instructions;
#else
  return false;
#endif
}

}  // namespace

MergeFunction merge_function(int64_t element_size) {
#if defined(__x86_64__)
  if (element_size == 4 && can_spread()) return &merge_avx512<Four>;
  if (element_size == 2 && can_spread()) return &merge_avx512<Two>;
#endif
  switch (element_size) {
    case 2: return &merge_one_by_one<int16_t>;
    case 4: return &merge_one_by_one<int32_t>;
    default: return &merge_one_by_one<int64_t>;
  }
}

SplitFunction split_function(int64_t element_size) {
#if defined(__x86_64__)
  if (element_size == 4 && can_spread()) return &split_avx512<Four>;
  if (element_size == 2 && can_spread()) return &split_avx512<Two>;
#endif
  switch (element_size) {
    case 2: return &split_one_by_one<int16_t>;
    case 4: return &split_one_by_one<int32_t>;
    default: return &split_one_by_one<int64_t>;
  }
}

}  // namespace eigenprune
