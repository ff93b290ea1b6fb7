// SPDX-License-Identifier: Apache-2.0
// Which output positions the pivots leave over, found by one block; nothing in a pivot list is trusted.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace eigenprune {

constexpr int kPivotWords = 2048;                // of 32 positions: what one turn of the scan below covers
constexpr int64_t kPivotTurn = kPivotWords * 32;  // 65536 positions, more than the width of today's models

struct PivotMemory {  // shared memory of the block
  uint32_t taken[kPivotWords];   // a bit for each position of this turn that a pivot names
  uint32_t before[kPivotWords];  // free positions of this turn in front of each word
  uint32_t warp_total[32];
  int is_bad;
};

// Exclusive prefix sums of the free positions over the `words` words of this turn; returns their total. All threads.
// The bits behind the last position count as free: only the total of the last turn has them, and nobody needs that one.
__device__ inline uint32_t count_free(PivotMemory& memory, int words) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t total = 0;
  for (int first = 0; first < words; first += blockDim.x) {
    const int word = first + static_cast<int>(threadIdx.x);
    const uint32_t own = word < words ? __popc(~memory.taken[word]) : 0;
    uint32_t sum = own;  // over this lane and those below it
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t lower = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += lower;
    }
    if (lane == 31) memory.warp_total[warp] = sum;
    __syncthreads();
    uint32_t before = total + sum - own;
    for (int other = 0; other < warps; ++other) {
      if (other < warp) before += memory.warp_total[other];
      total += memory.warp_total[other];
    }
    if (word < words) memory.before[word] = before;
    __syncthreads();  // `before` is complete, and warp_total is written again by the next turn
  }
  return total;
}

// Called by every thread of one block (a multiple of 32 threads, at most 1024).
//   on_pivot(i, position)    for every pivots[i] in [0, out_features), but only the first finder of a repeated one
//   on_rest(index, position) for every position in [0, out_features) that no pivot names, index ascending from 0
// Returns true in all threads when the pivots are distinct and in range; otherwise `index` may pass out - rank.
// Time: one pass over the pivots and one over the positions for each 65536 positions.
template <typename OnPivot, typename OnRest>
__device__ bool split_positions(
    const int32_t* pivots, int64_t rank, int64_t out_features, PivotMemory& memory, OnPivot on_pivot, OnRest on_rest) {
  if (threadIdx.x == 0) memory.is_bad = 0;
  __syncthreads();
  int64_t found = 0;
  for (int64_t first = 0; first < out_features; first += kPivotTurn) {
    const int64_t left_over = out_features - first;
    const int64_t positions = left_over < kPivotTurn ? left_over : kPivotTurn;
    const int words = static_cast<int>((positions + 31) / 32);
    for (int word = threadIdx.x; word < words; word += blockDim.x) memory.taken[word] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < rank; i += blockDim.x) {
      const int64_t pivot = pivots[i];
      const int64_t inside = pivot - first;
      if (pivot < 0 || pivot >= out_features) {
        atomicExch(&memory.is_bad, 1);
      } else if (inside >= 0 && inside < positions) {
        const uint32_t bit = 1u << (inside % 32);
        if ((atomicOr(&memory.taken[inside / 32], bit) & bit) != 0) {
          atomicExch(&memory.is_bad, 1);
        } else {
          on_pivot(i, pivot);
        }
      }
    }
    __syncthreads();
    const uint32_t total = count_free(memory, words);
    for (int64_t inside = threadIdx.x; inside < positions; inside += blockDim.x) {
      const int word = static_cast<int>(inside / 32);
      const uint32_t bits = ~memory.taken[word], bit = 1u << (inside % 32);
      if ((bits & bit) != 0) on_rest(found + memory.before[word] + __popc(bits & (bit - 1u)), first + inside);
    }
    found += total;
    __syncthreads();  // `taken` is cleared again
  }
  return memory.is_bad == 0;
}

}  // namespace eigenprune
