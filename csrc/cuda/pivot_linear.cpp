// SPDX-License-Identifier: Apache-2.0
// eigenprune::pivot_linear on CUDA: two of torch's own products, then the kernels of pivot_linear.cu.

#include "pivot_linear.h"

#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"
#include "../products.h"

// Exported by torch builds that have CUDA, and by no other. Weak, so that this extension also loads on a CPU-only torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace eigenprune {
namespace {

constexpr const char* kOp = "eigenprune::pivot_linear";

void* current_stream(int32_t device_index) {
  check(aoti_torch_get_current_cuda_stream != nullptr, kOp, "this torch has no CUDA");
  void* stream = nullptr;
  const bool found = aoti_torch_get_current_cuda_stream(device_index, &stream) == 0;
  check(found, kOp, "torch has no current CUDA stream for device ", device_index);
  return stream;
}

int launcher_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kEigenpruneFloat32;
    case ScalarType::Double: return kEigenpruneFloat64;
    case ScalarType::Half: return kEigenpruneFloat16;
    default: return kEigenpruneBFloat16;  // check_factors lets no fifth dtype through
  }
}

void check_launch(int code) {
  if (code != 0) check(false, kOp, "kernel launch failed: ", eigenprune_cuda_error_text(code));
}

Tensor pivot_linear_cuda(
    const Tensor& x, const Tensor& right, const Tensor& left, const Tensor& pivots,
    const std::optional<Tensor>& bias) {
  check_factors(kOp, x, right, left, bias, /*left_holds_all_rows=*/false);
  check_pivot_shape(kOp, right, pivots, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t rank = right.size(0);
  const int64_t out_features = left.size(0) + rank;

  const Tensor z = linear_for_pointer(x, right);
  const Tensor mixed = linear_for_pointer(z, left);
  const Tensor dense_pivots = torch::stable::contiguous(pivots);
  Tensor source = torch::stable::new_empty(x, std::vector<int64_t>{out_features}, ScalarType::Long);
  Tensor y = torch::stable::new_empty(x, output_shape(x, out_features));
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) dense_bias = torch::stable::contiguous(*bias);

  void* stream = current_stream(x.get_device_index());
  check_launch(eigenprune_pivot_sources(
      dense_pivots.const_data_ptr<int32_t>(), rank, out_features, source.mutable_data_ptr<int64_t>(), stream));
  check_launch(eigenprune_pivot_interleave(
      launcher_dtype(x.scalar_type()), z.const_data_ptr(), mixed.const_data_ptr(), source.const_data_ptr<int64_t>(),
      dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), count_rows(x), rank,
      out_features, stream));
  return y;
}

}  // namespace
}  // namespace eigenprune

STABLE_TORCH_LIBRARY_IMPL(eigenprune, CUDA, library) {
  library.impl("pivot_linear", TORCH_BOX(&eigenprune::pivot_linear_cuda));
}
