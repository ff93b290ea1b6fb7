// SPDX-License-Identifier: Apache-2.0
// The pass of eigenprune::pivot_linear that torch has no operator for: interleave two products and add the bias.
// No torch header, so that nvcc compiles it beside a torch that knows no CUDA.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "pivot_linear.h"

namespace {

constexpr int kScanThreads = 1024;       // one block scans all output positions: a few passes for any model's width
constexpr int kInterleaveThreads = 256;  // memory bound; enough to fill a multiprocessor at eight blocks
constexpr int64_t kMaxGridRows = 65535;  // limit of gridDim.y; further rows are taken in a loop

static_assert(sizeof(unsigned long long) == sizeof(int64_t), "atomicCAS below works on 64-bit positions");

// Sums of half precision are formed in float and rounded once, as torch does.
template <typename T> struct Wide { using type = float; };
template <> struct Wide<double> { using type = double; };

// How many of the block's threads before this one hold a true flag; the block's count goes to *total.
__device__ int64_t count_before(bool flag, int64_t* total) {
  __shared__ int warp_counts[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(0xffffffffu, flag);
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1u)), sum = 0;
  for (unsigned other = 0; other < blockDim.x / 32; ++other) {
    if (other < warp) before += warp_counts[other];
    sum += warp_counts[other];
  }
  __syncthreads();  // warp_counts is written again by the next call
  *total = sum;
  return before;
}

__global__ void __launch_bounds__(kScanThreads) fill_sources(
    const int32_t* __restrict__ pivots, int64_t rank, int64_t out_features, int64_t* source) {
  __shared__ int has_bad_pivot;
  if (threadIdx.x == 0) has_bad_pivot = 0;
  for (int64_t o = threadIdx.x; o < out_features; o += blockDim.x) source[o] = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < rank; i += blockDim.x) {
    const int64_t pivot = pivots[i];
    if (pivot < 0 || pivot >= out_features) {
      has_bad_pivot = 1;
    } else {
      auto* slot = reinterpret_cast<unsigned long long*>(source + pivot);
      const auto empty = static_cast<unsigned long long>(-1LL);
      if (atomicCAS(slot, empty, static_cast<unsigned long long>(i)) != empty) has_bad_pivot = 1;
    }
  }
  __syncthreads();
  int64_t next = rank;
  for (int64_t base = 0; base < out_features; base += blockDim.x) {  // every thread takes every turn: it synchronises
    const int64_t o = base + threadIdx.x;
    const bool is_rest = o < out_features && source[o] == -1;
    int64_t total = 0;
    const int64_t before = count_before(is_rest, &total);
    if (is_rest) source[o] = next + before;
    next += total;
  }
  __syncthreads();
  if (has_bad_pivot == 0) return;
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
void launch_interleave(
    const void* z, const void* mixed, const int64_t* source, const void* bias, void* y, int64_t rows, int64_t rank,
    int64_t out_features, cudaStream_t stream) {
  const int64_t column_blocks = (out_features + kInterleaveThreads - 1) / kInterleaveThreads;
  const dim3 grid(
      static_cast<unsigned>(column_blocks < INT32_MAX ? column_blocks : INT32_MAX),
      static_cast<unsigned>(rows < kMaxGridRows ? rows : kMaxGridRows));
  interleave<T><<<grid, kInterleaveThreads, 0, stream>>>(
      static_cast<const T*>(z), static_cast<const T*>(mixed), source, static_cast<const T*>(bias),
      static_cast<T*>(y), rows, rank, out_features);
}

}  // namespace

extern "C" int eigenprune_pivot_sources(
    const int32_t* pivots, int64_t rank, int64_t out_features, int64_t* source, void* stream) {
  if (out_features == 0) return cudaSuccess;
  fill_sources<<<1, kScanThreads, 0, static_cast<cudaStream_t>(stream)>>>(pivots, rank, out_features, source);
  return cudaGetLastError();
}

extern "C" int eigenprune_pivot_interleave(
    int dtype, const void* z, const void* mixed, const int64_t* source, const void* bias, void* y, int64_t rows,
    int64_t rank, int64_t out_features, void* stream_pointer) {
  if (rows == 0 || out_features == 0) return cudaSuccess;  // an empty grid is a launch error
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (dtype) {
    case kEigenpruneFloat32:
      launch_interleave<float>(z, mixed, source, bias, y, rows, rank, out_features, stream);
      break;
    case kEigenpruneFloat64:
      launch_interleave<double>(z, mixed, source, bias, y, rows, rank, out_features, stream);
      break;
    case kEigenpruneFloat16:
      launch_interleave<__half>(z, mixed, source, bias, y, rows, rank, out_features, stream);
      break;
    case kEigenpruneBFloat16:
      launch_interleave<__nv_bfloat16>(z, mixed, source, bias, y, rows, rank, out_features, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

extern "C" const char* eigenprune_cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
