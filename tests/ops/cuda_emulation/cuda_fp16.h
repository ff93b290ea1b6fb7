// SPDX-License-Identifier: Apache-2.0
// float16 for the CPU emulation: rounding to nearest even, subnormals, overflow to infinity.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) {
    const uint16_t sign = static_cast<uint16_t>(std::signbit(value) << 15);
    const float size = std::fabs(value);
    int exponent = -13;  // of zero and of the subnormals
    if (std::isnan(value)) {
      bits = 0x7fff;
    } else if (size >= 65520.f) {  // half way between the largest finite value and the next
      bits = static_cast<uint16_t>(sign | 0x7c00);
    } else {
      if (size > 0.f) std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
      const int unit = (exponent < -13 ? -13 : exponent) - 11;  // exponent of the last place: 10 bits behind the first
      const auto places = static_cast<unsigned>(std::nearbyint(std::ldexp(size, -unit)));
      bits = static_cast<uint16_t>(sign | ((static_cast<unsigned>(unit + 24) << 10) + places));  // may carry
    }
  }
  explicit operator float() const {
    const int exponent = bits >> 10 & 31, places = bits & 1023;
    const float size = exponent == 31 ? (places != 0 ? NAN : INFINITY)
        : exponent == 0               ? std::ldexp(static_cast<float>(places), -24)
                                      : std::ldexp(static_cast<float>(places + 1024), exponent - 25);
    return (bits & 0x8000) != 0 ? -size : size;
  }
};

inline __half __ushort_as_half(uint16_t bits) {
  __half value;
  value.bits = bits;
  return value;
}
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return __half(value); }
