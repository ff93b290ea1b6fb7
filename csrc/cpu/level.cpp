// SPDX-License-Identifier: Apache-2.0

#include "level.h"

#include <cstdlib>
#include <cstring>

namespace eigenprune {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16"};

int level_of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl");
  if (has_avx512) return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  return has_avx2 ? 1 : 0;
#else
  return 0;
#endif
}

int chosen_level() {
  const int most = level_of_processor();
  const char* wish = std::getenv("EIGENPRUNE_CPU_KERNELS");
  if (wish == nullptr) return most;
  for (int level = 0; level < most; ++level) {
    if (std::strcmp(wish, kNames[level]) == 0) return level;
  }
  return most;  // never more than the processor has; an unknown name is reported by eigenprune/ops/_library.py
}

}  // namespace

CpuLevel cpu_level() {
  static const int kLevel = chosen_level();
  return static_cast<CpuLevel>(kLevel);
}

const char* cpu_level_name() { return kNames[static_cast<int>(cpu_level())]; }

}  // namespace eigenprune
