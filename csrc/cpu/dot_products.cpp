// SPDX-License-Identifier: Apache-2.0

#include "dot_products.h"

#include "level.h"

namespace eigenprune {

const DotKernel* dot_kernel(ScalarType dtype) {
  const DotKernel* kernel = nullptr;
#if defined(__x86_64__)
  const CpuLevel level = cpu_level();
  if (level >= CpuLevel::kAvx512Bf16) kernel = avx512_bf16_dot_kernel(dtype);
  if (kernel == nullptr && level >= CpuLevel::kAvx512) kernel = avx512_dot_kernel(dtype);
  if (kernel == nullptr && level >= CpuLevel::kAvx2) kernel = avx2_dot_kernel(dtype);
#endif
  return kernel;
}

}  // namespace eigenprune
