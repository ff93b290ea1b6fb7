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
inline void store_tiles(float (*sums)[kTileRows][kTileVectors]) {
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

using Sums = float[kTileRows][kTileVectors];

// The sums of 32 rows of the weight. Without a branch: the processor does it while it multiplies the next tiles.
inline void round_full_tile(const Sums& upper, const Sums& lower, PackedTile& tile) {
#pragma GCC unroll 8
  for (int line = 0; line < 8; ++line) {
    round_line(_mm512_load_ps(upper[2 * line]), _mm512_load_ps(upper[2 * line + 1]), tile.values[line][0]);
  }
#pragma GCC unroll 8
  for (int line = 0; line < 8; ++line) {
    round_line(_mm512_load_ps(lower[2 * line]), _mm512_load_ps(lower[2 * line + 1]), tile.values[8 + line][0]);
  }
}

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

// kTall tiles of rows from `row` on times kWide blocks, to both targets.
template <int kTall, int kWide>
inline void multiply_blocks(
    TileSetup& setup, const PaddedPanel& panel, int64_t row, const PackedVectors& x, int64_t block,
    const PanelTarget& target, const PanelTarget& second_target) {
  const int64_t k = panel.given.k, steps = k / kTileElements;
  const int rows = static_cast<int>(panel.given.rows - row < kTall * kTileRows ? panel.given.rows - row : kTall * kTileRows);
  const uint16_t* weight = panel.given.data + row * k;
  const PackedTile* vectors = x.first + block * x.stride;
  setup.use<kTall, kWide>(rows - (kTall - 1) * kTileRows);
  clear_tiles<kTall * kWide>();
  const int64_t x_stride = x.stride;  // the compiler would read it again at every step
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<kTall, kWide>(weight + step * kTileElements, k * 2, vectors + step, x_stride);
  }
  if (k % kTileElements != 0) multiply_step<kTall, kWide>(panel.rest[row], kRowBytes, vectors + steps, x_stride);
  alignas(64) float sums[kTall * kWide][kTileRows][kTileVectors];
  store_tiles<kTall * kWide>(sums);
  const PanelTarget* const goals[] = {&target, &second_target};
  for (const PanelTarget* goal : goals) {
    if (goal->tiles.first == nullptr) continue;
    for (int wide = 0; wide < kWide; ++wide) {
      for (int tall = 0; tall < kTall; tall += 2) {
        const int64_t here = row + tall * kTileRows;
        PackedTile& tile = goal->tiles.first[(block + wide) * goal->tiles.stride + here / kTileElements];
        const uint16_t* bias = goal->bias == nullptr ? nullptr : goal->bias + here;
        const Sums& upper = sums[tall * kWide + wide];
        const Sums& lower = tall + 1 < kTall ? sums[(tall + 1) * kWide + wide] : upper;  // not looked at where not there
        const int rows_here = rows - tall * kTileRows;
        if (bias == nullptr && rows_here >= 2 * kTileRows) {
          round_full_tile(upper, lower, tile);
        } else {
          round_tile(upper, lower, rows_here, bias, tile);
        }
      }
    }
  }
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
  const PaddedPanel panel(given);
  TileSetup setup;
  const int64_t paired = blocks / 2 * 2;  // 2 x 2 tiles: every tile that is loaded is used twice
  for (int64_t row = 0; row < given.rows; row += 2 * kTileRows) {
    for (int64_t block = 0; block < paired; block += 2) {
      if (given.rows - row > kTileRows) {
        multiply_blocks<2, 2>(setup, panel, row, x, block, target, second_target);
      } else {
        multiply_blocks<1, 2>(setup, panel, row, x, block, target, second_target);
      }
    }
  }
  if (paired == blocks) return;
  switch ((given.rows + kTileRows - 1) / kTileRows) {  // four sums at a time: with fewer, each product waits for the last
    case 4: return multiply_blocks<4, 1>(setup, panel, 0, x, paired, target, second_target);
    case 3: return multiply_blocks<3, 1>(setup, panel, 0, x, paired, target, second_target);
    case 2: return multiply_blocks<2, 1>(setup, panel, 0, x, paired, target, second_target);
    default: return multiply_blocks<1, 1>(setup, panel, 0, x, paired, target, second_target);
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
