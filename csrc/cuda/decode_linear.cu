// SPDX-License-Identifier: Apache-2.0
// Factored linears for 1 to 16 rows: time is the reading of the weights, so every weight is read once, 16 bytes a lane.
// No torch header, so that nvcc compiles it beside a torch that knows no CUDA.

#include "decode_linear.h"

#include "decode_tiles.cuh"
#include "launch.cuh"
#include "pivot_rows.cuh"

namespace eigenprune {
namespace {

using Problem = EigenpruneDecodeProblem;

struct Group {  // a kernel parameter: about 800 bytes of the 4 KiB that any GPU takes
  Problem problems[kEigenpruneDecodeMostProblems];
  int64_t end[kEigenpruneDecodeMostProblems];  // first block behind each problem's own
  int64_t rows;
};

struct Place {
  const Problem& problem;
  int64_t block;   // of this problem
  int64_t blocks;  // of this problem
};

__device__ Place find_place(const Group& group) {
  const int64_t block = blockIdx.x;
  int64_t first = 0;
  int index = 0;
  while (block >= group.end[index]) first = group.end[index++];
  return {group.problems[index], block - first, group.end[index] - first};
}

__device__ int64_t out_features(const Problem& problem) {
  return problem.left_rows + (problem.pivots != nullptr ? problem.rank : 0);
}

template <typename Element>
__device__ void write_output(const Problem& problem, int64_t vector, int64_t position, float value) {
  using Bits = typename Element::Bits;
  if (problem.bias != nullptr) value += Element::widen(static_cast<const Bits*>(problem.bias)[position]);
  static_cast<Bits*>(problem.y)[vector * out_features(problem) + position] = Element::round(value);
}

// rest[1 + i] = output position of row i of left; rest[0] = 1 when the pivots are wrong. One block.
__device__ void fill_rest(const Problem& problem, PivotMemory& memory) {
  const bool is_fine = split_positions(
      problem.pivots, problem.rank, out_features(problem), memory, [](int64_t, int64_t) {},
      [&](int64_t index, int64_t position) {
        if (index < problem.left_rows) problem.rest[1 + index] = position;  // repeated pivots leave more positions
      });
  if (threadIdx.x == 0) problem.rest[0] = is_fine ? 0 : 1;
}

// z = x right^T, and y at the pivots. With pivots the first block of a problem makes its table of the other positions,
// beside the products and not before them.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kMostWarps * 32, 1) project(const __grid_constant__ Group group) {
  using Element = typename Tile::Element;
  using Bits = typename Element::Bits;
  __shared__ union {
    float partial[Tile::kMostWarps * kTileSums<Tile>];
    PivotMemory pivots;
  } memory;
  const Place place = find_place(group);
  const Problem& problem = place.problem;
  const bool has_pivots = problem.pivots != nullptr;
  if (has_pivots && place.block == 0) {
    fill_rest(problem, memory.pivots);
    return;
  }
  const int64_t out = out_features(problem);
  const auto write = [&](int64_t vector, int64_t row, float value) {
    static_cast<Bits*>(problem.z)[vector * problem.rank + row] = Element::round(value);
    if (!has_pivots) return;
    const int64_t pivot = problem.pivots[row];
    if (pivot >= 0 && pivot < out) write_output<Element>(problem, vector, pivot, value);
  };
  multiply_tile<Tile>(
      static_cast<const Bits*>(problem.right), problem.rank, (place.block - has_pivots) * kTileRows<Tile>,
      static_cast<const Bits*>(problem.x), group.rows, problem.in_features, memory.partial, write);
}

// y = z left^T + bias, at the positions that are no pivots.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kMostWarps * 32, 1) expand(const __grid_constant__ Group group) {
  using Element = typename Tile::Element;
  using Bits = typename Element::Bits;
  __shared__ float partial[Tile::kMostWarps * kTileSums<Tile>];
  const Place place = find_place(group);
  const Problem& problem = place.problem;
  const bool has_pivots = problem.pivots != nullptr;
  if (has_pivots && problem.rest[0] != 0) {
    const float nan = __int_as_float(0x7fc00000);
    const int64_t size = group.rows * out_features(problem);
    const int64_t first = place.block * blockDim.x + threadIdx.x, step = place.blocks * blockDim.x;
    for (int64_t i = first; i < size; i += step) static_cast<Bits*>(problem.y)[i] = Element::round(nan);
    return;
  }
  if (place.block * kTileRows<Tile> >= problem.left_rows) return;  // the block that a problem without rows has for NaN
  const auto write = [&](int64_t vector, int64_t row, float value) {
    write_output<Element>(problem, vector, has_pivots ? problem.rest[1 + row] : row, value);
  };
  multiply_tile<Tile>(
      static_cast<const Bits*>(problem.left), problem.left_rows, place.block * kTileRows<Tile>,
      static_cast<const Bits*>(problem.z), group.rows, problem.rank, partial, write);
}

// Warps of a block, all on the same weight rows: many where blocks are few, so that the machine has enough loads in
// flight, and no more than there are columns for. UNMEASURED: a GPU of 4.8 TB/s and 700 ns needs 3.4 MB in flight, and
// a warp has 4 KB (32 lanes x 8 loads x 16 bytes), so about 800 warps; this gives 1000 to 2000 from 64 blocks on. With
// about 100 registers a multiprocessor holds 16 warps, so 128 blocks of 16 are one wave on 132 of them.
unsigned choose_warps(int64_t blocks, int64_t steps, int most) {
  int warps = blocks >= 512 ? 4 : blocks > 128 ? 8 : 16;
  while (warps > 4 && (warps > most || warps > steps)) warps /= 2;
  return static_cast<unsigned>(warps);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Chunk) == 0; }

// 16-byte loads need every row of both operands to start on a multiple of 16 bytes.
bool allows_chunks(const void* weights, const void* vectors, int64_t length, int64_t per_chunk) {
  return is_aligned(weights) && is_aligned(vectors) && length % per_chunk == 0;
}

template <typename Tile>
int launch_kernel(Group group, int count, bool is_second, void* stream) {
  int64_t blocks = 0, longest = 0;
  for (int i = 0; i < count; ++i) {
    const Problem& problem = group.problems[i];
    const bool has_pivots = problem.pivots != nullptr;
    const int64_t tiles = ((is_second ? problem.left_rows : problem.rank) + kTileRows<Tile> - 1) / kTileRows<Tile>;
    // First stage: one more block, for the table. Second: at least one, to write NaN when the table says so.
    blocks += is_second ? (has_pivots && tiles == 0 ? 1 : tiles) : tiles + has_pivots;
    group.end[i] = blocks;
    const int64_t length = is_second ? problem.rank : problem.in_features;
    longest = length > longest ? length : longest;
  }
  if (blocks == 0) return cudaSuccess;  // an empty grid is a launch error
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t steps = (longest + kTileStep<Tile> - 1) / kTileStep<Tile>;
  const unsigned threads = 32 * choose_warps(blocks, steps, Tile::kMostWarps);
  const dim3 grid(static_cast<unsigned>(blocks));
  return launch(is_second ? &expand<Tile> : &project<Tile>, grid, threads, stream, group);
}

template <typename Element>
int launch_halves(const Group& group, int count, bool is_second, bool in_chunks, void* stream) {
  if (!in_chunks) return launch_kernel<MmaTile<Element, false, 16>>(group, count, is_second, stream);
  if (group.rows <= 8) return launch_kernel<MmaTile<Element, true, 8>>(group, count, is_second, stream);
  return launch_kernel<MmaTile<Element, true, 16>>(group, count, is_second, stream);
}

int launch_floats(const Group& group, int count, bool is_second, bool in_chunks, void* stream) {
  if (!in_chunks) return launch_kernel<FmaTile<false, 16, 1>>(group, count, is_second, stream);
  if (group.rows == 1) return launch_kernel<FmaTile<true, 1, 1>>(group, count, is_second, stream);
  if (group.rows <= 4) return launch_kernel<FmaTile<true, 4, 1>>(group, count, is_second, stream);
  if (group.rows <= 8) return launch_kernel<FmaTile<true, 8, 2>>(group, count, is_second, stream);
  return launch_kernel<FmaTile<true, 16, 4>>(group, count, is_second, stream);
}

int launch_stage(int dtype, const Group& group, int count, bool is_second, void* stream) {
  const int64_t per_chunk = dtype == kEigenpruneFloat32 ? kPerChunk<Float32> : kPerChunk<Float16>;
  bool in_chunks = true;
  for (int i = 0; i < count; ++i) {
    const Problem& problem = group.problems[i];
    in_chunks = in_chunks &&
        (is_second ? allows_chunks(problem.left, problem.z, problem.rank, per_chunk)
                   : allows_chunks(problem.right, problem.x, problem.in_features, per_chunk));
  }
  switch (dtype) {
    case kEigenpruneFloat32: return launch_floats(group, count, is_second, in_chunks, stream);
    case kEigenpruneFloat16: return launch_halves<Float16>(group, count, is_second, in_chunks, stream);
    case kEigenpruneBFloat16: return launch_halves<BFloat16>(group, count, is_second, in_chunks, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace eigenprune

extern "C" int eigenprune_decode_linear(
    int dtype, const EigenpruneDecodeProblem* problems, int count, int64_t rows, void* stream) {
  using namespace eigenprune;
  if (count < 1 || count > kEigenpruneDecodeMostProblems) return cudaErrorInvalidValue;
  if (rows < 1 || rows > kEigenpruneDecodeMostRows) return cudaErrorInvalidValue;
  Group group = {};
  group.rows = rows;
  for (int i = 0; i < count; ++i) group.problems[i] = problems[i];
  const int first = launch_stage(dtype, group, count, /*is_second=*/false, stream);
  return first != 0 ? first : launch_stage(dtype, group, count, /*is_second=*/true, stream);
}
