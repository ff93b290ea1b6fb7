// SPDX-License-Identifier: Apache-2.0
// A block of 16 x 16 units of 32 bits turned on its side in registers. AVX-512 only. Included between
// EIGENPRUNE_TARGET_BEGIN and _END, once per file.

namespace eigenprune {
namespace {

// Turns sixteen registers of sixteen units on their side.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 b + c] now holds units c, c + 4, c + 8, c + 12 of rows 4 b .. 4 b + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88), high = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[c + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[c + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[c + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

}  // namespace
}  // namespace eigenprune
