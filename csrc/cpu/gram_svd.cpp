// SPDX-License-Identifier: Apache-2.0
// eigenprune::gram_svd on CPU: a batch of singular value decompositions through the Gram matrix of the short side, one
// thread per matrix. A threaded LAPACK call per matrix spends a 64 x 64 problem on waiting for its threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
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

// a a^T [s, s], its lower triangle only, which is all that the eigensolver reads: by blocks of rows.
template <typename T>
Tensor lower_gram(const Tensor& a) {
  constexpr int64_t kRows = 256;
  const int64_t s = a.size(0);
  const Tensor columns = torch::stable::transpose(a, 0, 1);
  if (s <= kRows) return torch::stable::matmul(a, columns);
  Tensor gram = torch::stable::new_empty(a, {s, s});
  T* target = gram.mutable_data_ptr<T>();
  for (int64_t top = 0; top < s; top += kRows) {
    const int64_t rows = std::min(kRows, s - top), width = top + rows;
    Tensor from = a, upto = columns;  // narrow takes its argument by reference
    const Tensor block =
        torch::stable::matmul(torch::stable::narrow(from, 0, top, rows), torch::stable::narrow(upto, 1, 0, width));
    const T* source = block.const_data_ptr<T>();
    for (int64_t i = 0; i < rows; ++i) {
      std::copy(source + i * width, source + (i + 1) * width, target + (top + i) * s);
      std::fill(target + (top + i) * s + width, target + (top + i + 1) * s, T{0});
    }
  }
  return gram;
}

template <typename Out, typename T>
void write_result(const Problem<Out>& problem, int exponent, const T* vectors, int64_t vector_stride,
                  const T* rows, int64_t row_stride, int64_t entry_stride, const std::vector<double>& signs,
                  const std::vector<double>& values, const std::vector<double>& norms) {
  std::vector<int64_t> order(static_cast<size_t>(problem.rank));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return values[i] > values[j]; });
  for (int64_t to = 0; to < problem.rank; ++to) {
    const int64_t from = order[to];
    const T* left = vectors + from * vector_stride;
    const T* right = rows + from * row_stride;
    const T* deciding = problem.right_decides ? right : left;
    const int64_t length = problem.right_decides ? problem.long_side : problem.short_side;
    const int64_t step = problem.right_decides ? entry_stride : 1;
    T largest = 0;
    for (int64_t j = 0; j < length; ++j) {
      if (std::fabs(deciding[j * step]) > std::fabs(largest)) largest = deciding[j * step];
    }
    // left * right must stay u_i (u_i^T a) = left * right * signs, whichever of the two decides.
    const double sign = std::copysign(1.0, static_cast<double>(largest));
    const double flip = problem.right_decides ? sign : sign * signs[from];
    const double left_flip = problem.right_decides ? flip * signs[from] : sign;
    for (int64_t j = 0; j < problem.short_side; ++j) {
      problem.left[j * problem.rank + to] = static_cast<Out>(left[j] * left_flip);
    }
    const double factor = flip / (norms[from] > 0 ? norms[from] : 1.0);
    for (int64_t j = 0; j < problem.long_side; ++j) {
      problem.right[to * problem.long_side + j] = static_cast<Out>(right[j * entry_stride] * factor);
    }
    problem.values[to] = static_cast<Out>(std::ldexp(values[from], exponent));
  }
}

template <typename Out, typename T>
void decompose(const Tensor& like, const Problem<Out>& problem) {
  const int64_t s = problem.short_side, n = problem.long_side, rank = problem.rank;
  std::vector<Out> copy;
  const Out* dense = problem.a;
  if (problem.column_stride != 1 || problem.row_stride != n) {
    copy.resize(static_cast<size_t>(s * n));
    copy_dense(problem, copy.data());
    dense = copy.data();
  }
  const int exponent = scale_exponent(dense, s * n);
  Tensor a = torch::stable::new_empty(like, {s, n}, dtype_of<T>());
  copy_scaled(dense, s * n, exponent, a.mutable_data_ptr<T>());
  *problem.energy = std::ldexp(sum_of_squares(a.const_data_ptr<T>(), s * n), 2 * exponent);

  const Tensor all = std::get<1>(call_pair("aten::linalg_eigh", lower_gram<T>(a), "L"));  // [s, s], ascending, one a column
  Tensor vectors = torch::stable::new_empty(like, {rank, s}, dtype_of<T>());
  const T* eigenvectors = all.const_data_ptr<T>();
  T* rows = vectors.mutable_data_ptr<T>();
  for (int64_t i = 0; i < rank; ++i) {
    const T* column = eigenvectors + (s - 1 - i) * all.stride(1);
    for (int64_t j = 0; j < s; ++j) rows[i * s + j] = column[j * all.stride(0)];
  }
  const Tensor product = torch::stable::matmul(vectors, a);  // [rank, n]
  const std::vector<double> norms = row_norms(product.const_data_ptr<T>(), rank, n);
  if (!needs_qr<Out, T>(norms, n)) {
    const std::vector<double> signs(static_cast<size_t>(rank), 1.0);
    write_result(problem, exponent, rows, s, product.const_data_ptr<T>(), n, 1, signs, norms, norms);
    return;
  }
  // a^T U = Q R with R diagonal up to rounding: Q keeps the order and completes the null directions.
  const auto [q, r] = call_pair("aten::linalg_qr", torch::stable::transpose(product, 0, 1), "reduced");
  std::vector<double> values(static_cast<size_t>(rank)), signs(static_cast<size_t>(rank)), ones(rank, 1.0);
  const T* diagonal = r.const_data_ptr<T>();
  for (int64_t i = 0; i < rank; ++i) {
    const double entry = diagonal[i * (r.stride(0) + r.stride(1))];
    values[i] = std::fabs(entry);
    signs[i] = entry < 0 ? -1.0 : 1.0;
  }
  write_result(problem, exponent, rows, s, q.const_data_ptr<T>(), q.stride(1), q.stride(0), signs, values, ones);
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
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Problem<Out> problem{
          a_data + i * a.stride(0), a.stride(1), a.stride(2), s, n, rank, right_decides, left_data + i * s * rank,
          values_data + i * rank, right_data + i * rank * n, energy_data + i};
      try {
        if (double_precision) {
          decompose<Out, double>(a, problem);
        } else {
          decompose<Out, float>(a, problem);
        }
      } catch (const std::exception& error) {  // an exception must not leave a thread of the pool
        failures[i] = std::string("x") + error.what();
      }
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
