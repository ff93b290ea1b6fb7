# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled extension, and nothing else; everything about the project is in pyproject.toml.

Switches, read from the environment:

    EIGENPRUNE_BUILD=auto   (default) CPU operators; CUDA ones too if torch has CUDA and nvcc is found
    EIGENPRUNE_BUILD=cpu    CPU operators only
    EIGENPRUNE_BUILD=cuda   CPU and CUDA operators, also on a CPU-only torch; fails when nvcc is missing
    EIGENPRUNE_BUILD=none   no extension: the operators are the pure-torch references
    EIGENPRUNE_SANITIZE=address,undefined   any of the two: an instrumented build for tests, slow
    CUDA_HOME=<folder>      toolkit to use when nvcc is not on PATH

Nothing is downloaded, and no GPU is asked for: a build machine needs none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from packaging.version import Version
from setuptools import Extension, setup

BUILD_CHOICES = ("auto", "cpu", "cuda", "none")
SANITIZERS = ("address", "undefined")
OLDEST_TORCH = Version("2.10")
TORCH_TARGET = "0x020a000000000000"  # 2.10, whatever torch it is built with
# architecture -> first toolkit that knows it
CUDA_ARCHITECTURES = {"80": Version("11.0"), "90": Version("11.8"), "100": Version("12.8")}

CPU_SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu/amx_tiles.cpp",
    "csrc/cpu/dot_avx2.cpp",
    "csrc/cpu/dot_avx512.cpp",
    "csrc/cpu/dot_avx512_bf16.cpp",
    "csrc/cpu/dot_products.cpp",
    "csrc/cpu/factored_linear.cpp",
    "csrc/cpu/gram_svd.cpp",
    "csrc/cpu/grouped_linear.cpp",
    "csrc/cpu/level.cpp",
    "csrc/cpu/linear_layers.cpp",
    "csrc/cpu/linear_path.cpp",
    "csrc/cpu/low_rank_linear.cpp",
    "csrc/cpu/merge.cpp",
    "csrc/cpu/merge_columns.cpp",
    "csrc/cpu/pivot_linear.cpp",
    "csrc/cpu/split_columns.cpp",
    "csrc/cpu/tile_linear.cpp",
]
CUDA_HOST_SOURCES = ["csrc/cuda/low_rank_linear.cpp", "csrc/cuda/pivot_linear.cpp"]
CUDA_KERNEL_SOURCES = ["csrc/cuda/decode_linear.cu", "csrc/cuda/pivot_linear.cu"]
HEADERS = ["csrc/checks.h", "csrc/products.h"]
CPU_HEADERS = ("amx_tiles", "dot_products", "dot_tile", "factored_linear", "level", "linear_layers", "linear_path")
CPU_HEADERS += ("merge", "panel_tile", "pivot_columns", "target", "ticket", "tile_linear", "transpose")
HEADERS += [f"csrc/cpu/{name}.h" for name in CPU_HEADERS]
CUDA_HEADERS = [f"csrc/cuda/{name}.h" for name in ("decode_linear", "decode_route", "dtypes", "host", "pivot_linear")]
CUDA_HEADERS += [f"csrc/cuda/{name}.cuh" for name in ("decode_tiles", "elements", "launch", "pivot_rows")]
# -g0 undoes -g in Python's own flags (megabytes); no fast math and no -march: one binary for every machine.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall"]
# Less optimisation, for reports one can read; and checks of addresses by calls. Without the last, a file of kernels
# with 512-bit registers takes more than 20 s of compiling, with it 4 (GCC 12).
SANITIZE_FLAGS = ["-fno-omit-frame-pointer", "-O1", "--param=asan-instrumentation-with-call-threshold=0"]


def read_build_choice() -> str:
    choice = os.environ.get("EIGENPRUNE_BUILD", "auto")
    if choice not in BUILD_CHOICES:
        raise SystemExit(f"EIGENPRUNE_BUILD={choice!r} is unknown; use one of: {', '.join(BUILD_CHOICES)}.")
    return choice


def read_sanitizers() -> list[str]:
    names = [name for name in os.environ.get("EIGENPRUNE_SANITIZE", "").split(",") if name]
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown:
        raise SystemExit(f"EIGENPRUNE_SANITIZE names {unknown}; use any of: {', '.join(SANITIZERS)}.")
    return names


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def toolkit_root(nvcc: str) -> Path:
    """The folder with include/ and lib64/. nvcc may be a wrapper script, so it is asked for it."""
    plan = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr + plan.stdout, re.MULTILINE)
    if top is None:
        raise SystemExit(f"{nvcc} -dryrun names no toolkit folder; set CUDA_HOME.")
    return Path(top.group(1).strip()).resolve()


def cuda_architectures(nvcc: str) -> list[str]:
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", answer)
    if release is None:
        raise SystemExit(f"{nvcc} --version names no release.")
    toolkit = Version(release.group(1))
    return [name for name, first in CUDA_ARCHITECTURES.items() if toolkit >= first]


def nvcc_command(nvcc: str, architectures: list[str], source: str, output: str) -> list[str]:
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    newest = architectures[-1]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # PTX, for GPUs to come
    flags = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [nvcc, *flags, *codes, "-c", source, "-o", output]


def wants_cuda(choice: str, torch_cuda: str | None, nvcc: str | None) -> bool:
    if choice == "cuda" and nvcc is None:
        raise SystemExit("EIGENPRUNE_BUILD=cuda needs nvcc: put it on PATH, or set CUDA_HOME to the toolkit.")
    return choice == "cuda" or (choice == "auto" and torch_cuda is not None and nvcc is not None)


def operators_extension(sanitizers: list[str], use_cuda: bool, nvcc: str | None) -> Extension:
    from torch.utils.cpp_extension import CppExtension

    here = Path(__file__).resolve().parent
    flags = [f"-fsanitize={','.join(sanitizers)}", *SANITIZE_FLAGS] if sanitizers else []
    options: dict[str, Any] = {
        "sources": CPU_SOURCES + (CUDA_HOST_SOURCES if use_cuda else []),
        "depends": HEADERS + (CUDA_KERNEL_SOURCES + CUDA_HEADERS if use_cuda else []),
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_TARGET)],
        # The map keeps the path of the build folder out of the binary.
        "extra_compile_args": {"cxx": [*CXX_FLAGS, f"-ffile-prefix-map={here}=.", *flags]},
        "extra_link_args": flags[:1],
        "py_limited_api": True,  # it holds no Python call at all, so it must not link to torch_python
    }
    if use_cuda and nvcc is not None:
        root = toolkit_root(nvcc)
        folders = [root / "lib64", root / "lib"]
        options["library_dirs"] = [str(folder) for folder in folders if folder.is_dir()]
        # Static: the wheel then depends on no CUDA library, and loads on a machine without one.
        options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
    return CppExtension("eigenprune.ops._operators", **options)


def facts_extension(torch_version: str, sanitizers: list[str], architectures: list[str]) -> Extension:
    import pybind11

    facts = {
        "EIGENPRUNE_TORCH_VERSION": torch_version,
        "EIGENPRUNE_CUDA_ARCHITECTURES": ",".join(architectures),
        "EIGENPRUNE_SANITIZERS": ",".join(sanitizers),
    }
    return Extension(
        "eigenprune.ops._build_info",
        sources=["csrc/module.cpp", "csrc/cpu/level.cpp", "csrc/cpu/linear_path.cpp"],
        depends=["csrc/cpu/level.h", "csrc/cpu/linear_path.h"],
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, f'"{value}"') for name, value in facts.items()],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )


def build_command(use_cuda: bool, nvcc: str | None, architectures: list[str]) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildOperators(BuildExtension):  # type: ignore[misc]
        """Runs nvcc itself: torch's CUDAExtension refuses a CPU-only torch."""

        def build_extensions(self) -> None:
            if use_cuda and nvcc is not None:
                self.link_kernels(nvcc)
            super().build_extensions()

        def link_kernels(self, nvcc: str) -> None:
            folder = Path(self.build_temp).resolve() / "cuda"
            folder.mkdir(parents=True, exist_ok=True)
            operators = next(ext for ext in self.extensions if ext.name.endswith("._operators"))
            for source in CUDA_KERNEL_SOURCES:
                output = str(folder / (Path(source).stem + ".cu.o"))
                self.spawn(nvcc_command(nvcc, architectures, source, output))
                operators.extra_objects.append(output)

    return BuildOperators


def extension_arguments() -> dict[str, Any]:
    choice, sanitizers = read_build_choice(), read_sanitizers()
    if choice == "none":
        return {}
    import torch

    if Version(torch.__version__).release < OLDEST_TORCH.release:
        raise SystemExit(f"the extension needs torch >= {OLDEST_TORCH}, this is {torch.__version__}.")
    nvcc = find_nvcc()
    use_cuda = wants_cuda(choice, torch.version.cuda, nvcc)
    architectures = cuda_architectures(nvcc) if use_cuda and nvcc is not None else []
    return {
        "ext_modules": [
            operators_extension(sanitizers, use_cuda, nvcc),
            facts_extension(torch.__version__, sanitizers, architectures),
        ],
        "cmdclass": {"build_ext": build_command(use_cuda, nvcc, architectures)},
    }


setup(**extension_arguments())
