# SPDX-License-Identifier: Apache-2.0
"""Matrices with known spectra, and LAPACK's scaled ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops.helpers import normal

SHAPES = ((1, 1), (1, 9), (9, 1), (2, 2), (7, 12), (12, 7), (33, 33), (64, 96), (96, 64), (150, 150), (40, 200))


def spectra(count: int) -> dict[str, Tensor]:
    """Ten kinds of singular values, [count] float64, largest first."""
    index = torch.arange(1, count + 1, dtype=torch.float64)
    half = (count + 1) // 2
    return {
        "equal": torch.ones(count).double(),
        "linear": (count + 1 - index) / count,
        "power 1/2": index**-0.5,
        "power 2": index**-2.0,
        "geometric to 1e-3": 10 ** (-3 * (index - 1) / max(count - 1, 1)),
        "geometric to 1e-12": 10 ** (-12 * (index - 1) / max(count - 1, 1)),
        "one large": torch.cat([torch.ones(1).double(), torch.full((count - 1,), 1e-7).double()]),
        "one small": torch.cat([torch.ones(count - 1).double(), torch.full((1,), 1e-7).double()]),
        "two clusters": torch.where(index <= half, 1.0, 1e-4),
        "half rank": torch.where(index <= half, index**-0.5, 0.0),
    }


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 3) -> Tensor:
    """A random [m, n] float64 with these singular values."""
    count = len(values)
    left, right = torch.linalg.qr(normal(m, count, seed=seed))[0], torch.linalg.qr(normal(n, count, seed=seed + 1))[0]
    return (left * values) @ right.T


def lapack_ratios(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> tuple[float, float, float]:
    """Residual, left and right orthogonality in 1-norms over max(m, n) ulp (LAPACK's tests pass below 35), in float64.

    The residual is of U diag(S) Vh against a for a full SVD; for a truncated one of U^T a Vh^T against diag(S).
    """
    ulp = torch.finfo(s.dtype).eps
    a, u, s, vh = (x.double() for x in (a, u, s, vh))
    size = max(a.shape[-2:])
    full = s.shape[-1] == min(a.shape[-2:])
    rest = a - (u * s) @ vh if full else u.mT @ a @ vh.mT - torch.diag(s)
    norm = float(torch.linalg.matrix_norm(a, 1))
    eye = torch.eye(len(s), dtype=torch.float64)
    residual = float(torch.linalg.matrix_norm(rest, 1)) / (norm * size * ulp) if norm else float(rest.abs().max())
    left = float(torch.linalg.matrix_norm(u.mT @ u - eye, 1)) / (size * ulp)
    right = float(torch.linalg.matrix_norm(vh @ vh.mT - eye, 1)) / (size * ulp)
    return residual, left, right
