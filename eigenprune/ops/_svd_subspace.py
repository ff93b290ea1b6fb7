# SPDX-License-Identifier: Apache-2.0
"""The leading singular components by filtered subspace iteration, and how far they are from the best.

A random block is filtered by Chebyshev polynomials of `A A^T` that are small on the unwanted end of the spectrum (Zhou,
Saad, Tiago and Chelikowsky, J. Comput. Phys. 219, 2006), orthonormalised by Cholesky-QR, and projected once (Halko,
Martinsson and Tropp, SIAM Review 53, 2011). Products of the filter run in bfloat16 where the machine is fast at it: an
error of the subspace enters the result squared. Everything here keeps to [batch, ...] tensors on one device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eigenprune.ops._library import extension_status

# Degree of the filter after one power step, in as few sweeps as `MOST_AMPLIFICATION` allows. Gaussian 1024 x 1024, rank
# n/16, n/8, n/4: degree 3 leaves an excess of 0.32, 0.37, 0.48 %, degree 4 in one sweep 0.19, 0.21, ..., in two 0.11 to
# 0.15 %; singular values i^-1/2, degree 4: 0.04, 0.08, 0.27 %.
LOW_DEGREE, DEGREE = 3, 4
LOW_BELOW = 1 / 12  # share of the components up to which, at a tolerance from 0.4 %, the first is enough
MORE_SWEEPS = 2  # in float32, one at a time, while the estimated excess is above the tolerance
# Largest amplification between two orthonormalisations. float32 and, since rounding is spread over all directions,
# bfloat16 stand it: at 1e4 the excess on i^-1/2 is 4 times as large, at 1e10 the block loses directions.
MOST_AMPLIFICATION = 1e7
SAMPLED_VECTORS = 64
SAFETY = 1.5  # the estimate below is a lower bound by Jensen: 0.5 to 0.9 of the truth
_PROBE_STEPS = 4


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products in it are measured or known to be fast, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    features = extension_status().build.get("cpu_features", {})
    # AVX-512-BF16: 2.1 times the float32 rate at 2048 x 2048 x 160 to 1056. AVX2 alone is slower than float32.
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


class Subspace:
    """A subspace of the columns of a [batch, short, long] float32 that sweeps bring nearer to the leading one.

    The random start is drawn on the device from a generator of its own and is the same for every matrix.
    """

    def __init__(self, a: Tensor, rank: int, tolerance: float, seed: int) -> None:
        short = a.shape[1]
        width = min(short, -(-(rank + 16 + rank // 64) // 16) * 16)  # oversampled; 16 is a tile of bfloat16 kernels
        generator = torch.Generator(device=a.device).manual_seed(seed)
        start = torch.randn(short, width, generator=generator, device=a.device, dtype=torch.float32)
        self._a, self._rank, self._low = a, rank, a.to(fast_dtype(a.device))
        image = _apply_transposed(self._low, start.expand(a.shape[0], -1, -1))
        self._block = _orthonormal(_apply(self._low, image))
        left = LOW_DEGREE if tolerance >= 0.004 and rank <= LOW_BELOW * short else DEGREE
        while left > 0:
            self._block, reached = _filter(self._low, self._block, left)
            left -= reached

    def refine(self) -> None:
        """Filter the block once more, in float32: bfloat16 leaves 1e-3 of the norm where the tail is smaller."""
        self._low = self._a
        self._block = _filter(self._low, self._block, 2)[0]

    def project(self) -> tuple[Tensor, Tensor, Tensor]:
        """left [batch, short, rank], values [batch, rank], right [batch, rank, long]: the best with columns in it."""
        return _project(self._a, self._block, self._rank)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, [batch, ...]. For one matrix as a matrix: a batched product whose first operand is transposed takes CPU
    four times as long (bfloat16, 2048 x 2048 x 160)."""
    return torch.mm(x[0], y[0]).unsqueeze(0) if x.shape[0] == 1 else x @ y


def _apply(low: Tensor, x: Tensor) -> Tensor:
    return product(low, x.to(low.dtype)).float()


def _apply_transposed(low: Tensor, x: Tensor) -> Tensor:
    return product(low.mT, x.to(low.dtype)).float()


def _filter(low: Tensor, block: Tensor, degree: int) -> tuple[Tensor, int]:
    """The Chebyshev polynomial of `degree`, or of as much of it as `MOST_AMPLIFICATION` allows, on [0, b], b the
    smallest Ritz value."""
    image = _apply_transposed(low, block)  # [batch, long, width]
    smallest, largest = _extremes(product(image.mT, image))
    steepness = float((4 * largest / smallest).amax())  # T_d(2 x - 1) is about (4 x)^d / 2
    now = _apply(low, image)
    if not 0.5 * steepness**2 < MOST_AMPLIFICATION:  # so steep that a power step gains as much
        return _orthonormal(now), 1
    bound = smallest.view(-1, 1, 1)
    before, now = block, now.sub_(block * (bound / 2)).mul_(2 / bound)  # T_1(2 G / b - 1) X
    reached = 1
    while reached < degree and 0.5 * steepness ** (reached + 1) < MOST_AMPLIFICATION:
        further = _apply(low, _apply_transposed(low, now))
        before, now = now, further.sub_(now * (bound / 2)).mul_(4 / bound).sub_(before)
        reached += 1
    return _orthonormal(now), reached


def _extremes(gram: Tensor) -> tuple[Tensor, Tensor]:
    """About the smallest and the largest eigenvalue [batch] of gram, by a few steps of inverse and of power iteration.

    0 for the smallest where the Cholesky factorisation says so.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    probe = gram.new_ones(gram.shape[0], gram.shape[1], 4)
    probe[:, ::2, 1] = -1
    probe[:, ::3, 2] = -1
    probe[:, ::5, 3] = -1
    inverse = direct = probe / torch.linalg.vector_norm(probe, dim=1, keepdim=True)
    shrink = grow = inverse
    for _ in range(_PROBE_STEPS):
        inverse = torch.cholesky_solve(inverse, factor)
        shrink = torch.linalg.vector_norm(inverse, dim=1, keepdim=True)
        inverse = inverse / shrink
        direct = gram @ direct
        grow = torch.linalg.vector_norm(direct, dim=1, keepdim=True)
        direct = direct / grow.clamp_min(torch.finfo(gram.dtype).tiny)
    smallest = 1 / shrink.amax(dim=(1, 2))
    usable = (info == 0) & torch.isfinite(smallest)
    return torch.where(usable, smallest, torch.zeros_like(smallest)), grow.amax(dim=(1, 2))


def _orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis of the columns: Cholesky-QR, a second time where the first was ill-conditioned, Householder
    QR where Cholesky fails."""
    for _ in range(2):
        block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(torch.finfo(block.dtype).tiny)
        factor, info = torch.linalg.cholesky_ex(product(block.mT, block))
        weakest = factor.diagonal(dim1=1, dim2=2).amin()
        if bool((info != 0).any()) or not bool(weakest > 1e-3):  # the square of 1e-3 is what float32 still resolves
            basis: Tensor = torch.linalg.qr(block)[0]
            return basis
        block = torch.linalg.solve_triangular(factor.mT, block, upper=True, left=False)
        if bool(weakest.square() * block.shape[1] > 4):  # orthonormal to u / weakest^2; LAPACK's unit is short u
            break
    return block


def _project(a: Tensor, block: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of a [batch, short, long] whose columns lie in the span of the orthonormal block."""
    projected = product(block.mT, a)  # [batch, width, long]
    rotation = torch.linalg.eigh(product(projected, projected.mT))[1][:, :, -rank:].flip(2)
    left = product(block, rotation)
    right = product(rotation.mT, projected)
    values = torch.linalg.vector_norm(right, dim=2)
    # Rows are orthogonal up to u s_1^2 / s_r^2, and LAPACK's unit is long u. Absorbing R of their QR into the values
    # costs u s_1^2 / s_r.
    if bool((values.amax(1).square() >= max(64, a.shape[2]) * values.amin(1).square()).any()):
        q, r = torch.linalg.qr(right.mT)
        diagonal = r.diagonal(dim1=1, dim2=2)
        return left * torch.where(diagonal < 0, -1, 1).unsqueeze(1), diagonal.abs(), q.mT
    return left, values, right / values.unsqueeze(2)


def missed_energy(a: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """An estimate [batch] float64 of `sum of the rank largest sigma^2 - sum values^2`, the energy that a better
    subspace would have captured.

    To first order in the residual r_i = a v_i - s_i u_i, component i gains the mean of s_i^2 |r_i|^2 / (s_i^2 - lambda)
    over the eigenvalues lambda that the residual meets; their mean is measured, and at most `SAMPLED_VECTORS` evenly
    spaced components are looked at.
    """
    rank = values.shape[1]
    stride = -(-rank // SAMPLED_VECTORS)
    chosen = torch.arange(rank - 1, -1, -stride, device=a.device)
    weights = values.index_select(1, chosen).unsqueeze(1)  # [batch, 1, chosen]
    residual = product(a, right.index_select(1, chosen).mT) - left.index_select(2, chosen) * weights
    residual = residual * weights  # of a a^T
    mixing = torch.cos(torch.arange(len(chosen) * 8, device=a.device, dtype=a.dtype).square()).view(-1, 8)  # any signs
    mixed = (residual @ mixing).mT
    size = torch.linalg.vector_norm(mixed, dim=(1, 2)).clamp_min(torch.finfo(a.dtype).tiny)
    met = torch.linalg.vector_norm(product(mixed, a), dim=(1, 2)) / size
    squares = weights.double().square().squeeze(1)
    gap = (squares - met.double().square().unsqueeze(1)).clamp_min(1e-300)
    gap = torch.maximum(gap, 0.02 * squares[:, :1])
    gained = torch.linalg.vector_norm(residual, dim=1).double().square() / gap.clamp_min(1e-300)
    missed: Tensor = SAFETY * (rank / len(chosen)) * gained.sum(1)
    return missed
