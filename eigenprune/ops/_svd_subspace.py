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

# Sweeps of degree two after one power step. Excess on Gaussian 1024 x 1024 at rank n/16 .. n/2: one 0.6 to 1.0 %, two
# 0.11 to 0.15 %, three 0.02 to 0.03 %; on singular values i^-1/2 two leave 0.04 to 0.27 %.
SWEEPS = 2
# Largest amplification between two orthonormalisations. float32 and, since rounding is spread over all directions,
# bfloat16 stand it: at 1e4 the excess on i^-1/2 is 4 times as large, at 1e10 the block loses directions.
MOST_AMPLIFICATION = 1e7
SAMPLED_VECTORS = 128
SAFETY = 1.5  # the estimate below is a lower bound by Jensen: 0.5 to 0.9 of the truth
_PROBE_STEPS = 4


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products in it are measured or known to be fast, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    features = extension_status().build.get("cpu_features", {})
    # AVX-512-BF16: 2.1 times the float32 rate at 2048 x 2048 x 160 to 1056. AVX2 alone is slower than float32.
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def subspace_svd(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """left [batch, short, rank], values [batch, rank], right [batch, rank, long] of a [batch, short, long] float32.

    The random block is drawn on the device from a generator of its own and is the same for every matrix.
    """
    short = a.shape[1]
    width = min(short, -(-(rank + 16 + rank // 64) // 16) * 16)  # oversampled; 16 is a tile of the bfloat16 kernels
    generator = torch.Generator(device=a.device).manual_seed(seed)
    start = torch.randn(short, width, generator=generator, device=a.device, dtype=torch.float32)
    low = a.to(fast_dtype(a.device))
    block = _orthonormal(_apply(low, _apply_transposed(low, start.expand(a.shape[0], -1, -1))))
    for _ in range(SWEEPS):
        block = _filter(low, block)
    return _project(a, block, rank)


def _apply(low: Tensor, x: Tensor) -> Tensor:
    return (low @ x.to(low.dtype)).float()


def _apply_transposed(low: Tensor, x: Tensor) -> Tensor:
    return (low.mT @ x.to(low.dtype)).float()


def _filter(low: Tensor, block: Tensor) -> Tensor:
    """Two steps of the Chebyshev recurrence on [0, b], b the smallest Ritz value; or two power steps where T_2 would
    amplify too much."""
    image = _apply_transposed(low, block)  # [batch, long, width]
    smallest, largest = _extremes(image.mT @ image)
    bound = smallest.view(-1, 1, 1)
    first = _apply(low, image)
    if bool((8 * largest.square() > MOST_AMPLIFICATION * smallest.square()).any()):
        block = _orthonormal(first)
        return _orthonormal(_apply(low, _apply_transposed(low, block)))
    first = first.sub_(block * (bound / 2)).mul_(2 / bound)  # T_1(2 G / b - 1) X
    second = _apply(low, _apply_transposed(low, first))
    return _orthonormal(second.sub_(first * (bound / 2)).mul_(4 / bound).sub_(block))


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
        factor, info = torch.linalg.cholesky_ex(block.mT @ block)
        weakest = factor.diagonal(dim1=1, dim2=2).amin()
        if bool((info != 0).any()) or not bool(weakest > 1e-3):  # the square of 1e-3 is what float32 still resolves
            return torch.linalg.qr(block)[0]
        block = torch.linalg.solve_triangular(factor, block.mT, upper=False).mT
        if bool(weakest > 0.05):  # orthonormal to 400 u
            break
    return block


def _project(a: Tensor, block: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of a [batch, short, long] whose columns lie in the span of the orthonormal block."""
    projected = block.mT @ a  # [batch, width, long]
    rotation = torch.linalg.eigh(projected @ projected.mT)[1][:, :, -rank:].flip(2)
    left = block @ rotation
    right = rotation.mT @ projected
    values = torch.linalg.vector_norm(right, dim=2)
    # Rows are orthogonal up to u s_1^2 / s_r^2. Absorbing R of their QR into the values costs u s_1^2 / s_r.
    if bool((values.amax(1).square() > 64 * values.amin(1).square()).any()):
        q, r = torch.linalg.qr(right.mT)
        diagonal = r.diagonal(dim1=1, dim2=2)
        return left * torch.where(diagonal < 0, -1, 1).unsqueeze(1), diagonal.abs(), q.mT
    return left, values, right / values.unsqueeze(2)


def missed_energy(a: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """An estimate [batch] float64 of `sum of the rank largest sigma^2 - sum values^2`, the energy that a better subspace
    would have captured.

    To first order in the residual r_i = a v_i - s_i u_i, component i gains the mean of s_i^2 |r_i|^2 / (s_i^2 - lambda)
    over the eigenvalues lambda that the residual meets; their mean is measured, and at most `SAMPLED_VECTORS` evenly
    spaced components are looked at.
    """
    rank = values.shape[1]
    stride = -(-rank // SAMPLED_VECTORS)
    chosen = torch.arange(rank - 1, -1, -stride, device=a.device)
    weights = values.index_select(1, chosen).unsqueeze(1)  # [batch, 1, chosen]
    residual = a @ right.index_select(1, chosen).mT - left.index_select(2, chosen) * weights
    residual = residual * weights  # of a a^T
    mixing = torch.cos(torch.arange(len(chosen) * 8, device=a.device, dtype=a.dtype).square()).view(-1, 8)  # any signs
    mixed = residual @ mixing
    floor = torch.finfo(a.dtype).tiny
    met = torch.linalg.vector_norm(a.mT @ mixed, dim=(1, 2)) / torch.linalg.vector_norm(mixed, dim=(1, 2)).clamp_min(floor)
    squares = weights.double().square().squeeze(1)
    gap = (squares - met.double().square().unsqueeze(1)).clamp_min(1e-300)
    gap = torch.maximum(gap, 0.02 * squares[:, :1])
    gained = torch.linalg.vector_norm(residual, dim=1).double().square() / gap.clamp_min(1e-300)
    return SAFETY * (rank / len(chosen)) * gained.sum(1)
