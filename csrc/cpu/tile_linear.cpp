// SPDX-License-Identifier: Apache-2.0
// A chunk of the rows of x at a time, small enough to stay in a level-2 cache: packed, multiplied with every right
// factor, and the result, packed already, with every left one. Weights come through from memory once a chunk.

#include "tile_linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <deque>
#include <memory>

#include "amx_tiles.h"
#include "ticket.h"

namespace eigenprune {
#if defined(__x86_64__)
namespace {

constexpr int64_t kChunkBytes = 1 << 20;   // of packed vectors, half a level-2 cache
constexpr int64_t kSerialBytes = 1 << 16;  // of weights and x; below, waking a thread costs more than it brings
constexpr int64_t kAloneRows = 128;        // with as many for each thread, none shares its rows with another, nor waits
constexpr int64_t kPieceRows = 256;        // of them at a time: weights come from memory once a piece
constexpr int64_t kUnitsPerThread = 8;     // so that the last to finish is not far behind
constexpr int64_t kMinUnitBlocks = 4;      // with fewer, a panel of the weight is used too seldom after it was read
constexpr int64_t kPackElements = 1024;    // of sixteen vectors, packed at a time
constexpr int64_t kOutputBlocks = 16;      // whose part of y is packed, still, at a time: 32 KB

int64_t divide_up(int64_t number, int64_t by) { return (number + by - 1) / by; }
int64_t tiles_for(int64_t elements) { return divide_up(elements, kTileElements); }

// A layer, and what stands between its products: z, and z + bias where that is a part of y.
struct TileLayer {
  const FactoredLayer* given;
  PackedVectors z, biased_z;
  const uint16_t* left_bias;                     // [left rows], or null
  const uint16_t* z_bias;                        // [rank], or null: layout pair, or no bias
  std::vector<uint16_t> left_biases, z_biases;   // of a layer with pivots, in the order of its factors' rows
};

// What one thread does before it asks for more. Blocks count from the start of the chunk.
struct Unit {
  size_t layer;
  int64_t block_begin, block_end;
  int64_t begin, end;  // rows of the weight; elements of x, to be packed
};

struct Step {
  enum class Kind { kPack, kRight, kLeft } kind;
  int64_t first_row, rows;  // the chunk
  std::vector<Unit> units;
};

class TileLinear {
 public:
  TileLinear(
      const uint16_t* x, int64_t rows, int64_t in, const std::vector<FactoredLayer>& layers, int64_t threads)
      : x_(x), rows_(rows), in_(in), threads_(threads) {
    int64_t longest = in, z_tiles = 0;
    for (const FactoredLayer& layer : layers) {
      longest = std::max(longest, layer.rank);
      z_tiles += tiles_for(layer.rank) * (layer.pivots != nullptr && layer.bias != nullptr ? 2 : 1);
    }
    const int64_t blocks = divide_up(rows, kTileVectors);
    const int64_t block_bytes = std::max<int64_t>(1, tiles_for(longest)) * sizeof(PackedTile);
    const int64_t most = std::max<int64_t>(2, kChunkBytes / block_bytes / 2 * 2);
    chunk_ = std::min(blocks, divide_up(divide_up(blocks, divide_up(blocks, most)), 2) * 2);
    packed_.reset(new PackedTile[chunk_ * (tiles_for(in) + z_tiles)]);
    prepare(layers);
    for (int64_t block = 0; block < blocks; block += chunk_) plan(block * kTileVectors);
  }

  void run() {
    std::deque<Ticket> tickets;
    for (const Step& step : steps_) tickets.emplace_back(step.units.size());
    const auto all_steps = [&](int64_t, int64_t) {
      for (size_t i = 0; i < steps_.size(); ++i) {
        if (i > 0) tickets[i - 1].wait();
        tickets[i].work_off([&](int64_t unit) { work(steps_[i], steps_[i].units[unit]); });
      }
    };
    if (threads_ == 1) {
      all_steps(0, 1);
    } else {
      torch::stable::parallel_for(0, threads_, 1, all_steps);
    }
  }

 private:
  // Room for z of every layer; biases in the order in which the products come.
  void prepare(const std::vector<FactoredLayer>& layers) {
    PackedTile* next = packed_.get() + chunk_ * tiles_for(in_);
    const auto take = [&](int64_t elements) {
      PackedTile* taken = next;
      next += chunk_ * tiles_for(elements);
      return PackedVectors{taken, tiles_for(elements)};
    };
    layers_.reserve(layers.size());  // the pointers to biases hold
    for (const FactoredLayer& given : layers) {
      TileLayer& layer = layers_.emplace_back(TileLayer{&given, take(given.rank), {}, nullptr, nullptr, {}, {}});
      if (given.bias == nullptr) continue;
      layer.left_bias = static_cast<const uint16_t*>(given.bias);
      if (given.pivots == nullptr) continue;
      layer.biased_z = take(given.rank);
      divide_bias(layer);
    }
  }

  static void divide_bias(TileLayer& layer) {
    const FactoredLayer& given = *layer.given;
    const auto* bias = static_cast<const uint16_t*>(given.bias);
    layer.z_biases.resize(given.rank);
    layer.left_biases.reserve(given.left_rows());
    for (int64_t c = 0, pivot = 0; c < given.out; ++c) {
      if (pivot == given.rank || given.pivots[pivot] != c) {
        layer.left_biases.push_back(bias[c]);
      } else {
        layer.z_biases[z_element(given, pivot++)] = bias[c];
      }
    }
    layer.left_bias = layer.left_biases.data();
    layer.z_bias = layer.z_biases.data();
  }

  // Which element of z goes to the given pivot.
  static int64_t z_element(const FactoredLayer& layer, int64_t pivot) {
    return layer.z_order == nullptr ? pivot : layer.z_order[pivot];
  }

  void plan(int64_t first_row) {
    const int64_t rows = std::min(rows_ - first_row, chunk_ * kTileVectors), blocks = divide_up(rows, kTileVectors);
    Step pack{Step::Kind::kPack, first_row, rows, {}};
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t i = 0; i < in_; i += kPackElements) {
        pack.units.push_back({0, block, block + 1, i, std::min(in_, i + kPackElements)});
      }
    }
    Step right{Step::Kind::kRight, first_row, rows, {}}, left{Step::Kind::kLeft, first_row, rows, {}};
    for (size_t i = 0; i < layers_.size(); ++i) {
      cut(right.units, i, layers_[i].given->rank, blocks, false);
      cut(left.units, i, layers_[i].given->left_rows(), blocks, layers_[i].given->out > 0);
    }
    for (Step* step : {&pack, &right, &left}) steps_.push_back(std::move(*step));
  }

  // Panels of the weight times ranges of blocks. `one_at_least`: even where the weight has no row.
  void cut(std::vector<Unit>& units, size_t layer, int64_t weight_rows, int64_t blocks, bool one_at_least) const {
    const int64_t enough = threads_ == 1 ? 1 : kUnitsPerThread * threads_;
    int64_t panel = kPanelRows, step = blocks;
    if (divide_up(weight_rows, panel) < enough / 4) panel /= 2;
    while (divide_up(weight_rows, panel) * divide_up(blocks, step) < enough && step > kMinUnitBlocks) {
      step = divide_up(divide_up(step, 2), 2) * 2;
    }
    for (int64_t begin = 0; begin < weight_rows || (begin == 0 && one_at_least); begin += panel) {
      for (int64_t block = 0; block < blocks; block += step) {
        units.push_back({layer, block, std::min(blocks, block + step), begin, std::min(weight_rows, begin + panel)});
      }
    }
  }

  void work(const Step& step, const Unit& unit) const {
    switch (step.kind) {
      case Step::Kind::kPack: return pack(step, unit);
      case Step::Kind::kRight: return right_product(unit);
      case Step::Kind::kLeft: return left_product(step, unit);
    }
  }

  static int64_t vectors_in(const Step& step, int64_t block) {
    return std::min(kTileVectors, step.rows - block * kTileVectors);
  }

  void pack(const Step& step, const Unit& unit) const {
    const uint16_t* x = x_ + (step.first_row + unit.block_begin * kTileVectors) * in_ + unit.begin;
    PackedTile* tiles = packed_.get() + unit.block_begin * tiles_for(in_) + unit.begin / kTileElements;
    pack_vectors(x, vectors_in(step, unit.block_begin), in_, unit.end - unit.begin, tiles);
  }

  static PackedVectors from_block(const PackedVectors& vectors, int64_t block) {
    return {vectors.first == nullptr ? nullptr : vectors.first + block * vectors.stride, vectors.stride};
  }

  static PackedVectors from(const PackedVectors& vectors, int64_t block, int64_t element) {
    PackedVectors part = from_block(vectors, block);
    if (part.first != nullptr) part.first += element / kTileElements;
    return part;
  }

  // A panel of z = x @ right.T.
  void right_product(const Unit& unit) const {
    const TileLayer& layer = layers_[unit.layer];
    const auto* right = static_cast<const uint16_t*>(layer.given->right);
    const PackedVectors x = from_block({packed_.get(), tiles_for(in_)}, unit.block_begin);
    const PanelTarget z{from(layer.z, unit.block_begin, unit.begin), nullptr};
    const PanelTarget biased_z{
        from(layer.biased_z, unit.block_begin, unit.begin), layer.z_bias == nullptr ? nullptr : layer.z_bias + unit.begin};
    const WeightPanel panel{right + unit.begin * in_, unit.end - unit.begin, in_};
    multiply_panel(panel, x, unit.block_end - unit.block_begin, z, biased_z);
  }

  // A panel of z @ left.T, and of y where that goes; in layout pivot with the columns of z that stand between.
  void left_product(const Step& step, const Unit& unit) const {
    const TileLayer& layer = layers_[unit.layer];
    const FactoredLayer& given = *layer.given;
    const uint16_t* bias = layer.left_bias == nullptr ? nullptr : layer.left_bias + unit.begin;
    const auto* left = static_cast<const uint16_t*>(given.left);
    const WeightPanel panel{left + unit.begin * given.rank, unit.end - unit.begin, given.rank};
    PackedTile tiles[kOutputBlocks * kPanelRows / kTileElements];
    const PackedVectors products{tiles, kPanelRows / kTileElements};
    for (int64_t block = unit.block_begin; block < unit.block_end; block += kOutputBlocks) {
      const int64_t blocks = std::min(kOutputBlocks, unit.block_end - block);
      multiply_panel(panel, from_block(layer.z, block), blocks, {products, bias}, {});
      if (given.pivots == nullptr) {
        write_products(step, unit, products, block, blocks);
      } else {
        merge_products(step, unit, products, block, blocks);
      }
    }
  }

  void write_products(
      const Step& step, const Unit& unit, const PackedVectors& products, int64_t first_block, int64_t blocks) const {
    const FactoredLayer& layer = *layers_[unit.layer].given;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = step.first_row + (first_block + i) * kTileVectors;
      uint16_t* y = static_cast<uint16_t*>(layer.y) + row * layer.out;
      for (int64_t c = unit.begin; c < unit.end; c += kTileElements) {
        const PackedTile& tile = *from(products, i, c - unit.begin).first;
        unpack_vectors(tile, vectors_in(step, first_block + i), std::min(kTileElements, unit.end - c), y + c, layer.out);
      }
    }
  }

  void merge_products(
      const Step& step, const Unit& unit, const PackedVectors& products, int64_t first_block, int64_t blocks) const {
    const TileLayer& layer = layers_[unit.layer];
    const FactoredLayer& given = *layer.given;
    const PackedVectors& z = layer.biased_z.first == nullptr ? layer.z : layer.biased_z;
    int64_t pivot = given.pivots_before(unit.begin), other = 0;
    const bool is_last = unit.end == given.left_rows();
    const int64_t end = is_last ? given.out : unit.end + given.pivots_before(unit.end);
    for (int64_t begin = unit.begin + pivot; begin < end; begin += kTileElements) {
      const int64_t count = std::min(kTileElements, end - begin);
      PackedSource sources[kTileElements];
      for (int64_t i = 0; i < count; ++i) {
        const bool is_pivot = pivot < given.rank && given.pivots[pivot] == begin + i;
        sources[i] = {is_pivot ? offset_of(z_element(given, pivot)) : offset_of(other), is_pivot};
        pivot += is_pivot;
        other += !is_pivot;
      }
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t block = first_block + i, row = step.first_row + block * kTileVectors;
        uint16_t* y = static_cast<uint16_t*>(given.y) + row * given.out + begin;
        unpack_chosen(
            from_block(products, i).first->values[0][0], from_block(z, block).first->values[0][0], sources,
            vectors_in(step, block), count, y, given.out);
      }
    }
  }

  // Of an element of the first vector of a block, in elements from the block's first.
  static int64_t offset_of(int64_t element) {
    constexpr int64_t kTileSize = sizeof(PackedTile) / sizeof(uint16_t), kLine = 2 * kTileVectors;
    return element / kTileElements * kTileSize + element % kTileElements / 2 * kLine + element % 2;
  }

  const uint16_t* x_;
  const int64_t rows_, in_, threads_;
  int64_t chunk_;                         // blocks
  std::unique_ptr<PackedTile[]> packed_;  // x, then z of every layer
  std::vector<TileLayer> layers_;
  std::vector<Step> steps_;
};

int64_t useful_threads(int64_t rows, int64_t in, const std::vector<FactoredLayer>& layers) {
  int64_t bytes = rows * in * 2;
  for (const FactoredLayer& layer : layers) bytes += layer.rank * (in + layer.left_rows()) * 2;
  return bytes < kSerialBytes ? 1 : torch::stable::get_num_threads();
}

std::vector<FactoredLayer> from_row(std::vector<FactoredLayer> layers, int64_t row) {
  for (FactoredLayer& layer : layers) layer.y = static_cast<uint16_t*>(layer.y) + row * layer.out;
  return layers;
}

}  // namespace

void tile_linear(const void* x_data, int64_t rows, int64_t in, const std::vector<FactoredLayer>& layers) {
  if (rows == 0) return;
  const auto* x = static_cast<const uint16_t*>(x_data);
  const int64_t threads = useful_threads(rows, in, layers);
  if (threads == 1 || rows < threads * kAloneRows) return TileLinear(x, rows, in, layers, threads).run();
  const int64_t pieces = threads * divide_up(rows, threads * kPieceRows);
  const int64_t step = divide_up(divide_up(rows, pieces), 2 * kTileVectors) * 2 * kTileVectors;
  Ticket ticket(divide_up(rows, step));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    ticket.work_off([&](int64_t i) {
      const int64_t first = i * step;
      TileLinear(x + first * in, std::min(step, rows - first), in, from_row(layers, first), 1).run();
    });
  });
}
#else
void tile_linear(const void*, int64_t, int64_t, const std::vector<FactoredLayer>&) {}  // no level asks for it
#endif

}  // namespace eigenprune
