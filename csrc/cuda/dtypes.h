// SPDX-License-Identifier: Apache-2.0
// What every launcher shares: plain C, raw device pointers, no torch. All return a cudaError_t as int, 0 = fine.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

enum EigenpruneDtype {
  kEigenpruneFloat32 = 0,
  kEigenpruneFloat64 = 1,
  kEigenpruneFloat16 = 2,
  kEigenpruneBFloat16 = 3,
};

const char* eigenprune_cuda_error_text(int code);

#ifdef __cplusplus
}
#endif
