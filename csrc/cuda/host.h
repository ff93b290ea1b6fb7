// SPDX-License-Identifier: Apache-2.0
// What the torch side of every CUDA operator needs: the current stream, a launcher's dtype, a launcher's error.
#pragma once

#include "dtypes.h"

#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

// Exported by torch builds that have CUDA, and by no other. Weak, so that this also loads on a CPU-only torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace eigenprune {

inline void* current_stream(const char* op, int32_t device_index) {
  check(aoti_torch_get_current_cuda_stream != nullptr, op, "this torch has no CUDA");
  void* stream = nullptr;
  const bool found = aoti_torch_get_current_cuda_stream(device_index, &stream) == 0;
  check(found, op, "torch has no current CUDA stream for device ", device_index);
  return stream;
}

inline int launcher_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kEigenpruneFloat32;
    case ScalarType::Double: return kEigenpruneFloat64;
    case ScalarType::Half: return kEigenpruneFloat16;
    default: return kEigenpruneBFloat16;  // check_factors lets no fifth dtype through
  }
}

inline void check_launch(const char* op, int code) {
  if (code != 0) check(false, op, "kernel launch failed: ", eigenprune_cuda_error_text(code));
}

// The tensor itself when it is contiguous: the call through the dispatcher is spared at every decoded token.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace eigenprune
