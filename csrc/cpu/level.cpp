// SPDX-License-Identifier: Apache-2.0

#include "level.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace eigenprune {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};

// Linux keeps the registers of tiles from a process until it asks; the answer holds for all its threads. It refuses where
// a thread has a signal stack too small for them.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

int level_of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) return has_amx_bf16() && may_use_tiles() ? 4 : 3;
  if (has_avx512) return 2;
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

bool has_amx_bf16() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // Intel SDM volume 2A, CPUID leaf 7, EDX
  return (edx & kBf16) != 0 && (edx & kTile) != 0;
#else
  return false;
#endif
}

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const char* cpu_level_name() { return kNames[static_cast<int>(cpu_level())]; }

}  // namespace eigenprune
