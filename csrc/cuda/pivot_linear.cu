// SPDX-License-Identifier: Apache-2.0
// The pass of eigenprune::pivot_linear that torch has no operator for: interleave two products and add the bias.
// No torch header, so that nvcc compiles it beside a torch that knows no CUDA.

#include "pivot_linear.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.cuh"
#include "pivot_rows.cuh"

namespace eigenprune {
namespace {

constexpr int kScanThreads = 1024;       // one block scans all output positions: a few passes for any model's width
constexpr int kInterleaveThreads = 256;  // memory bound; enough to fill a multiprocessor at eight blocks
constexpr int64_t kMaxGridRows = 65535;  // limit of gridDim.y; further rows are taken in a loop

// Sums of half precision are formed in float and rounded once, as torch does.
template <typename T> struct Wide { using type = float; };
template <> struct Wide<double> { using type = double; };

// One block, before each interleave. The table is made at every call, because a cache by address would outlive its
// tensor: it reads the pivots once and writes out_features positions, little beside two products of many rows.
__global__ void __launch_bounds__(kScanThreads) fill_sources(
    const int32_t* __restrict__ pivots, int64_t rank, int64_t out_features, int64_t* __restrict__ source) {
  __shared__ PivotMemory memory;
  const bool is_fine = split_positions(
      pivots, rank, out_features, memory, [&](int64_t i, int64_t position) { source[position] = i; },
      [&](int64_t index, int64_t position) { source[position] = rank + index; });
  if (is_fine) return;
  for (int64_t o = threadIdx.x; o < out_features; o += blockDim.x) source[o] = -1;
}

template <typename T>
__global__ void __launch_bounds__(kInterleaveThreads) interleave(
    const T* __restrict__ z, const T* __restrict__ mixed, const int64_t* __restrict__ source,
    const T* __restrict__ bias, T* __restrict__ y, int64_t rows, int64_t rank, int64_t out_features) {
  using W = typename Wide<T>::type;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    for (int64_t o = first; o < out_features; o += step) {  // writes are coalesced, reads are gathered
      const int64_t from = source[o];
      W value;
      if (from < 0) {
        value = static_cast<W>(__int_as_float(0x7fc00000));  // NaN: the pivots were wrong
      } else if (from < rank) {
        value = static_cast<W>(z[row * rank + from]);
      } else {
        value = static_cast<W>(mixed[row * (out_features - rank) + from - rank]);
      }
      if (bias != nullptr) value += static_cast<W>(bias[o]);
      y[row * out_features + o] = static_cast<T>(value);
    }
  }
}

template <typename T>
int launch_interleave(
    const void* z, const void* mixed, const int64_t* source, const void* bias, void* y, int64_t rows, int64_t rank,
    int64_t out_features, void* stream) {
  const int64_t column_blocks = (out_features + kInterleaveThreads - 1) / kInterleaveThreads;
  const dim3 grid(
      static_cast<unsigned>(column_blocks < INT32_MAX ? column_blocks : INT32_MAX),
      static_cast<unsigned>(rows < kMaxGridRows ? rows : kMaxGridRows));
  return launch(
      &interleave<T>, grid, kInterleaveThreads, stream, static_cast<const T*>(z), static_cast<const T*>(mixed), source,
      static_cast<const T*>(bias), static_cast<T*>(y), rows, rank, out_features);
}

}  // namespace
}  // namespace eigenprune

extern "C" int eigenprune_pivot_sources(
    const int32_t* pivots, int64_t rank, int64_t out_features, int64_t* source, void* stream) {
  using namespace eigenprune;
  if (out_features == 0) return cudaSuccess;
  return launch(&fill_sources, dim3(1), kScanThreads, stream, pivots, rank, out_features, source);
}

extern "C" int eigenprune_pivot_interleave(
    int dtype, const void* z, const void* mixed, const int64_t* source, const void* bias, void* y, int64_t rows,
    int64_t rank, int64_t out_features, void* stream) {
  using namespace eigenprune;
  if (rows == 0 || out_features == 0) return cudaSuccess;  // an empty grid is a launch error
  const auto run = [&](auto element) {
    return launch_interleave<decltype(element)>(z, mixed, source, bias, y, rows, rank, out_features, stream);
  };
  switch (dtype) {
    case kEigenpruneFloat32: return run(float());
    case kEigenpruneFloat64: return run(double());
    case kEigenpruneFloat16: return run(__half());
    case kEigenpruneBFloat16: return run(__nv_bfloat16());
    default: return cudaErrorInvalidValue;
  }
}

extern "C" const char* eigenprune_cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
