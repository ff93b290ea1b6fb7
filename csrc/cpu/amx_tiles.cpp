// SPDX-License-Identifier: Apache-2.0

#include "amx_tiles.h"

#if defined(__x86_64__)
#include "target.h"

#pragma GCC diagnostic push  // GCC 12 warns of variables inside its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

EIGENPRUNE_TARGET_BEGIN("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx2,fma")

#include "transpose.h"

namespace eigenprune {
namespace {

constexpr int kTileRows = 16;
constexpr int kRowBytes = 64;

using Sums = float[kTileRows][kTileVectors];  // of a tile

// The instructions themselves, not the intrinsics: those of GCC take no template parameter for a tile's number, and do
// not tell the compiler that memory is read.
template <int kTile>
inline void load_tile(const void* data, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(float* sums) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(sums), "r"(int64_t{kRowBytes}), "i"(kTile) : "memory");
}

template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kSums, int kWeight, int kX>
inline void add_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kWeight), "i"(kX));
}

// Which of the eight tiles is what, for kTall tiles of weight rows times kWide blocks of vectors: sums from 0 on, one of
// a row of the grid after the other; then the weight, then x. The last tile of the weight has a number of its own,
// because it may have fewer rows.
template <int kTall>
constexpr int weight_tile(int tall) {
  return kTall == 4 && tall >= 2 ? (tall == 2 ? 4 : 6) : 4 + tall;
}

template <int kWide>
constexpr int x_tile(int wide) {
  return kWide == 1 ? 7 : 6 + wide;
}

// Tells the processor how many rows the tiles have; releases them in the end.
class TileSetup {
 public:
  TileSetup() = default;
  TileSetup(const TileSetup&) = delete;
  ~TileSetup() { asm volatile("tilerelease"); }

  // Sixteen rows everywhere, but for the last tile of the weight and its sums.
  template <int kTall, int kWide>
  void use(int last_rows) {
    if (last_rows == kTileRows && are_full_) return;
    Layout layout{};
    for (int tile = 0; tile < 8; ++tile) set(layout, tile, kTileRows);
    set(layout, weight_tile<kTall>(kTall - 1), last_rows);
    for (int wide = 0; wide < kWide; ++wide) set(layout, (kTall - 1) * kWide + wide, last_rows);
    asm volatile("ldtilecfg %0" : : "m"(layout));
    are_full_ = last_rows == kTileRows;
  }

 private:
  struct alignas(64) Layout {  // Intel SDM volume 1, 18.2
    uint8_t palette = 1, start_row = 0, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

  static void set(Layout& layout, int tile, int rows) {
    layout.row_bytes[tile] = kRowBytes;
    layout.rows[tile] = static_cast<uint8_t>(rows);
  }

  bool are_full_ = false;
};

// A panel and a copy of what its rows have beyond the last whole tile, with zeros up to the tile's end: a tile read from
// the weight there would hold elements of the next row, or nobody's.
struct PaddedPanel {
  const WeightPanel& given;
  alignas(64) uint16_t rest[kPanelRows][kTileElements];

  explicit PaddedPanel(const WeightPanel& panel) : given(panel) {
    const int count = static_cast<int>(panel.k % kTileElements);
    if (count == 0) return;
    const auto lanes = static_cast<__mmask32>((1u << count) - 1u);
    for (int64_t row = 0; row < panel.rows; ++row) {
      _mm512_store_si512(rest[row], _mm512_maskz_loadu_epi16(lanes, panel.data + row * panel.k + panel.k - count));
    }
  }
};

// One step of k: kTall tiles of the weight times kWide of x.
template <int kTall, int kWide, int kRow = 0>
inline void multiply_step(const uint16_t* weight, int64_t k_bytes, const PackedTile* x, int64_t x_stride) {
  if constexpr (kRow == 0) {
    load_tile<x_tile<kWide>(0)>(x, kRowBytes);
    if constexpr (kWide == 2) load_tile<x_tile<kWide>(1)>(x + x_stride, kRowBytes);
  }
  load_tile<weight_tile<kTall>(kRow)>(weight, k_bytes);
  add_products<kRow * kWide, weight_tile<kTall>(kRow), x_tile<kWide>(0)>();
  if constexpr (kWide == 2) add_products<kRow * kWide + 1, weight_tile<kTall>(kRow), x_tile<kWide>(1)>();
  if constexpr (kRow + 1 < kTall) {
    const auto* next = reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(weight) + kTileRows * k_bytes);
    multiply_step<kTall, kWide, kRow + 1>(next, k_bytes, x, x_stride);
  }
}

template <int kCount, int kTile = 0>
inline void clear_tiles() {
  clear_tile<kTile>();
  if constexpr (kTile + 1 < kCount) clear_tiles<kCount, kTile + 1>();
}

template <int kCount, int kTile = 0>
inline void store_tiles(Sums* sums) {
  store_tile<kTile>(sums[kTile][0]);
  if constexpr (kTile + 1 < kCount) store_tiles<kCount, kTile + 1>(sums);
}

// Two rows of sixteen sums to one line of a tile.
inline void round_line(__m512 first, __m512 second, uint16_t* line) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);  // sixteen of the first row, then of the second
  const __m512i in_turns = _mm512_setr_epi32(
      0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
      0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
  _mm512_store_si512(line, _mm512_permutexvar_epi16(in_turns, both));
}

// The sums of 2 x 2 tiles that are full and get no bias, to be rounded a few lines at a time between the products of the
// tiles that come next: the processor does both at once.
class LateRounding {
 public:
  LateRounding() {}  // not `= default`, with which `{}` would clear the sums, eight kilobytes a panel

  // Room for the next sums; those before must be rounded.
  Sums* room() { return sums_[which_ ^= 1]; }

  // What is in the room goes to these tiles, one a block.
  void start(PackedTile& first, PackedTile& second) {
    tiles_[0] = &first;
    tiles_[1] = &second;
    line_ = 0;
  }

  void round_some() {
    if (line_ == kLines) return;
    const Sums* sums = sums_[which_] + line_ / 16;  // upper rows of both blocks, then lower ones
    uint16_t* lines = tiles_[line_ / 16]->values[line_ % 16][0];
    const float* rows = sums[line_ % 16 / 8 * 2][line_ % 8 * 2];
#pragma GCC unroll 4
    for (int i = 0; i < kAtATime; ++i) {
      const float* pair = rows + i * 2 * kTileVectors;
      round_line(_mm512_load_ps(pair), _mm512_load_ps(pair + kTileVectors), lines + i * 2 * kTileVectors);
    }
    line_ += kAtATime;
  }

  void finish() {
    while (line_ < kLines) round_some();
  }

 private:
  static constexpr int kLines = 32, kAtATime = 4;

  alignas(64) Sums sums_[2][4];
  PackedTile* tiles_[2];
  int which_ = 0, line_ = kLines;
};

// Of `rows` rows, and zeros for the others, with their bias where there is one.
inline void round_tile(const Sums& upper, const Sums& lower, int rows, const uint16_t* bias, PackedTile& tile) {
  for (int line = 0; line < 16; ++line) {
    __m512 pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * line + i;
      pair[i] = _mm512_setzero_ps();
      if (row >= rows) continue;
      pair[i] = _mm512_load_ps(row < kTileRows ? upper[row] : lower[row - kTileRows]);
      if (bias == nullptr) continue;
      pair[i] = _mm512_add_ps(pair[i], _mm512_castsi512_ps(_mm512_set1_epi32(bias[row] << 16)));
    }
    round_line(pair[0], pair[1], tile.values[line][0]);
  }
}

// What a call of multiply_panel works with.
struct PanelWork {
  const PaddedPanel panel;
  const PackedVectors& x;
  const PanelTarget& target;
  const PanelTarget& second_target;
  TileSetup setup;
  LateRounding late;
};

inline PackedTile& target_tile(const PanelTarget& target, int64_t row, int64_t block) {
  return target.tiles.first[block * target.tiles.stride + row / kTileElements];
}

// The sums of `rows` rows from `row` on, rounded at once.
template <int kTall, int kWide>
inline void round_sums(const Sums* sums, const PanelTarget& target, int64_t row, int rows, int64_t block) {
  if (target.tiles.first == nullptr) return;
  for (int wide = 0; wide < kWide; ++wide) {
    for (int tall = 0; tall < kTall; tall += 2) {
      const int64_t here = row + tall * kTileRows;
      const uint16_t* bias = target.bias == nullptr ? nullptr : target.bias + here;
      const Sums& upper = sums[tall * kWide + wide];
      const Sums& lower = tall + 1 < kTall ? sums[(tall + 1) * kWide + wide] : upper;  // not looked at where not there
      round_tile(upper, lower, rows - tall * kTileRows, bias, target_tile(target, here, block + wide));
    }
  }
}

// kTall tiles of rows from `row` on times kWide blocks, to both targets.
template <int kTall, int kWide>
inline void multiply_blocks(PanelWork& work, int64_t row, int64_t block) {
  const WeightPanel& given = work.panel.given;
  const int64_t k = given.k, steps = k / kTileElements, x_stride = work.x.stride;
  const int rows = static_cast<int>(given.rows - row < kTall * kTileRows ? given.rows - row : kTall * kTileRows);
  const uint16_t* weight = given.data + row * k;
  const PackedTile* vectors = work.x.first + block * x_stride;
  work.setup.use<kTall, kWide>(rows - (kTall - 1) * kTileRows);
  clear_tiles<kTall * kWide>();
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<kTall, kWide>(weight + step * kTileElements, k * 2, vectors + step, x_stride);
    work.late.round_some();
  }
  if (k % kTileElements != 0) multiply_step<kTall, kWide>(work.panel.rest[row], kRowBytes, vectors + steps, x_stride);
  work.late.finish();
  Sums* sums = work.late.room();
  store_tiles<kTall * kWide>(sums);
  if constexpr (kTall == 2 && kWide == 2) {
    if (rows == 2 * kTileRows && work.target.bias == nullptr && work.second_target.tiles.first == nullptr) {
      return work.late.start(target_tile(work.target, row, block), target_tile(work.target, row, block + 1));
    }
  }
  round_sums<kTall, kWide>(sums, work.target, row, rows, block);
  round_sums<kTall, kWide>(sums, work.second_target, row, rows, block);
}

inline __mmask32 first_lanes(int64_t count) {
  return static_cast<__mmask32>(count >= 32 ? 0xffffffffu : (1u << count) - 1u);
}

// lines[p] holds elements 2 p and 2 p + 1 of all vectors; y gets them one vector after the other.
inline void write_vectors(__m512i lines[16], int64_t vectors, int64_t count, uint16_t* y, int64_t stride) {
  transpose(lines);
  const __mmask32 lanes = first_lanes(count);
#pragma GCC unroll 16
  for (int64_t v = 0; v < 16; ++v) {
    if (v < vectors) _mm512_mask_storeu_epi16(y + v * stride, lanes, lines[v]);
  }
}

}  // namespace

void pack_vectors(const uint16_t* x, int64_t vectors, int64_t stride, int64_t count, PackedTile* tiles) {
  for (int64_t i = 0; i < count; i += kTileElements) {
    const __mmask32 lanes = first_lanes(count - i);
    __m512i lines[16];
#pragma GCC unroll 16
    for (int64_t v = 0; v < 16; ++v) {
      lines[v] = _mm512_setzero_si512();
      if (v < vectors) lines[v] = _mm512_maskz_loadu_epi16(lanes, x + v * stride + i);
      if (v < vectors) __builtin_prefetch(x + v * stride + i + 8 * kTileElements);
    }
    transpose(lines);
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) _mm512_store_si512(tiles->values[p], lines[p]);
    ++tiles;
  }
}

void multiply_panel(
    const WeightPanel& given, const PackedVectors& x, int64_t blocks, const PanelTarget& target,
    const PanelTarget& second_target) {
  if (given.rows == 0) return;  // there is no tile without rows
  PanelWork work{PaddedPanel(given), x, target, second_target, {}, {}};
  const int64_t paired = blocks / 2 * 2;  // 2 x 2 tiles: every tile that is loaded is used twice
  for (int64_t row = 0; row < given.rows; row += 2 * kTileRows) {
    for (int64_t block = 0; block < paired; block += 2) {
      if (given.rows - row > kTileRows) {
        multiply_blocks<2, 2>(work, row, block);
      } else {
        multiply_blocks<1, 2>(work, row, block);
      }
    }
  }
  work.late.finish();
  if (paired == blocks) return;
  switch ((given.rows + kTileRows - 1) / kTileRows) {  // four sums at a time: with fewer, each product waits for the last
    case 4: return multiply_blocks<4, 1>(work, 0, paired);
    case 3: return multiply_blocks<3, 1>(work, 0, paired);
    case 2: return multiply_blocks<2, 1>(work, 0, paired);
    default: return multiply_blocks<1, 1>(work, 0, paired);
  }
}

void unpack_vectors(const PackedTile& tile, int64_t vectors, int64_t count, uint16_t* y, int64_t stride) {
  __m512i lines[16];
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) lines[p] = _mm512_load_si512(tile.values[p]);
  write_vectors(lines, vectors, count, y, stride);
}

void unpack_chosen(
    const uint16_t* first, const uint16_t* second, const PackedSource* sources, int64_t vectors, int64_t count,
    uint16_t* y, int64_t stride) {
  constexpr __mmask32 kEven = 0x55555555u, kOdd = 0xaaaaaaaau;
  const uint16_t* const bases[] = {first, second};
  __m512i lines[16];
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) {
    lines[p] = _mm512_setzero_si512();
    if (2 * p < count) {
      lines[p] = _mm512_maskz_loadu_epi16(kEven, bases[sources[2 * p].is_second] + sources[2 * p].offset);
    }
    if (2 * p + 1 < count) {  // into the other halves: the load begins one element earlier
      const uint16_t* source = bases[sources[2 * p + 1].is_second] + sources[2 * p + 1].offset;
      lines[p] = _mm512_mask_loadu_epi16(lines[p], kOdd, source - 1);
    }
  }
  write_vectors(lines, vectors, count, y, stride);
}

}  // namespace eigenprune

EIGENPRUNE_TARGET_END
#endif
