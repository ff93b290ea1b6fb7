# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled extension once, and keeps the reason when it cannot.

Nothing here raises at import: without the extension the operators are their pure-torch references.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

NAMESPACE = "eigenprune"
FORCE_FALLBACK_VARIABLE = "EIGENPRUNE_NO_EXTENSION"
CPU_KERNELS_VARIABLE = "EIGENPRUNE_CPU_KERNELS"
CPU_KERNELS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")  # csrc/cpu/level.cpp

# The same signatures as csrc/ops.cpp, for the days without an extension; tests/ops/test_registry.py compares
# them.
SCHEMAS: Mapping[str, str] = MappingProxyType(
    {
        "low_rank_linear": "(Tensor x, Tensor right, Tensor left, Tensor? bias) -> Tensor",
        "pivot_linear": "(Tensor x, Tensor right, Tensor left, Tensor pivots, Tensor? bias) -> Tensor",
        "merge_columns": "(Tensor z, Tensor rest, Tensor pivots) -> Tensor",
        "split_columns": "(Tensor y, Tensor pivots) -> (Tensor, Tensor)",
        "grouped_linear": "(Tensor x, Tensor[] right, Tensor[] left, Tensor?[] pivots, Tensor?[] bias) -> Tensor[]",
        "gram_svd": "(Tensor a, int rank, bool double_precision, bool right_decides)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        "truncated_svd": "(Tensor a, int[]? rank, bool vectors, float tolerance, int seed, str method)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    }
)


@dataclass(frozen=True)
class ExtensionStatus:
    """What became of the compiled extension in this process.

    Attributes:
        loaded: True when the compiled operators are in use on CPU.
        reason: one sentence; when `loaded` is False it says why and what to do.
        path: the file that was loaded, or None.
        build: facts fixed when the extension was compiled (compiler, CUDA architectures, torch target),
            the features of this CPU and the kernels in use; empty when the extension or its fact module is missing.
    """

    loaded: bool
    reason: str
    path: Path | None = None
    build: Mapping[str, Any] = field(default_factory=dict)


def extension_status() -> ExtensionStatus:
    """Return whether the compiled operators are in use, and why not when they are not. Never raises."""
    return _STATUS


def define_operator(name: str, reference: Callable[..., Any]) -> None:
    """Give the operator `eigenprune::name` its signature, if the extension has not, and its pure-torch
    kernel.

    The kernel is registered for every backend at once (CompositeExplicitAutograd); a compiled kernel for a
    backend takes precedence over it, so a CPU-only build still serves CUDA tensors.
    """
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _LIBRARY.define(name + SCHEMAS[name])
    implement(name, reference, "CompositeExplicitAutograd")


def implement(name: str, kernel: Callable[..., Any], dispatch_key: str, *, with_keyset: bool = False) -> None:
    """Register a Python kernel of `eigenprune::name` for one dispatch key, for the life of the process.

    With `with_keyset` the kernel's first argument is the set of dispatch keys, for `operator.redispatch`.
    """
    _LIBRARY.impl(name, kernel, dispatch_key, with_keyset=with_keyset)


def _library_file() -> Path | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        candidate = folder / f"_operators{suffix}"
        if candidate.is_file():
            return candidate
    return None


def _build_facts() -> Mapping[str, Any]:
    try:
        facts = importlib.import_module("eigenprune.ops._build_info")
    except ImportError:  # the operators work without it; only the report is poorer
        return {}
    return MappingProxyType(
        {**facts.build_facts(), "cpu_features": facts.cpu_features(), "cpu_kernels": facts.cpu_kernels()}
    )


def _load() -> ExtensionStatus:
    if os.environ.get(FORCE_FALLBACK_VARIABLE, "") not in ("", "0"):
        return ExtensionStatus(False, f"{FORCE_FALLBACK_VARIABLE} is set: pure-torch references are used.")
    kernels = os.environ.get(CPU_KERNELS_VARIABLE, CPU_KERNELS[0])
    if kernels not in CPU_KERNELS:
        return ExtensionStatus(
            False,
            f"{CPU_KERNELS_VARIABLE}={kernels!r} is unknown (there are: {', '.join(CPU_KERNELS)}): "
            "pure-torch references are used.",
        )
    path = _library_file()
    if path is None:
        return ExtensionStatus(
            False,
            "the compiled extension is not installed (built with EIGENPRUNE_BUILD=none?): "
            "pure-torch references are used. `pip install --no-build-isolation .` builds it.",
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return ExtensionStatus(
            False,
            f"{path.name} could not be loaded ({error}): pure-torch references are used. "
            f"It was probably built for another torch than {torch.__version__}; rebuild it.",
            path,
        )
    return ExtensionStatus(True, "compiled operators are in use.", path, _build_facts())


_STATUS = _load()
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # kept alive: its registrations die with it
