// SPDX-License-Identifier: Apache-2.0
// A few rows of a weight times up to 16 vectors, by one block: the warps share the columns, then their sums are added.
//
// A warp holds 8 weight rows at a time: lane = 4 * group + member, and the four lanes of a group read 64 consecutive
// bytes of their row, 16 each. The vectors are read the same way, from the first-level cache, which the weights bypass:
// staging them in shared memory would cost a barrier and bound their size, and is the same traffic.
#pragma once

#include "elements.cuh"

namespace eigenprune {

constexpr int kMostVectors = 16;

// float16 and bfloat16: tensor cores, the vectors as the 16 rows of the left operand (zero beyond theirs). The sum over
// columns may be taken in any order, so each lane keeps the 8 consecutive columns that it loaded; both operands agree.
//   kVectors  8 or 16
template <typename ElementType, bool kVectorLoads, int kVectorCount>
struct MmaTile {
  using Element = ElementType;
  using Bits = typename Element::Bits;
  static constexpr bool kVector = kVectorLoads;
  static constexpr int kVectors = kVectorCount;
  static constexpr int kWeightGroups = 1;
  static constexpr int kUnroll = kVector ? 8 : 2;  // 16-byte loads in flight; single elements take more registers
  static constexpr int kMostWarps = 16;

  float sum[4] = {0.f, 0.f, 0.f, 0.f};

  __device__ __forceinline__ void add(
      const Chunk (&weight)[1], const Bits* vectors, int64_t count, int64_t length, int64_t at) {
    const int group = threadIdx.x % 32 / 4;
    const Chunk low = load_chunk<Element, kVector, false>(
        vectors + group * length, at, group < count ? length : 0);
    Chunk high = {{0, 0, 0, 0}};
    if constexpr (kVectors > 8) {
      high = load_chunk<Element, kVector, false>(
          vectors + (group + 8) * length, at, group + 8 < count ? length : 0);
    }
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
      const uint32_t a[4] = {low.word[half], high.word[half], low.word[half + 1], high.word[half + 1]};
      const uint32_t b[2] = {weight[0].word[half], weight[0].word[half + 1]};
      Element::multiply(sum, a, b);
    }
  }

  // Writes this warp's sums as partial[vector][weight row].
  __device__ __forceinline__ void store(float* partial) const {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    partial[group * 8 + 2 * member] = sum[0];
    partial[group * 8 + 2 * member + 1] = sum[1];
    if constexpr (kVectors > 8) {
      partial[(group + 8) * 8 + 2 * member] = sum[2];
      partial[(group + 8) * 8 + 2 * member + 1] = sum[3];
    }
  }
};

// float32: tensor cores would drop bits of it (TF32), so each lane sums its own columns. With more vectors a lane takes
// more weight rows, so that a loaded piece of a vector serves several.
template <bool kVectorLoads, int kVectorCount, int kGroups>
struct FmaTile {
  using Element = Float32;
  using Bits = Element::Bits;
  static constexpr bool kVector = kVectorLoads;
  static constexpr int kVectors = kVectorCount;
  static constexpr int kWeightGroups = kGroups;
  static constexpr int kUnroll = kVector ? 8 / kGroups : 2;
  static constexpr int kMostWarps = 8;  // up to 64 sums and 32 loaded words a lane: it needs the registers

  float sum[kGroups][kVectorCount] = {};

  __device__ __forceinline__ void add(
      const Chunk (&weight)[kGroups], const Bits* vectors, int64_t count, int64_t length, int64_t at) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= count) break;  // the same for all threads
      const Chunk chunk = load_chunk<Element, kVector, false>(vectors + v * length, at, length);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[g][v] = fmaf(Element::widen(weight[g].word[i]), Element::widen(chunk.word[i]), sum[g][v]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* partial) const {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float total = sum[g][v] + __shfl_xor_sync(0xffffffffu, sum[g][v], 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (member == 0) partial[v * (8 * kGroups) + g * 8 + group] = total;
      }
    }
  }
};

template <typename Tile>
constexpr int kTileRows = 8 * Tile::kWeightGroups;  // weight rows of a block

template <typename Tile>
constexpr int kTileSums = Tile::kVectors * kTileRows<Tile>;  // floats that each warp leaves in shared memory

template <typename Tile>
constexpr int kTileStep = 4 * kPerChunk<typename Tile::Element>;  // columns that a warp takes at a time

// For the weight rows [first, first + kTileRows) below `rows`: write(vector, row, dot product), once for each pair.
//   weights  [rows, length], contiguous; rows > first
//   vectors  [count, length], contiguous; 1 <= count <= kVectors
//   partial  shared, kTileSums for every warp of the block
// Every thread of the block must call it, once: it synchronises. The order of the sum depends on the shape alone.
template <typename Tile, typename Write>
__device__ void multiply_tile(
    const typename Tile::Bits* weights, int64_t rows, int64_t first, const typename Tile::Bits* vectors, int64_t count,
    int64_t length, float* partial, Write write) {
  using Element = typename Tile::Element;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const typename Tile::Bits* row[Tile::kWeightGroups];
#pragma unroll
  for (int g = 0; g < Tile::kWeightGroups; ++g) {
    const int64_t wanted = first + g * 8 + group;
    row[g] = weights + (wanted < rows ? wanted : rows - 1) * length;  // a row too many repeats the last, unused
  }
  Tile tile;
  const int64_t stride = int64_t{warps} * kTileStep<Tile>;
  for (int64_t base = int64_t{warp} * kTileStep<Tile>; base < length; base += Tile::kUnroll * stride) {
    Chunk weight[Tile::kUnroll][Tile::kWeightGroups];
#pragma unroll
    for (int u = 0; u < Tile::kUnroll; ++u) {
#pragma unroll
      for (int g = 0; g < Tile::kWeightGroups; ++g) {
        const int64_t at = base + u * stride + member * kPerChunk<Element>;
        weight[u][g] = load_chunk<Element, Tile::kVector, true>(row[g], at, length);
      }
    }
#pragma unroll
    for (int u = 0; u < Tile::kUnroll; ++u) {
      if (base + u * stride >= length) break;  // the same for all lanes of a warp, as the tensor cores need it
      tile.add(weight[u], vectors, count, length, base + u * stride + member * kPerChunk<Element>);
    }
  }
  tile.store(partial + warp * kTileSums<Tile>);
  __syncthreads();
  for (int sum = threadIdx.x; sum < count * kTileRows<Tile>; sum += blockDim.x) {
    const int64_t at_row = first + sum % kTileRows<Tile>;
    if (at_row >= rows) continue;
    float total = 0.f;
    for (int other = 0; other < warps; ++other) total += partial[other * kTileSums<Tile> + sum];
    write(int64_t{sum / kTileRows<Tile>}, at_row, total);
  }
}

}  // namespace eigenprune
