// SPDX-License-Identifier: Apache-2.0
// At few rows every weight is read once, in order, by whichever thread is free: that is all the time there is. At many
// rows the same units of work are blocks of a matrix product.

#include "factored_linear.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "dot_products.h"
#include "linear_path.h"
#include "merge.h"
#include "ticket.h"
#include "tile_linear.h"

namespace eigenprune {
namespace {

constexpr int64_t kMaxUnitRows = 132;      // a multiple of the six vectors that the kernels take side by side
constexpr int64_t kMaxUnitColumns = 64;    // with 132 rows of float, the size of a level-1 cache
constexpr int64_t kUnitsPerThread = 4;     // with fewer, threads would end too far apart
constexpr int64_t kFewUnits = 16;          // whatever the number of threads; blocks of half the width are slower
constexpr int64_t kUnitBytes = 1 << 15;    // of weights that a thread takes at a time; about a microsecond's worth
constexpr int64_t kSerialBytes = 1 << 16;  // below this, waking a thread costs more than it brings

// A block of one product: what one thread computes before it asks for more.
struct Unit {
  size_t layer;
  int64_t row_begin, row_end;        // of x
  int64_t weight_begin, weight_end;  // rows of the weight
};

void cut_units(
    std::vector<Unit>& units, size_t layer, int64_t rows, int64_t weight_rows, int64_t weight_row_bytes,
    int64_t threads) {
  int64_t columns = kMaxUnitColumns, block = rows;
  if (rows <= kMaxDotRows) {
    columns = std::clamp<int64_t>(kUnitBytes / std::max<int64_t>(1, weight_row_bytes) / 4 * 4, 4, kMaxUnitColumns);
  } else {
    const int64_t blocks = (rows + kMaxUnitRows - 1) / kMaxUnitRows;
    block = std::min(kMaxUnitRows, ((rows + blocks - 1) / blocks + 5) / 6 * 6);
    const int64_t enough = std::min(kFewUnits, kUnitsPerThread * threads);
    if (threads > 1 && (weight_rows + columns - 1) / columns * blocks < enough) columns /= 2;
  }
  for (int64_t begin = 0; begin == 0 || begin < weight_rows; begin += columns) {
    for (int64_t row = 0; row < rows; row += block) {
      units.push_back({layer, row, std::min(rows, row + block), begin, std::min(weight_rows, begin + columns)});
    }
  }
}

// T: dtype of the tensors. X: dtype of what the kernel multiplies with the weights, float or T.
template <typename T, typename X>
class FactoredLinear {
 public:
  FactoredLinear(const DotKernel& kernel, const T* x, int64_t rows, int64_t in, const std::vector<FactoredLayer>& layers)
      : multiply_(rows <= kMaxDotRows ? kernel.dots : kernel.panels),
        round_(kernel.round),
        merge_sums_(merge_function(sizeof(float))),
        merge_(merge_function(sizeof(T))),
        rows_(rows),
        in_(in),
        layers_(layers) {
    int64_t ranks = 0;
    const int64_t threads = torch::stable::get_num_threads();
    for (size_t i = 0; i < layers.size(); ++i) {
      const FactoredLayer& layer = layers[i];
      z_offsets_.push_back(rows * ranks);
      ranks += layer.rank;
      weight_bytes_ += (layer.rank * in + layer.left_rows() * layer.rank) * kSize;
      cut_units(right_units_, i, rows, layer.rank, in * kSize, threads);
      cut_units(left_units_, i, rows, layer.left_rows(), layer.rank * kSize, threads);
    }
    sums_.reset(new float[rows * ranks]);
    if constexpr (!std::is_same_v<X, float>) rounded_.reset(new X[rows * ranks]);
    if constexpr (std::is_same_v<T, X>) {
      x_ = x;
    } else {
      widened_.reset(new X[rows * in]);
      std::copy(x, x + rows * in, widened_.get());
      x_ = widened_.get();
    }
  }

  void run() {
    const int64_t threads = weight_bytes_ * rows_ < kSerialBytes ? 1 : torch::stable::get_num_threads();
    // A stretch for each thread: none writes into a cache line of y that another is writing into, either.
    Ticket first(right_units_.size(), threads), second(left_units_.size(), threads);
    const auto both_products = [&](int64_t thread, int64_t) {
      first.work_off([&](int64_t i) { right_product(right_units_[i]); }, thread);
      first.wait();
      second.work_off([&](int64_t i) { left_product(left_units_[i]); }, thread);
    };
    if (threads == 1) {
      both_products(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, both_products);
    }
  }

 private:
  static constexpr int64_t kSize = sizeof(T);

  // z as the second product reads it, [rows, rank].
  const X* z(size_t layer) const {
    if constexpr (std::is_same_v<X, float>) {
      return sums_.get() + z_offsets_[layer];
    } else {
      return rounded_.get() + z_offsets_[layer];
    }
  }

  // A block of z = x @ right.T.
  void right_product(const Unit& unit) const {
    const FactoredLayer& layer = layers_[unit.layer];
    const int64_t count = unit.weight_end - unit.weight_begin, rows = unit.row_end - unit.row_begin;
    const int64_t offset = z_offsets_[unit.layer] + unit.row_begin * layer.rank + unit.weight_begin;
    const T* right = static_cast<const T*>(layer.right) + unit.weight_begin * in_;
    multiply_(right, count, x_ + unit.row_begin * in_, rows, in_, sums_.get() + offset, layer.rank);
    if constexpr (!std::is_same_v<X, float>) {
      for (int64_t v = 0; v < rows; ++v) {
        const int64_t row = offset + v * layer.rank;
        round_(sums_.get() + row, count, rounded_.get() + row);
      }
    }
  }

  // A block of z @ left.T, and of y where that goes; in layout pivot with the columns of z that stand between.
  void left_product(const Unit& unit) const {
    const FactoredLayer& layer = layers_[unit.layer];
    const int64_t count = unit.weight_end - unit.weight_begin, rows = unit.row_end - unit.row_begin;
    alignas(64) float sums[kMaxUnitRows * kMaxUnitColumns];
    const T* left = static_cast<const T*>(layer.left) + unit.weight_begin * layer.rank;
    multiply_(left, count, z(unit.layer) + unit.row_begin * layer.rank, rows, layer.rank, sums, count);
    if (layer.pivots == nullptr) {
      for (int64_t v = 0; v < rows; ++v) {
        write(layer, unit.row_begin + v, unit.weight_begin, unit.weight_end, sums + v * count);
      }
      return;
    }
    const int64_t before = layer.pivots_before(unit.weight_begin);
    const bool is_last = unit.weight_end == layer.left_rows();
    const int64_t begin = unit.weight_begin + before;
    const int64_t end = is_last ? layer.out : unit.weight_end + layer.pivots_before(unit.weight_end);
    for (int64_t v = 0; v < rows; ++v) {
      const int64_t row = unit.row_begin + v;
      if (std::is_same_v<T, X> && layer.bias == nullptr && layer.z_order == nullptr) {
        // Nothing is added any more: z stands there rounded, and only the others are left to be.
        T others[kMaxUnitColumns];
        round_(sums + v * count, count, others);
        merge_(layer.is_pivot, begin, end, z(unit.layer) + row * layer.rank + before, others,
               static_cast<T*>(layer.y) + row * layer.out + begin);
      } else {
        merge_row(layer, row, begin, end, before, z_row(unit, v), sums + v * count);
      }
    }
  }

  const float* z_row(const Unit& unit, int64_t v) const {
    return sums_.get() + z_offsets_[unit.layer] + (unit.row_begin + v) * layers_[unit.layer].rank;
  }

  // Columns [begin, end) of a row of y: `pivot` counts the pivots before them, `others` are the mixed ones among them.
  void merge_row(
      const FactoredLayer& layer, int64_t row, int64_t begin, int64_t end, int64_t pivot, const float* z,
      const float* others) const {
    alignas(64) float merged[kMaxUnitColumns];
    float reordered[kMaxUnitColumns];
    while (begin < end) {
      const int64_t stop = std::min(end, begin + kMaxUnitColumns);
      int64_t pivots_here = 0;
      while (pivot + pivots_here < layer.rank && layer.pivots[pivot + pivots_here] < stop) ++pivots_here;
      const float* direct = z + pivot;
      if (layer.z_order != nullptr) {
        for (int64_t i = 0; i < pivots_here; ++i) reordered[i] = z[layer.z_order[pivot + i]];
        direct = reordered;
      }
      merge_sums_(layer.is_pivot, begin, stop, direct, others, merged);
      write(layer, row, begin, stop, merged);
      others += stop - begin - pivots_here;
      pivot += pivots_here;
      begin = stop;
    }
  }

  // y[row, begin:end] = values + bias. Changes `values`.
  void write(const FactoredLayer& layer, int64_t row, int64_t begin, int64_t end, float* values) const {
    if (layer.bias != nullptr) {
      const T* bias = static_cast<const T*>(layer.bias) + begin;
      for (int64_t c = 0; c < end - begin; ++c) values[c] += static_cast<float>(bias[c]);
    }
    round_(values, end - begin, static_cast<T*>(layer.y) + row * layer.out + begin);
  }

  const DotKernel::Multiply multiply_;
  const DotKernel::Round round_;
  const MergeFunction merge_sums_, merge_;
  const int64_t rows_, in_;
  const std::vector<FactoredLayer>& layers_;
  std::vector<Unit> right_units_, left_units_;
  std::vector<int64_t> z_offsets_;
  int64_t weight_bytes_ = 0;
  std::unique_ptr<float[]> sums_;  // z of every layer, [rows, rank] each
  std::unique_ptr<X[]> rounded_, widened_;
  const X* x_ = nullptr;
};

Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Element::kFloat32;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kFloat16;
    default: return Element::kOther;
  }
}

}  // namespace

bool serves_factored_linear(ScalarType dtype, int64_t rows, int64_t in, int64_t rank) {
  return linear_path(element_of(dtype), rows, in, rank) != LinearPath::kTorch;
}

void factored_linear(
    ScalarType dtype, const void* x, int64_t rows, int64_t in, const std::vector<FactoredLayer>& layers) {
  if (!layers.empty() && linear_path(element_of(dtype), rows, in, layers.front().rank) == LinearPath::kTiles) {
    return tile_linear(x, rows, in, layers);  // of these, no layer goes another way than its neighbours
  }
  const DotKernel* found = dot_kernel(dtype);
  if (found == nullptr || (rows > kMaxDotRows && found->panels == nullptr)) {  // linear_path.cpp knows better
    throw std::runtime_error("eigenprune: no kernel for this dtype and number of rows");
  }
  const DotKernel& kernel = *found;
  const auto run = [&]<typename T, typename X>() {
    FactoredLinear<T, X>(kernel, static_cast<const T*>(x), rows, in, layers).run();
  };
  switch (dtype) {
    case ScalarType::Float: return run.template operator()<float, float>();
    case ScalarType::Half: return run.template operator()<c10::Half, float>();
    case ScalarType::BFloat16:
      if (kernel.x_dtype == ScalarType::BFloat16) return run.template operator()<c10::BFloat16, c10::BFloat16>();
      return run.template operator()<c10::BFloat16, float>();
    default: throw std::runtime_error("eigenprune: no kernel for this dtype");
  }
}

}  // namespace eigenprune
