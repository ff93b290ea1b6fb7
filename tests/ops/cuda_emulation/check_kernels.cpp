// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda on emulated blocks and compares every bit with a literal reference. All values are
// small whole numbers, so every sum is exact in any order and the one right result is known without a tolerance. Arrays
// end where their allocation ends: under AddressSanitizer a read past them is an error. Exit code 0 = all equal.
//
//   check_kernels <n>   every n-th of the small cases (1 = all), and the others

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/cuda/decode_linear.cu"
#include "../../../csrc/cuda/pivot_linear.cu"

namespace eigenprune {

// Here, and not in emulator.cpp, because sanitizers watch this file.
Chunk load_once(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    std::fprintf(stderr, "misaligned 16-byte load\n");
    std::_Exit(3);
  }
  Chunk chunk;
  memcpy(&chunk, from, sizeof chunk);
  return chunk;
}
Chunk load_kept(const void* from) { return load_once(from); }

}  // namespace eigenprune

namespace {

using namespace eigenprune;

std::mt19937 generator(7);
int cases = 0, failures = 0;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// An array that starts `shift` elements behind a 16-byte boundary and ends with its allocation.
template <typename T>
struct Array {
  std::unique_ptr<T[]> memory;
  T* data;
  int64_t size;
  Array(int64_t size_, int64_t shift) : memory(new T[size_ + shift]), data(memory.get() + shift), size(size_) {}
};

template <typename Element>
Array<typename Element::Bits> draw_numbers(int64_t size, int64_t shift, std::vector<double>& values) {
  Array<typename Element::Bits> array(size, shift);
  values.resize(size);
  for (int64_t i = 0; i < size; ++i) {
    values[i] = static_cast<double>(draw(-1, 1));
    array.data[i] = Element::round(static_cast<float>(values[i]));
  }
  return array;
}

std::vector<int32_t> draw_pivots(int64_t out, int64_t rank) {
  std::vector<int32_t> all(out);
  for (int64_t i = 0; i < out; ++i) all[i] = static_cast<int32_t>(i);
  std::shuffle(all.begin(), all.end(), generator);
  all.resize(rank);
  return all;
}

void report(const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

enum class Layout { kPair, kPivot, kRepeatedPivot, kNegativePivot, kLargePivot };

struct Shape {
  int64_t in, rank, left_rows;
  Layout layout;
  bool has_bias;
  int64_t shift;  // elements behind an aligned address, of every operand
  std::string text() const {
    return "in " + std::to_string(in) + " rank " + std::to_string(rank) + " left rows " + std::to_string(left_rows) +
        " layout " + std::to_string(static_cast<int>(layout)) + " shift " + std::to_string(shift);
  }
};

// Buffers of one problem, and what its output must be.
template <typename Element>
struct Case {
  using Bits = typename Element::Bits;
  Shape shape;
  int64_t rows, out;
  std::vector<double> x_values, right_values, left_values, bias_values;
  Array<Bits> x, right, left, bias, z, y;
  std::vector<int32_t> pivot_values;
  Array<int32_t> pivots;
  Array<int64_t> rest;
  std::vector<Bits> expected;

  bool has_pivots() const { return shape.layout != Layout::kPair; }
  bool is_bad() const { return has_pivots() && shape.layout != Layout::kPivot; }

  Case(const Shape& shape_, int64_t rows_)
      : shape(shape_),
        rows(rows_),
        out(shape_.left_rows + (has_pivots() ? shape_.rank : 0)),
        x(draw_numbers<Element>(rows * shape.in, shape.shift, x_values)),
        right(draw_numbers<Element>(shape.rank * shape.in, shape.shift, right_values)),
        left(draw_numbers<Element>(shape.left_rows * shape.rank, shape.shift, left_values)),
        bias(draw_numbers<Element>(out, shape.shift, bias_values)),
        z(rows * shape.rank, 0),
        y(rows * out, 0),
        pivot_values(has_pivots() ? draw_pivots(out, shape.rank) : std::vector<int32_t>()),
        pivots(static_cast<int64_t>(pivot_values.size()), 0),
        rest(1 + shape.left_rows, 0) {
    if (shape.layout == Layout::kRepeatedPivot) pivot_values.back() = pivot_values.front();
    if (shape.layout == Layout::kNegativePivot) pivot_values[shape.rank / 2] = -1;
    if (shape.layout == Layout::kLargePivot) pivot_values[shape.rank / 2] = static_cast<int32_t>(out);
    for (int64_t i = 0; i < pivots.size; ++i) pivots.data[i] = pivot_values[i];
    compute_expected();
  }

  void compute_expected() {
    std::vector<char> taken(out, 0);
    for (const int32_t pivot : pivot_values) {
      if (!is_bad()) taken[pivot] = 1;
    }
    std::vector<int64_t> positions;
    for (int64_t o = 0; o < out; ++o) {
      if (!taken[o]) positions.push_back(o);
    }
    std::vector<double> dense(rows * out, 0.0);
    for (int64_t v = 0; v < rows && !is_bad(); ++v) {
      std::vector<double> product(shape.rank, 0.0);
      for (int64_t j = 0; j < shape.rank; ++j) {
        for (int64_t k = 0; k < shape.in; ++k) {
          product[j] += right_values[j * shape.in + k] * x_values[v * shape.in + k];
        }
        if (std::fabs(product[j]) > 256) std::abort();  // no longer exact in bfloat16: draw fewer columns
        if (has_pivots()) dense[v * out + pivot_values[j]] = product[j];
      }
      for (int64_t i = 0; i < shape.left_rows; ++i) {
        double& y_value = dense[v * out + positions[i]];
        for (int64_t j = 0; j < shape.rank; ++j) y_value += left_values[i * shape.rank + j] * product[j];
      }
      for (int64_t o = 0; o < out && shape.has_bias; ++o) dense[v * out + o] += bias_values[o];
    }
    for (const double value : dense) expected.push_back(Element::round(is_bad() ? NAN : static_cast<float>(value)));
  }

  EigenpruneDecodeProblem arguments() const {
    return {x.data, right.data, left.data, shape.has_bias ? bias.data : nullptr, has_pivots() ? pivots.data : nullptr,
            z.data, has_pivots() ? rest.data : nullptr, y.data, shape.in, shape.rank, shape.left_rows};
  }

  // Whatever was there before must not matter.
  void soil(uint8_t byte) {
    memset(z.data, byte, z.size * sizeof(Bits));
    memset(y.data, byte, y.size * sizeof(Bits));
    memset(rest.data, byte, rest.size * sizeof(int64_t));
  }
};

template <typename Element>
void check_decode(int dtype, const std::vector<Shape>& shapes, int64_t rows) {
  std::vector<std::unique_ptr<Case<Element>>> problems;
  std::vector<EigenpruneDecodeProblem> arguments;
  for (const Shape& shape : shapes) {
    problems.push_back(std::make_unique<Case<Element>>(shape, rows));
    arguments.push_back(problems.back()->arguments());
  }
  for (const auto order : {emulator::Order::kAscending, emulator::Order::kDescending, emulator::Order::kShuffled}) {
    emulator::order = order;
    for (auto& problem : problems) problem->soil(static_cast<uint8_t>(draw(0, 255)));
    const int code =
        eigenprune_decode_linear(dtype, arguments.data(), static_cast<int>(arguments.size()), rows, nullptr);
    ++cases;
    for (const auto& problem : problems) {
      const auto& expected = problem->expected;
      const bool is_equal = code == 0 && std::equal(expected.begin(), expected.end(), problem->y.data);
      if (!is_equal) {
        report("decode, dtype " + std::to_string(dtype) + " rows " + std::to_string(rows) + " order " +
               std::to_string(static_cast<int>(order)) + ": " + problem->shape.text());
      }
    }
  }
}

void check_decode_all(const std::vector<Shape>& shapes, int64_t rows) {
  check_decode<Float32>(kEigenpruneFloat32, shapes, rows);
  check_decode<Float16>(kEigenpruneFloat16, shapes, rows);
  check_decode<BFloat16>(kEigenpruneBFloat16, shapes, rows);
}

void check_small_shapes(int stride) {
  int index = 0;
  for (int64_t rows = 1; rows <= 16; ++rows) {
    for (int turn = 0; turn < 12; ++turn) {
      const bool in_chunks = turn % 3 == 0;  // lengths that allow 16-byte loads; the others mostly do not
      const int64_t unit = in_chunks ? 8 : 1, most = in_chunks ? 9 : 67;
      Shape shape{unit * draw(0, most), unit * draw(0, most), draw(0, 67), static_cast<Layout>(turn % 5), turn % 2 == 0,
                  turn % 4 == 1 ? draw(1, 7) : 0};
      const bool needs_pivots = shape.layout != Layout::kPair && shape.layout != Layout::kPivot;
      if (needs_pivots && shape.rank < 2) shape.layout = Layout::kPivot;
#ifdef __SANITIZE_THREAD__  // two threads then write one output, and a later launch writes NaN over it
      if (shape.layout == Layout::kRepeatedPivot) shape.layout = Layout::kPivot;
#endif
      if (index++ % stride == 0) check_decode_all({shape}, rows);
    }
  }
}

void check_chosen_shapes() {
  // Many warps, more than one turn of the unrolled loop, several blocks; 4224 = 16 warps x 8 loads x 32 columns + 128.
  check_decode_all({{4224, 9, 11, Layout::kPivot, true, 0}}, 3);
  check_decode_all({{2112, 17, 5, Layout::kPair, false, 0}}, 16);
  check_decode_all({{36, 576, 40, Layout::kPivot, true, 0}}, 9);
  check_decode_all({{577, 33, 70, Layout::kPair, true, 1}}, 2);
  check_decode_all({{64, 24, 40, Layout::kPivot, true, 1}}, 3);  // lengths fit 16-byte loads, addresses do not
  check_decode_all({{64, 24, 40, Layout::kPair, true, 4}}, 11);
  check_decode_all({{8, 8, 2100, Layout::kPair, true, 0}}, 1);  // more blocks than 128
}

void check_groups() {  // as q, k, v: one launch, ranks and layouts of their own, among them nothing to do at all
  const Shape q{64, 24, 40, Layout::kPivot, true, 0}, k{64, 8, 16, Layout::kPair, false, 0};
  const Shape empty{64, 0, 0, Layout::kPair, false, 0}, only_pivots{64, 16, 0, Layout::kPivot, true, 0};
  const Shape bad{64, 16, 0, Layout::kLargePivot, true, 0}, odd{61, 9, 20, Layout::kPivot, true, 0};
  check_decode_all({q, k, k}, 1);
  check_decode_all({empty, q, empty, bad, k, empty}, 5);
  check_decode_all({only_pivots, bad, only_pivots}, 16);
  check_decode_all({q, odd, k}, 7);
  check_decode_all({empty}, 2);
  check_decode_all(std::vector<Shape>(8, k), 4);
}

enum class Fault { kNone, kRepeated, kLarge };

// The table that eigenprune_pivot_sources must make: -1 everywhere for wrong pivots.
std::vector<int64_t> expected_sources(const std::vector<int32_t>& pivots, int64_t out, Fault fault) {
  std::vector<int64_t> sources(out, -1);
  if (fault != Fault::kNone) return sources;
  const int64_t rank = static_cast<int64_t>(pivots.size());
  for (int64_t i = 0; i < rank; ++i) sources[pivots[i]] = i;
  int64_t next = rank;
  for (int64_t& source : sources) {
    if (source < 0) source = next++;
  }
  return sources;
}

template <typename T>
void check_interleave(int dtype, int64_t rows, int64_t rank, int64_t left_rows, bool has_bias, Fault fault) {
  const int64_t out = rank + left_rows;
  std::vector<int32_t> pivots = draw_pivots(out, rank);
  if (fault == Fault::kRepeated) pivots.back() = pivots.front();
  if (fault == Fault::kLarge) pivots.back() = static_cast<int32_t>(out);
  const std::vector<int64_t> sources = expected_sources(pivots, out, fault);
  Array<int32_t> pivot_array(rank, 0);
  std::copy(pivots.begin(), pivots.end(), pivot_array.data);
  Array<int64_t> source(out, 0);
  Array<T> z(rows * rank, 0), mixed(rows * left_rows, 0), bias(out, 0), y(rows * out, 0);
  for (Array<T>* array : {&z, &mixed, &bias}) {
    for (int64_t i = 0; i < array->size; ++i) array->data[i] = static_cast<T>(static_cast<float>(draw(-9, 9)));
  }
  for (const auto order : {emulator::Order::kAscending, emulator::Order::kShuffled}) {
    emulator::order = order;
    ++cases;
    bool is_equal = eigenprune_pivot_sources(pivot_array.data, rank, out, source.data, nullptr) == 0 &&
        std::equal(sources.begin(), sources.end(), source.data);
    const int code = eigenprune_pivot_interleave(
        dtype, z.data, mixed.data, source.data, has_bias ? bias.data : nullptr, y.data, rows, rank, out, nullptr);
    for (int64_t i = 0; i < rows * out; ++i) {
      const int64_t row = i / out, from = sources[i % out];
      const float found = static_cast<float>(y.data[i]);
      const float value = from < 0 ? NAN
          : from < rank            ? static_cast<float>(z.data[row * rank + from])
                                   : static_cast<float>(mixed.data[row * left_rows + from - rank]);
      const float expected = value + (has_bias ? static_cast<float>(bias.data[i % out]) : 0.f);
      is_equal = is_equal && (from < 0 ? std::isnan(found) : found == expected);
    }
    if (!is_equal || code != 0) {
      report("interleave, dtype " + std::to_string(dtype) + " rank " + std::to_string(rank) + " left rows " +
             std::to_string(left_rows) + " fault " + std::to_string(static_cast<int>(fault)));
    }
  }
}

void check_interleaves(int stride) {
  for (int turn = 0; turn < 24; turn += stride) {
    const int64_t rows = draw(0, 5), rank = draw(2, 67), left_rows = draw(0, 700);
    const bool has_bias = turn % 2 == 0;
    const Fault fault = static_cast<Fault>(turn % 3);
    check_interleave<float>(kEigenpruneFloat32, rows, rank, left_rows, has_bias, fault);
    check_interleave<double>(kEigenpruneFloat64, rows, rank, left_rows, has_bias, fault);
    check_interleave<__half>(kEigenpruneFloat16, rows, rank, left_rows, has_bias, fault);
    check_interleave<__nv_bfloat16>(kEigenpruneBFloat16, rows, rank, left_rows, has_bias, fault);
  }
  check_interleave<float>(kEigenpruneFloat32, 1, 0, 70, true, Fault::kNone);
  check_interleave<float>(kEigenpruneFloat32, 0, 4000, 146000, true, Fault::kNone);  // the table alone, three turns
}

}  // namespace

int main(int count, char** values) {
  const int stride = count > 1 ? std::atoi(values[1]) : 1;
  check_small_shapes(stride);
  check_interleaves(stride);
  check_chosen_shapes();
  check_groups();
  std::printf("%d runs, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
