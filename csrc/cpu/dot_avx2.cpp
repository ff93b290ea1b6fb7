// SPDX-License-Identifier: Apache-2.0
// Dot kernels for AVX2 + FMA + F16C: every x86-64 processor since 2013 (Intel) and 2015 (AMD).

#include "dot_products.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

EIGENPRUNE_TARGET_BEGIN("avx2,fma,f16c")

namespace eigenprune {
namespace {

struct Avx2 {
  using X = float;
  using Part = __m256;
  using Sum = __m256;
  static constexpr int kStep = 8;
  static constexpr int kRows = 2, kVectors = 4;  // 8 sums + 4 + 1 of 16 registers

  static Part x(const float* p) { return _mm256_loadu_ps(p); }
  static Part x(const float* p, int n) {
    float padded[kStep] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return _mm256_loadu_ps(padded);
  }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum add(Sum sum, Part a, Part b) { return _mm256_fmadd_ps(a, b, sum); }
  static __m128 totals(Sum a, Sum b, Sum c, Sum d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256d ab_pairs = _mm256_castps_pd(ab), cd_pairs = _mm256_castps_pd(cd);
    const __m256 abcd = _mm256_add_ps(
        _mm256_castpd_ps(_mm256_unpacklo_pd(ab_pairs, cd_pairs)),
        _mm256_castpd_ps(_mm256_unpackhi_pd(ab_pairs, cd_pairs)));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
  static __m128i halves(const uint16_t* p, int n) {
    uint16_t padded[kStep] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(padded));
  }
};

struct Avx2Float : Avx2 {
  using Weight = float;
  static Part weight(const float* p) { return x(p); }
  static Part weight(const float* p, int n) { return x(p, n); }
};

struct Avx2BFloat16 : Avx2 {
  using Weight = uint16_t;
  static Part widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
  static Part weight(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Part weight(const uint16_t* p, int n) { return widen(halves(p, n)); }
};

struct Avx2Half : Avx2 {
  using Weight = uint16_t;
  static Part weight(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Part weight(const uint16_t* p, int n) { return _mm256_cvtph_ps(halves(p, n)); }
};

}  // namespace
}  // namespace eigenprune

#include "dot_tile.h"

namespace eigenprune {
namespace {

void round_to_half(const float* sums, int64_t count, void* out_data) {
  uint16_t* out = static_cast<uint16_t*>(out_data);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(sums + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bits);
  }
  for (; i < count; ++i) out[i] = static_cast<uint16_t>(_cvtss_sh(sums[i], _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace eigenprune

EIGENPRUNE_TARGET_END

namespace eigenprune {

const DotKernel* avx2_dot_kernel(ScalarType dtype) {
  static constexpr DotKernel kFloat{&dots<Avx2Float>, nullptr, &round_to_float, ScalarType::Float};
  static constexpr DotKernel kBFloat16{&dots<Avx2BFloat16>, nullptr, &round_to_bfloat16, ScalarType::Float};
  static constexpr DotKernel kHalf{&dots<Avx2Half>, nullptr, &round_to_half, ScalarType::Float};
  switch (dtype) {
    case ScalarType::Float: return &kFloat;
    case ScalarType::BFloat16: return &kBFloat16;
    case ScalarType::Half: return &kHalf;
    default: return nullptr;
  }
}

}  // namespace eigenprune
#endif
