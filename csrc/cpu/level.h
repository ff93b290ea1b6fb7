// SPDX-License-Identifier: Apache-2.0
// Which instructions the kernels may use: what this processor has, or less where EIGENPRUNE_CPU_KERNELS says so.
#pragma once

namespace eigenprune {

enum class CpuLevel { kPlain = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// Read once in the life of the process.
CpuLevel cpu_level();

// Whether the processor multiplies tiles of bfloat16 (Intel AMX: Sapphire Rapids, 2023, and later). Level kAmx wants more:
// that the operating system lets this process do it.
bool has_amx_bf16();

// Whether Intel made it: torch's float32 products come from Intel's own library, and run at full speed there alone.
bool is_intel();

// "plain", "avx2", "avx512", "avx512_bf16" or "amx": also the values of the variable.
const char* cpu_level_name();

}  // namespace eigenprune
