// SPDX-License-Identifier: Apache-2.0
// Dot kernel for AVX-512-BF16, which multiplies bfloat16 itself: AMD since 2022, Intel since Cooper Lake (2020).

#include "dot_products.h"
#include "target.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12 warns of variables inside its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

EIGENPRUNE_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512vl,avx2,fma")

namespace eigenprune {
namespace {

struct Avx512Bf16 {
  using Weight = uint16_t;
  using X = uint16_t;
  using Part = __m512i;
  using Sum = __m512;
  static constexpr int kStep = 32;
  static constexpr int kRows = 4, kVectors = 6;  // 24 sums + 6 + 1 of 32 registers

  static Part x(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Part x(const uint16_t* p, int n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1u), p);
  }
  static Part weight(const uint16_t* p) { return x(p); }
  static Part weight(const uint16_t* p, int n) { return x(p, n); }
  static __m512i units(Part part) { return part; }
  static Part part(const int32_t* p) { return _mm512_load_si512(p); }
  static Part broadcast(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, Part a, Part b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static __m128 totals(Sum a, Sum b, Sum c, Sum d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d ab_pairs = _mm512_castps_pd(ab), cd_pairs = _mm512_castps_pd(cd);
    const __m512 abcd = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab_pairs, cd_pairs)),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ab_pairs, cd_pairs)));
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), upper);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
};

}  // namespace
}  // namespace eigenprune

#include "dot_tile.h"
#include "transpose.h"
#include "panel_tile.h"

EIGENPRUNE_TARGET_END

namespace eigenprune {

const DotKernel* avx512_bf16_dot_kernel(ScalarType dtype) {
  static constexpr DotKernel kBFloat16{&dots<Avx512Bf16>, &panels<Avx512Bf16>, &round_to_bfloat16, ScalarType::BFloat16};
  return dtype == ScalarType::BFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace eigenprune
#endif
