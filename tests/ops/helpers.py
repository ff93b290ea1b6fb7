# SPDX-License-Identifier: Apache-2.0
"""Inputs and error measures that the operator tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def factors(
    out: int,
    rank: int,
    features: int,
    dtype: torch.dtype = torch.float64,
    *,
    pivot: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """right [rank, features] and left [out or out - rank, rank], scaled so that every product is of order
    1."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(rank, features, generator=generator, dtype=torch.float64) / max(features, 1) ** 0.5
    left = torch.randn(out - rank if pivot else out, rank, generator=generator, dtype=torch.float64)
    return right.to(dtype), (left / max(rank, 1) ** 0.5).to(dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pivots_of(out: int, rank: int, *, ascending: bool, seed: int = 2) -> Tensor:
    chosen = torch.randperm(out, generator=torch.Generator().manual_seed(seed))[:rank]
    return (chosen.sort().values if ascending else chosen).to(torch.int32)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact||_F / ||exact||_F, formed in float64."""
    return float((value.double() - exact).norm() / exact.norm())


def error_bound(dtype: torch.dtype) -> float:
    """Relative Frobenius error that one factored layer may have against float64 on the same stored inputs.

    float32, float64: 16 u. Each of the two products adds about sqrt(k) u / sqrt(vector width) (blocked sums);
    16 leaves room for k up to a few thousand and is far below any wrong result.
    bfloat16, float16: 1 u. Sums are kept in float32, so only the roundings of z, the product and the result
    count; each is uniform within u and so about u / sqrt(3) in relative root mean square at worst, less on
    average.
    """
    factor = 16.0 if dtype in (torch.float32, torch.float64) else 1.0
    return factor * unit_roundoff(dtype)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees this checkout."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
