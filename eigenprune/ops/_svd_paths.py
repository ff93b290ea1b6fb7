# SPDX-License-Identifier: Apache-2.0
"""Which way a truncated SVD goes, and going there.

Tensors here are [batch, short, long], short <= long, float32 or float64, finite.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.ops._svd_subspace import MORE_BLOCKS, Subspace, missed_energy
from eigenprune.ops.gram_svd import gram_svd


class SvdPath(enum.IntEnum):
    """How a matrix was decomposed."""

    GRAM = 0  # exact: eigenvectors of the float64 Gram of a float32 matrix
    LAPACK = 1  # exact: torch.linalg.svd
    ROUNDED_GRAM = 2  # approximate: the same Gram in float32
    SUBSPACE = 3  # approximate: randomised, filtered subspace iteration
    FALLBACK = 4  # exact, because the approximation missed the tolerance


# The dispatch table. Evidence: benchmarks/results/svd.jsonl, rows "dispatch"; seconds below are of one thread.
LAPACK_ABOVE = 1024  # short side from which LAPACK beats the float64 Gram: 1024 0.373 to 0.365, 1536 0.99 to 1.27
LAPACK_ASPECT = 2  # but only where long < 2 short: 1024 x 4096 2.27 to 0.62
# (short side from, share of the components up to) where subspace iteration beats eigh of the whole float32 Gram:
# 768 at 1/8 0.023 to 0.072, 576 x 1536 at 1/9 0.045 to 0.072, at 0.44 0.140 to 0.084, 128 x 512 at 1/4 0.029 to 0.013
SUBSPACE_WINS = ((768, 0.35), (512, 0.125))
ROUNDED_FROM = 128  # short side; below, float64 costs no more: 64 x 576 0.0050 to 0.0049

CHUNK_FLOPS = 2e11  # one uninterruptible call: a few seconds
METHODS = ("auto", "exact", "gram", "lapack", "rounded", "subspace")


@dataclass(frozen=True)
class Decomposition:
    """left [batch, short, rank], values [batch, rank], right [batch, rank, long]; energy, excess [batch] float64."""

    left: Tensor
    values: Tensor
    right: Tensor
    energy: Tensor
    excess: Tensor
    path: Tensor


def largest_entry(a: Tensor) -> Tensor:
    """The largest magnitude in every matrix [batch], NaN where there is one. (20 times quicker than a maximum norm.)"""
    flat = a.flatten(1)
    return torch.maximum(flat.amax(1), -flat.amin(1))


def choose_path(short: int, long: int, rank: int, dtype: torch.dtype, tolerance: float, method: str) -> SvdPath:
    """The path for matrices of one shape; float64 knows LAPACK only, whose accuracy the squares of a Gram lose."""
    if dtype == torch.float64:
        return SvdPath.LAPACK
    forced = {
        "gram": SvdPath.GRAM,
        "lapack": SvdPath.LAPACK,
        "rounded": SvdPath.ROUNDED_GRAM,
        "subspace": SvdPath.SUBSPACE,
    }
    if method in forced:
        return forced[method]
    if method == "auto" and rank < short and tolerance > 0:
        if any(short >= least and rank <= share * short for least, share in SUBSPACE_WINS):
            return SvdPath.SUBSPACE
        if short >= ROUNDED_FROM:
            return SvdPath.ROUNDED_GRAM
    return SvdPath.LAPACK if short > LAPACK_ABOVE and long < LAPACK_ASPECT * short else SvdPath.GRAM


def decompose(a: Tensor, rank: int, path: SvdPath, right_decides: bool, tolerance: float, seed: int) -> Decomposition:
    """Decompose every matrix; an approximation that misses the tolerance is replaced, and `path` says so."""
    if path in (SvdPath.ROUNDED_GRAM, SvdPath.SUBSPACE):
        parts = [_approximate(chunk, rank, path, right_decides, tolerance, seed) for chunk in _chunks(a, path, rank)]
    else:
        parts = [_exact(chunk, rank, path, right_decides) for chunk in _chunks(a, path, rank)]
    if len(parts) == 1:
        return parts[0]
    return Decomposition(
        left=torch.cat([part.left for part in parts]),
        values=torch.cat([part.values for part in parts]),
        right=torch.cat([part.right for part in parts]),
        energy=torch.cat([part.energy for part in parts]),
        excess=torch.cat([part.excess for part in parts]),
        path=torch.cat([part.path for part in parts]),
    )


def _chunks(a: Tensor, path: SvdPath, rank: int) -> tuple[Tensor, ...]:
    """Parts of the batch between which an interrupt is noticed. On CPU subspace iteration threads inside a matrix."""
    if path in (SvdPath.SUBSPACE, SvdPath.LAPACK) and a.device.type == "cpu":
        return tuple(a.split(1))
    _, short, long = a.shape
    flops = 2.0 * short * short * long + 10.0 * short**3
    return tuple(a.split(max(torch.get_num_threads(), int(CHUNK_FLOPS / flops))))


def _exact(a: Tensor, rank: int, path: SvdPath, right_decides: bool) -> Decomposition:
    if path == SvdPath.GRAM:
        left, values, right, energy = gram_svd(a, rank, True, right_decides)
    else:
        left, values, right = torch.linalg.svd(a, full_matrices=False)
        left, values, right = left[:, :, :rank], values[:, :rank], right[:, :rank]
        left, right = _signed(left, right, right_decides)
        energy = torch.linalg.vector_norm(a, dim=(1, 2), dtype=torch.float64).square()
    return Decomposition(left, values, right, energy, torch.zeros_like(energy), _filled(energy, path))


def _approximate(
    a: Tensor, rank: int, path: SvdPath, right_decides: bool, tolerance: float, seed: int
) -> Decomposition:
    scaled, back = _scaled(a)
    if path == SvdPath.ROUNDED_GRAM:
        left, values, right, energy = gram_svd(scaled, rank, False, right_decides)
        excess, missed = _excess(scaled, left, values, right, energy, tolerance)
    else:
        # Rows in float32, their sum in float64: 40 times quicker than all in float64, and right to some u.
        energy = torch.linalg.vector_norm(scaled, dim=2).double().square().sum(1)
        subspace = Subspace(scaled, rank, seed)
        left, values, right = subspace.project()
        excess, missed = _excess(scaled, left, values, right, energy, tolerance)
        for _ in range(MORE_BLOCKS):
            if not bool(missed.any()) or not subspace.refine():
                break
            left, values, right = subspace.project()
            excess, missed = _excess(scaled, left, values, right, energy, tolerance)
        left, values, right = _ordered(left, values, right)
        left, right = _signed(left, right, right_decides)
    values = (values * back.unsqueeze(1)).to(values.dtype)
    result = Decomposition(left, values, right, energy * back.square(), excess, _filled(energy, path))
    return _replace(a, result, missed, rank, right_decides) if bool(missed.any()) else result


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """a times a power of two for every matrix, such that squares stay in range, and what undoes it [batch] float64."""
    # A norm is read faster than a maximum, and says that entries are harmless where they are.
    norm = torch.linalg.vector_norm(a.flatten(1), dim=1)
    if bool(((norm < 2.0**15) & (norm > 2.0**-15 * a[0].numel() ** 0.5)).all()):
        return a, torch.ones_like(norm, dtype=torch.float64)
    exponent = torch.frexp(largest_entry(a)).exponent
    back = torch.exp2(exponent.double())
    if bool((exponent.abs() < 16).all()):
        return a, torch.ones_like(back)
    half = torch.floor(exponent.float() / 2)  # twice: 2^149, which a denormal needs, is no float32
    factors = torch.exp2(torch.stack([-half, half - exponent])).view(2, -1, 1, 1)
    return a * factors[0] * factors[1], back


def _ordered(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, order = values.sort(dim=1, descending=True, stable=True)
    left = left.gather(2, order.unsqueeze(1).expand_as(left))
    return left, values, right.gather(1, order.unsqueeze(2).expand_as(right))


def _excess(
    a: Tensor, left: Tensor, values: Tensor, right: Tensor, energy: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The estimated relative excess of the Frobenius error over the optimum, and where it misses the tolerance.

    A difference that float32 rounding of the result would hide, 32 u of the norm of the matrix, counts as none.
    """
    error = squared_error(a, left, values, right, energy)
    best = (error - missed_energy(a, left, values, right)).clamp_min(0).sqrt()
    above = error.sqrt() - best
    hidden = above <= 16 * torch.finfo(a.dtype).eps * energy.sqrt()
    excess = torch.where(hidden, torch.zeros_like(above), above / best)
    return excess, ~(excess <= tolerance)  # also when it is not a number


def _replace(a: Tensor, result: Decomposition, missed: Tensor, rank: int, right_decides: bool) -> Decomposition:
    index = missed.nonzero().flatten()
    exact_path = choose_path(a.shape[1], a.shape[2], rank, a.dtype, 0.0, "exact")
    exact = decompose(a.index_select(0, index), rank, exact_path, right_decides, 0.0, 0)
    return Decomposition(
        result.left.index_copy(0, index, exact.left),
        result.values.index_copy(0, index, exact.values),
        result.right.index_copy(0, index, exact.right),
        result.energy.index_copy(0, index, exact.energy),
        result.excess.index_copy(0, index, exact.excess),
        result.path.index_fill(0, index, int(SvdPath.FALLBACK)),
    )


def squared_error(a: Tensor, left: Tensor, values: Tensor, right: Tensor, energy: Tensor) -> Tensor:
    """||a - left diag(values) right||_F^2 [batch] in float64: by Pythagoras, formed where that would cancel."""
    error = energy - values.double().square().sum(1)
    # Values are rounded to u each: below 1e4 u of the energy the difference says nothing.
    for i in (error < 1e4 * torch.finfo(a.dtype).eps * energy).nonzero().flatten().tolist():
        rest = torch.addmm(a[i], left[i] * values[i], right[i], alpha=-1)
        error[i] = torch.linalg.vector_norm(rest, dtype=torch.float64).square()
    return error.clamp_min(0)


def _signed(left: Tensor, right: Tensor, right_decides: bool) -> tuple[Tensor, Tensor]:
    """The entry of largest magnitude of every deciding vector made positive."""
    if right_decides:
        entry = right.gather(2, right.abs().argmax(2, keepdim=True))  # [batch, rank, 1]
    else:
        entry = left.gather(1, left.abs().argmax(1, keepdim=True)).mT
    sign = torch.where(entry < 0, -1, 1).to(left.dtype)
    return left * sign.mT, right * sign


def _filled(like: Tensor, path: SvdPath) -> Tensor:
    return torch.full_like(like, int(path), dtype=torch.int64)
