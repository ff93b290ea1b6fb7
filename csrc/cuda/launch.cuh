// SPDX-License-Identifier: Apache-2.0
// One way to start a kernel: a function call, so that the files stay C++, which the tests compile for a CPU.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace eigenprune {

// Returns the error of this launch, and takes it out of the runtime's "last error" so that nobody else is blamed.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), dim3 grid, unsigned threads, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace eigenprune
