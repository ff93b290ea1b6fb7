// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 on AMX tiles (Intel since Sapphire Rapids, 2023), transposed: weight @ x.T. A weight is then read
// as it lies in memory, by rows; x is packed once a call, for all layers and threads; and a result has the very form in
// which the next product wants its input. Only to be called where cpu_level() is kAmx; then from any thread: each call
// configures the tiles for itself and leaves them released.
#pragma once

#include <cstdint>

namespace eigenprune {

constexpr int64_t kTileVectors = 16;   // vectors side by side: a block
constexpr int64_t kTileElements = 32;  // of each, in one tile
constexpr int64_t kPanelRows = 64;     // most rows of a weight that are multiplied at a time

// Elements of sixteen vectors, one cache line for every two: line p holds elements 2 p and 2 p + 1 of all of them. What
// there is less than 32 elements or 16 vectors is zero.
struct alignas(64) PackedTile {
  uint16_t values[kTileElements / 2][kTileVectors][2];
};

// The tiles of several blocks: element e of block b is in first[b * stride + e / 32].
struct PackedVectors {
  PackedTile* first;
  int64_t stride;
};

// Rows of a weight, [rows, k], contiguous, at most kPanelRows of them.
struct WeightPanel {
  const uint16_t* data;
  int64_t rows, k;
};

// Where the products with a panel go, rounded to bfloat16 once, after the bias [rows] (null: none) is added. Row r of
// the panel becomes element r. No tiles: nowhere.
struct PanelTarget {
  PackedVectors tiles;
  const uint16_t* bias;
};

// Up to sixteen vectors of `count` elements, `stride` elements from one to the next, to consecutive tiles.
void pack_vectors(const uint16_t* x, int64_t vectors, int64_t stride, int64_t count, PackedTile* tiles);

// panel.rows inner products with every vector of `blocks` blocks, summed in float32 in the order of k.
void multiply_panel(
    const WeightPanel& panel, const PackedVectors& x, int64_t blocks, const PanelTarget& target,
    const PanelTarget& second_target);

// The way back: up to sixteen vectors of up to 32 elements out of a tile, `stride` elements from one to the next.
void unpack_vectors(const PackedTile& tile, int64_t vectors, int64_t count, uint16_t* y, int64_t stride);

// Where the element of the first vector stands, from either of two bases; that of the next stands one line entry on.
struct PackedSource {
  int64_t offset;
  bool is_second;
};

// The same, with each of `count` <= 32 elements from a place of its own.
void unpack_chosen(
    const uint16_t* first, const uint16_t* second, const PackedSource* sources, int64_t vectors, int64_t count,
    uint16_t* y, int64_t stride);

}  // namespace eigenprune
