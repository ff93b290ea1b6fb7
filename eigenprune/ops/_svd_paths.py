# SPDX-License-Identifier: Apache-2.0
"""Which way a truncated SVD goes, and going there.

Tensors here are [batch, short, long], short <= long, float32 or float64, finite.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.ops._svd_subspace import missed_energy, subspace_svd
from eigenprune.ops.gram_svd import gram_svd


class SvdPath(enum.IntEnum):
    """How a matrix was decomposed."""

    GRAM = 0  # exact: eigenvectors of the float64 Gram of a float32 matrix
    LAPACK = 1  # exact: torch.linalg.svd
    ROUNDED_GRAM = 2  # approximate: the same Gram in float32
    SUBSPACE = 3  # approximate: randomised, filtered subspace iteration
    FALLBACK = 4  # exact, because the approximation missed the tolerance


# The dispatch table. Evidence: benchmarks/results/svd.jsonl, rows "dispatch".
LAPACK_ABOVE = 1024  # short side from which torch.linalg.svd beats the float64 Gram on a matrix near square
LAPACK_ASPECT = 2  # "near square": long < 2 short
SUBSPACE_FROM = 768  # short side; below, eigh of the whole Gram costs less than the iteration
SUBSPACE_SHARE = 0.35  # of the components; above likewise
ROUNDED_FROM = 128  # short side; below, float64 costs no more

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
        if short >= SUBSPACE_FROM and rank <= SUBSPACE_SHARE * short:
            return SvdPath.SUBSPACE
        if short >= ROUNDED_FROM:
            return SvdPath.ROUNDED_GRAM
    return SvdPath.LAPACK if short > LAPACK_ABOVE and long < LAPACK_ASPECT * short else SvdPath.GRAM


def decompose(
    a: Tensor, rank: int, path: SvdPath, right_decides: bool, tolerance: float, seed: int
) -> Decomposition:
    """Decompose every matrix of the batch; an approximation that misses the tolerance is replaced, and `path` says so."""
    if path in (SvdPath.ROUNDED_GRAM, SvdPath.SUBSPACE):
        parts = [
            _approximate(chunk, rank, path, right_decides, tolerance, seed) for chunk in _chunks(a, path, rank)
        ]
    else:
        parts = [_exact(chunk, rank, path, right_decides) for chunk in _chunks(a, path, rank)]
    if len(parts) == 1:
        return parts[0]
    fields = ("left", "values", "right", "energy", "excess", "path")
    return Decomposition(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def _chunks(a: Tensor, path: SvdPath, rank: int) -> tuple[Tensor, ...]:
    """Parts of the batch between which an interrupt is noticed. On CPU subspace iteration threads inside a matrix."""
    if path in (SvdPath.SUBSPACE, SvdPath.LAPACK) and a.device.type == "cpu":
        return a.split(1)
    _, short, long = a.shape
    flops = 2.0 * short * short * long + 10.0 * short**3
    return a.split(max(torch.get_num_threads(), int(CHUNK_FLOPS / flops)))


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
    largest = a.abs().amax(dim=(1, 2), keepdim=True)
    exponent = torch.frexp(largest).exponent.float()
    half = torch.floor(exponent / 2)
    # Exact: powers of two, in two steps since 2^149, which a denormal needs, is no float32.
    scaled = a if bool((exponent.abs() < 16).all()) else a * torch.exp2(-half) * torch.exp2(half - exponent)
    if scaled is a:
        half, exponent = torch.zeros_like(half), torch.zeros_like(exponent)
    if path == SvdPath.SUBSPACE:
        left, values, right = subspace_svd(scaled, rank, seed)
        values, order = values.sort(dim=1, descending=True, stable=True)
        left = left.gather(2, order.unsqueeze(1).expand_as(left))
        right = right.gather(1, order.unsqueeze(2).expand_as(right))
        left, right = _signed(left, right, right_decides)
        energy = torch.linalg.vector_norm(scaled, dim=(1, 2), dtype=torch.float64).square()
    else:
        left, values, right, energy = gram_svd(scaled, rank, False, right_decides)
    error = squared_error(scaled, left, values, right, energy)
    excess, missed = _excess(scaled, left, values, right, energy, error, tolerance)
    back = torch.exp2(half.double()) * torch.exp2((exponent - half).double())  # [batch, 1, 1]
    values = (values * back.squeeze(2)).to(values.dtype)
    energy = energy * back.flatten().square()
    result = Decomposition(left, values, right, energy, excess, _filled(energy, path))
    return _replace(a, result, missed, rank, right_decides) if bool(missed.any()) else result


def _excess(
    a: Tensor, left: Tensor, values: Tensor, right: Tensor, energy: Tensor, error: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The estimated relative excess of the Frobenius error over the optimum, and where it misses the tolerance.

    A difference that float32 rounding of the result would hide, 8 u of the norm of the matrix, counts as none.
    """
    best = (error - missed_energy(a, left, values, right)).clamp_min(0).sqrt()
    above = error.sqrt() - best
    hidden = above <= 4 * torch.finfo(a.dtype).eps * energy.sqrt()
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
