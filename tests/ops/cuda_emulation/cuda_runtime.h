// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name, so that a C++ compiler can compile the kernels of csrc/cuda for a CPU:
// every CUDA thread is a fiber (emulator.cpp), blocks run one after the other, whatever synchronises switches fibers.
// Only what our kernels use is here.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time; the block order is changed between runs, so that stale contents show

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulator {

enum class Order { kAscending, kDescending, kShuffled };  // of the blocks, and of the threads between two barriers
extern Order order;

void run(dim3 grid, dim3 block, const std::function<void()>& body);  // exits with a message on a deadlock
void wait_for_block();

}  // namespace emulator

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const std::tuple<Parameters...> copies(arguments...);
  emulator::run(config->gridDim, config->blockDim, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}

inline void __syncthreads() { emulator::wait_for_block(); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

float __shfl_xor_sync(uint32_t lanes, float value, int mask);
uint32_t __shfl_up_sync(uint32_t lanes, uint32_t value, unsigned distance);

// Fibers only switch where they wait, but a race detector must know that these are atomic.
inline int atomicExch(int* target, int value) { return __atomic_exchange_n(target, value, __ATOMIC_RELAXED); }
inline uint32_t atomicOr(uint32_t* target, uint32_t bits) { return __atomic_fetch_or(target, bits, __ATOMIC_RELAXED); }
