// SPDX-License-Identifier: Apache-2.0
// eigenprune::gram_svd on CPU: a batch of singular value decompositions through the Gram matrix of the short side, one
// thread per matrix. A threaded LAPACK call per matrix spends a 64 x 64 problem on waiting for its threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"

namespace eigenprune {
namespace {

constexpr const char* kOp = "eigenprune::gram_svd";

std::tuple<Tensor, Tensor> call_pair(const char* name, const Tensor& input, const std::string& mode) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(input), torch::stable::detail::from(mode)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// x y into out, which may have strides: no allocation, whose pages the system would have to clear for every matrix.
void multiply_into(const Tensor& out, const Tensor& x, const Tensor& y) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(y), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that came with it
}

template <typename T>
constexpr ScalarType dtype_of() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

// One matrix of the batch [short_side, long_side], and where its result goes.
template <typename Out>
struct Problem {
  const Out* a;
  int64_t row_stride, column_stride;  // in elements
  int64_t short_side, long_side, rank;
  bool right_decides;  // whose largest entry is made positive
  Out* left;           // [short_side, rank]
  Out* values;         // [rank]
  Out* right;          // [rank, long_side]
  double* energy;      // ||a||_F^2
};

// Independent partial results: without fast math a compiler keeps the order of one running sum, and waits for every add.
constexpr int64_t kLanes = 16;

template <typename T>
double sum_of_squares(const T* x, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = x[i + lane];
      lanes[lane] += value * value;
    }
  }
  double sum = 0;
  for (; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <typename T>
T largest_magnitude(const T* x, int64_t count) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T magnitude = std::fabs(x[i + lane]);
      lanes[lane] = magnitude > lanes[lane] ? magnitude : lanes[lane];
    }
  }
  T largest = 0;
  for (; i < count; ++i) largest = std::max<T>(largest, std::fabs(x[i]));
  for (const T lane : lanes) largest = std::max(largest, lane);
  return largest;
}

// a [short_side, long_side] without strides, in its own precision. Blocks, so that a transposed a is read by cache line.
template <typename Out>
void copy_dense(const Problem<Out>& problem, Out* dense) {
  constexpr int64_t kBlock = 32;
  const int64_t s = problem.short_side, n = problem.long_side;
  for (int64_t top = 0; top < s; top += kBlock) {
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t bottom = std::min(top + kBlock, s), last = std::min(first + kBlock, n);
      for (int64_t i = top; i < bottom; ++i) {
        for (int64_t j = first; j < last; ++j) {
          dense[i * n + j] = problem.a[i * problem.row_stride + j * problem.column_stride];
        }
      }
    }
  }
}

// The power of two above the largest entry: products of entries scaled by it neither overflow nor vanish.
template <typename Out>
int scale_exponent(const Out* dense, int64_t count) {
  int exponent = 0;
  std::frexp(static_cast<double>(largest_magnitude(dense, count)), &exponent);  // 0 for 0
  return exponent;
}

template <typename Out, typename T>
void copy_scaled(const Out* dense, int64_t count, int exponent, T* copy) {
  const double scale = std::ldexp(1.0, -exponent);
  for (int64_t i = 0; i < count; ++i) copy[i] = static_cast<T>(static_cast<double>(dense[i]) * scale);
}

template <typename T>
std::vector<double> row_norms(const T* product, int64_t rank, int64_t long_side) {
  std::vector<double> norms(static_cast<size_t>(rank));
  for (int64_t i = 0; i < rank; ++i) norms[i] = std::sqrt(sum_of_squares(product + i * long_side, long_side));
  return norms;
}

// Rows u_i^T a are orthogonal up to u s_max^2 / (s_i s_j), u of the computation. They are orthogonalised where that is
// above the rounding of the result, or above long_side u, LAPACK's unit, where both have one precision.
template <typename Out, typename T>
bool needs_qr(const std::vector<double>& norms, int64_t long_side) {
  const double finer = std::numeric_limits<Out>::epsilon() / std::numeric_limits<T>::epsilon();
  const double room = sizeof(Out) == sizeof(T) ? std::max<double>(64, long_side) : finer;
  const double largest = *std::max_element(norms.begin(), norms.end());
  const double smallest = *std::min_element(norms.begin(), norms.end());
  return largest * largest >= room * smallest * smallest;  // also for zeros
}

// a a^T into gram [s, s], its lower triangle only, which is all that the eigensolver reads: by blocks of rows.
void lower_gram(const Tensor& a, const Tensor& gram) {
  constexpr int64_t kRows = 192;
  const int64_t s = a.size(0);
  for (int64_t top = 0; top < s; top += kRows) {
    const int64_t rows = std::min(kRows, s - top), width = top + rows;
    Tensor whole = a, target = gram;  // narrow takes its argument by reference
    const Tensor some = torch::stable::narrow(whole, 0, top, rows), upto = torch::stable::narrow(whole, 0, 0, width);
    Tensor target_rows = torch::stable::narrow(target, 0, top, rows);
    multiply_into(torch::stable::narrow(target_rows, 1, 0, width), some, torch::stable::transpose(upto, 0, 1));
  }
}

// The first entry of largest magnitude.
template <typename T>
T deciding_entry(const T* x, int64_t count, int64_t step) {
  if (step != 1) {
    T largest = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (std::fabs(x[j * step]) > std::fabs(largest)) largest = x[j * step];
    }
    return largest;
  }
  const T magnitude = largest_magnitude(x, count);
  for (int64_t j = 0; j < count; ++j) {
    if (std::fabs(x[j]) == magnitude) return x[j];
  }
  return 0;  // not a number, which no check let through
}

// What one thread needs for every matrix of its share: memory, taken once.
template <typename T>
struct Workspace {
  Tensor a;        // [s, n], or [n, s] where the matrices are transposed
  Tensor gram;     // [s, s]
  Tensor product;  // [rank, n]
};

template <typename Out, typename T>
void write_result(const Problem<Out>& problem, int exponent, const T* vectors, int64_t vector_stride,
                  const T* rows, int64_t row_stride, int64_t entry_stride, const std::vector<double>& signs,
                  const std::vector<double>& values, const std::vector<double>& norms) {
  const int64_t rank = problem.rank;
  std::vector<int64_t> order(static_cast<size_t>(rank));
  std::iota(order.rbegin(), order.rend(), 0);  // the eigensolver puts the largest last
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return values[i] > values[j]; });
  std::vector<double> left_flips(static_cast<size_t>(rank));
  for (int64_t to = 0; to < rank; ++to) {
    const int64_t from = order[to];
    const T* right = rows + from * row_stride;
    const T largest = problem.right_decides ? deciding_entry(right, problem.long_side, entry_stride)
                                            : deciding_entry(vectors + from * vector_stride, problem.short_side, 1);
    // left * right must stay u_i (u_i^T a) = left * right * signs, whichever of the two decides.
    const double sign = std::copysign(1.0, static_cast<double>(largest));
    const double flip = problem.right_decides ? sign : sign * signs[from];
    left_flips[to] = problem.right_decides ? flip * signs[from] : sign;
    const double factor = flip / (norms[from] > 0 ? norms[from] : 1.0);
    Out* target = problem.right + to * problem.long_side;
    if (entry_stride == 1) {
      for (int64_t j = 0; j < problem.long_side; ++j) target[j] = static_cast<Out>(right[j] * factor);
    } else {
      for (int64_t j = 0; j < problem.long_side; ++j) target[j] = static_cast<Out>(right[j * entry_stride] * factor);
    }
    problem.values[to] = static_cast<Out>(std::ldexp(values[from], exponent));
  }
  for (int64_t first = 0; first < rank; first += kLanes) {  // of left a cache line at a time
    const int64_t last = std::min(first + kLanes, rank);
    for (int64_t j = 0; j < problem.short_side; ++j) {
      for (int64_t to = first; to < last; ++to) {
        const T entry = vectors[order[to] * vector_stride + j];
        problem.left[j * rank + to] = static_cast<Out>(entry * left_flips[to]);
      }
    }
  }
}

// The matrix number i of all, dense [s, n], times 2^-exponent, and its energy.
template <typename Out, typename T>
Tensor scaled_matrix(const Tensor& all, int64_t i, const Problem<Out>& problem, Workspace<T>& space, int& exponent) {
  const int64_t s = problem.short_side, n = problem.long_side;
  const bool transposed = problem.row_stride == 1 && problem.column_stride == s && s > 1;
  const bool dense_rows = problem.column_stride == 1 && problem.row_stride == n;
  std::vector<Out> copy;
  const Out* dense = problem.a;
  if (!dense_rows && !transposed) {
    copy.resize(static_cast<size_t>(s * n));
    copy_dense(problem, copy.data());
    dense = copy.data();
  }
  exponent = scale_exponent(dense, s * n);
  constexpr int kHarmless = 16;  // sums of squares stay far inside of float32
  if (std::is_same_v<Out, T> && sizeof(T) == 4 && copy.empty() && std::abs(exponent) < kHarmless) {
    exponent = 0;
    *problem.energy = sum_of_squares(dense, s * n);
    return torch::stable::select(all, 0, i);
  }
  T* scaled = space.a.template mutable_data_ptr<T>();
  copy_scaled(dense, s * n, exponent, scaled);
  *problem.energy = std::ldexp(sum_of_squares(scaled, s * n), 2 * exponent);
  if (!transposed) return torch::stable::view(space.a, {s, n});
  return torch::stable::transpose(torch::stable::view(space.a, {n, s}), 0, 1);
}

template <typename Out, typename T>
void decompose(const Tensor& all, int64_t i, const Problem<Out>& problem, Workspace<T>& space) {
  const int64_t s = problem.short_side, n = problem.long_side, rank = problem.rank;
  int exponent = 0;
  const Tensor a = scaled_matrix(all, i, problem, space, exponent);
  lower_gram(a, space.gram);
  Tensor vectors = std::get<1>(call_pair("aten::linalg_eigh", space.gram, "L"));  // [s, s], ascending, one a column
  if (vectors.stride(0) != 1) {
    vectors = torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(vectors, 0, 1)), 0, 1);
  }
  const int64_t stride = vectors.stride(1);
  const T* columns = vectors.const_data_ptr<T>() + (s - rank) * stride;
  Tensor leading = torch::stable::transpose(vectors, 0, 1);
  leading = torch::stable::narrow(leading, 0, s - rank, rank);
  multiply_into(space.product, leading, a);
  const T* rows = space.product.template const_data_ptr<T>();
  const std::vector<double> norms = row_norms(rows, rank, n);
  if (!needs_qr<Out, T>(norms, n)) {
    const std::vector<double> signs(static_cast<size_t>(rank), 1.0);
    write_result(problem, exponent, columns, stride, rows, n, 1, signs, norms, norms);
    return;
  }
  // a^T U = Q R with R diagonal up to rounding: Q keeps the order and completes the null directions. Largest first, since
  // a column is made orthogonal to those before it.
  Tensor ordered = torch::stable::new_empty(space.product, {rank, n});
  T* target = ordered.mutable_data_ptr<T>();
  for (int64_t row = 0; row < rank; ++row) std::copy_n(rows + (rank - 1 - row) * n, n, target + row * n);
  const auto [q, r] = call_pair("aten::linalg_qr", torch::stable::transpose(ordered, 0, 1), "reduced");
  std::vector<double> values(static_cast<size_t>(rank)), signs(static_cast<size_t>(rank)), ones(rank, 1.0);
  const T* diagonal = r.const_data_ptr<T>();
  const int64_t step = r.stride(0) + r.stride(1);
  for (int64_t row = 0; row < rank; ++row) {
    const double entry = diagonal[(rank - 1 - row) * step];
    values[row] = std::fabs(entry);
    signs[row] = entry < 0 ? -1.0 : 1.0;
  }
  const int64_t q_stride = q.stride(1);  // rows of Q^T from the last to the first, like the eigenvectors
  write_result(problem, exponent, columns, stride, q.const_data_ptr<T>() + (rank - 1) * q_stride, -q_stride, q.stride(0),
               signs, values, ones);
}

template <typename Out, typename T>
void decompose_some(const Tensor& a, const std::vector<Problem<Out>>& problems, int64_t begin, int64_t end,
                    std::vector<std::string>& failures) {
  const Problem<Out>& one = problems[begin];
  Workspace<T> space{torch::stable::new_empty(a, {one.short_side * one.long_side}, dtype_of<T>()),
                     torch::stable::new_zeros(a, {one.short_side, one.short_side}, dtype_of<T>()),
                     torch::stable::new_empty(a, {one.rank, one.long_side}, dtype_of<T>())};
  for (int64_t i = begin; i < end; ++i) {
    try {
      decompose<Out, T>(a, i, problems[i], space);
    } catch (const std::exception& error) {  // an exception must not leave a thread of the pool
      failures[i] = std::string("x") + error.what();
    }
  }
}

template <typename Out>
void decompose_batch(const Tensor& a, bool double_precision, bool right_decides, Tensor& left, Tensor& values,
                     Tensor& right, Tensor& energy) {
  const int64_t batch = a.size(0), s = a.size(1), n = a.size(2), rank = left.size(2);
  const Out* a_data = a.const_data_ptr<Out>();
  Out* left_data = left.mutable_data_ptr<Out>();
  Out* values_data = values.mutable_data_ptr<Out>();
  Out* right_data = right.mutable_data_ptr<Out>();
  double* energy_data = energy.mutable_data_ptr<double>();
  std::vector<std::string> failures(static_cast<size_t>(batch));
  std::vector<Problem<Out>> problems;
  for (int64_t i = 0; i < batch; ++i) {
    problems.push_back({a_data + i * a.stride(0), a.stride(1), a.stride(2), s, n, rank, right_decides,
                        left_data + i * s * rank, values_data + i * rank, right_data + i * rank * n, energy_data + i});
  }
  const auto work = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    try {
      if (double_precision) {
        decompose_some<Out, double>(a, problems, begin, end, failures);
      } else {
        decompose_some<Out, float>(a, problems, begin, end, failures);
      }
    } catch (const std::exception& error) {  // no memory to work in
      failures[begin] = std::string("x") + error.what();
    }
  };
  if (batch >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, batch, 1, work);
  } else {
    work(0, batch);  // the threads then work inside each matrix
  }
  for (int64_t i = 0; i < batch; ++i) {
    if (!failures[i].empty()) check(false, kOp, "matrix ", i, ": ", failures[i].substr(1));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gram_svd_cpu(
    const Tensor& a, int64_t rank, bool double_precision, bool right_decides) {
  check(a.dim() == 3, kOp, "a must be [batch, short, long] (", shape_text("a", a), ")");
  const int64_t batch = a.size(0), s = a.size(1), n = a.size(2);
  check(s <= n, kOp, "the first side must not be the longer one (", shape_text("a", a), ")");
  check(rank >= 1 && rank <= s, kOp, "rank ", rank, " is outside [1, ", s, "]");
  const ScalarType dtype = a.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp, "a must be float32 or float64, not ",
        dtype_text(dtype));
  check(double_precision || dtype == ScalarType::Float, kOp, "float64 is computed in double precision only");
  Tensor left = torch::stable::new_empty(a, {batch, s, rank});
  Tensor values = torch::stable::new_empty(a, {batch, rank});
  Tensor right = torch::stable::new_empty(a, {batch, rank, n});
  Tensor energy = torch::stable::new_empty(a, {batch}, ScalarType::Double);
  if (dtype == ScalarType::Float) {
    decompose_batch<float>(a, double_precision, right_decides, left, values, right, energy);
  } else {
    decompose_batch<double>(a, true, right_decides, left, values, right, energy);
  }
  return {left, values, right, energy};
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CPU, library) {
  library.impl("gram_svd", TORCH_BOX(&eigenprune::gram_svd_cpu));
}
