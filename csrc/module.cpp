// SPDX-License-Identifier: Apache-2.0
// eigenprune.ops._build_info: facts fixed at build time and the features of this CPU. Nothing about tensors: the
// operators live in another shared library, so that this file alone depends on the version of Python.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/level.h"
#include "cpu/linear_path.h"

namespace py = pybind11;

#ifndef EIGENPRUNE_CUDA_ARCHITECTURES
#define EIGENPRUNE_CUDA_ARCHITECTURES ""
#endif
#ifndef EIGENPRUNE_SANITIZERS
#define EIGENPRUNE_SANITIZERS ""
#endif

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["cxx_standard"] = static_cast<long>(__cplusplus);
  facts["torch_version"] = EIGENPRUNE_TORCH_VERSION;                // the torch whose headers were used
  facts["torch_target"] = "2.10";                                   // the oldest torch this build promises to run on
  facts["cuda_architectures"] = EIGENPRUNE_CUDA_ARCHITECTURES;      // "80,90,100", or "" without CUDA
  facts["sanitizers"] = EIGENPRUNE_SANITIZERS;
  return facts;
}

// True when the processor has it and, for the AVX family, when the operating system saves its registers.
py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx2"] = static_cast<bool>(__builtin_cpu_supports("avx2"));
  features["avx512f"] = static_cast<bool>(__builtin_cpu_supports("avx512f"));
  features["avx512_bf16"] = static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
  features["amd"] = static_cast<bool>(__builtin_cpu_is("amd"));  // whose bfloat16 products are quick without tiles
#endif
  features["amx_bf16"] = eigenprune::has_amx_bf16();
  return features;
}

// The names are torch's, without "torch.".
eigenprune::Element element_of(const std::string& dtype) {
  if (dtype == "float32") return eigenprune::Element::kFloat32;
  if (dtype == "bfloat16") return eigenprune::Element::kBFloat16;
  if (dtype == "float16") return eigenprune::Element::kFloat16;
  if (dtype == "float64") return eigenprune::Element::kOther;
  throw std::invalid_argument("linear_path: dtype must be float32, bfloat16, float16 or float64, not " + dtype);
}

const char* path_of_linear(const std::string& dtype, int64_t rows, int64_t in, int64_t rank) {
  return eigenprune::linear_path_name(eigenprune::linear_path(element_of(dtype), rows, in, rank));
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "How the eigenprune extension was built, and what this CPU can do.";
  module.def("build_facts", &build_facts, "Facts fixed when the extension was compiled.");
  module.def("cpu_kernels", &eigenprune::cpu_level_name, "Instruction set of the CPU kernels in use.");
  module.def("linear_path", &path_of_linear, py::arg("dtype"), py::arg("rows"), py::arg("in_features"), py::arg("rank"),
             "What computes a factored linear on this CPU: 'dots', 'panels', 'tiles' or 'torch'.");
  module.def("cpu_features", &cpu_features, "Instruction sets of this CPU that matter for matrix products.");
}
