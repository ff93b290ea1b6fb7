// SPDX-License-Identifier: Apache-2.0
// Dot kernels for AVX-512 (F, BW, VL): Intel servers since 2017, AMD since 2022.

#include "dot_products.h"
#include "target.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12 warns of variables inside its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

EIGENPRUNE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx2,fma,f16c")

namespace eigenprune {
namespace {

struct Avx512 {
  using X = float;
  using Part = __m512;
  using Sum = __m512;
  static constexpr int kStep = 16;
  static constexpr int kRows = 4, kVectors = 6;  // 24 sums + 6 + 1 of 32 registers

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Part x(const float* p) { return _mm512_loadu_ps(p); }
  static Part x(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static __m512i units(Part part) { return _mm512_castps_si512(part); }
  static Part part(const int32_t* p) { return _mm512_load_ps(p); }
  static Part broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, Part a, Part b) { return _mm512_fmadd_ps(a, b, sum); }
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
  static __m256i halves(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i halves(const uint16_t* p, int n) { return _mm256_maskz_loadu_epi16(first(n), p); }
};

struct Avx512Float : Avx512 {
  using Weight = float;
  static Part weight(const float* p) { return x(p); }
  static Part weight(const float* p, int n) { return x(p, n); }
};

struct Avx512BFloat16 : Avx512 {
  using Weight = uint16_t;
  static Part widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  static Part weight(const uint16_t* p) { return widen(halves(p)); }
  static Part weight(const uint16_t* p, int n) { return widen(halves(p, n)); }
};

struct Avx512Half : Avx512 {
  using Weight = uint16_t;
  static Part weight(const uint16_t* p) { return _mm512_cvtph_ps(halves(p)); }
  static Part weight(const uint16_t* p, int n) { return _mm512_cvtph_ps(halves(p, n)); }
};

}  // namespace
}  // namespace eigenprune

#include "dot_tile.h"
#include "transpose.h"
#include "panel_tile.h"

namespace eigenprune {
namespace {

void round_to_half(const float* sums, int64_t count, void* out_data) {
  uint16_t* out = static_cast<uint16_t*>(out_data);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i bits = _mm512_cvtps_ph(_mm512_loadu_ps(sums + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bits);
  }
  for (; i < count; ++i) out[i] = static_cast<uint16_t>(_cvtss_sh(sums[i], _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace eigenprune

EIGENPRUNE_TARGET_END

namespace eigenprune {

const DotKernel* avx512_dot_kernel(ScalarType dtype) {
  static constexpr DotKernel kFloat{&dots<Avx512Float>, &panels<Avx512Float>, &round_to_float, ScalarType::Float};
  static constexpr DotKernel kBFloat16{&dots<Avx512BFloat16>, &panels<Avx512BFloat16>, &round_to_bfloat16, ScalarType::Float};
  static constexpr DotKernel kHalf{&dots<Avx512Half>, &panels<Avx512Half>, &round_to_half, ScalarType::Float};
  switch (dtype) {
    case ScalarType::Float: return &kFloat;
    case ScalarType::BFloat16: return &kBFloat16;
    case ScalarType::Half: return &kHalf;
    default: return nullptr;
  }
}

}  // namespace eigenprune
#endif
