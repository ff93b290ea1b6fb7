# SPDX-License-Identifier: Apache-2.0
"""The leading singular components from a filtered block Krylov space, and how far they are from the best.

A random block is filtered by Chebyshev polynomials of `A A^T` that are small on the unwanted end of the spectrum (Zhou,
Saad, Tiago and Chelikowsky, J. Comput. Phys. 219, 2006) and orthonormalised by Cholesky-QR. It is the first of a few
blocks, each `A A^T` times the one before less what lies in all before, and the matrix is projected on them all (Musco
and Musco, NeurIPS 2015). A block is narrower than the rank: of as many products a Krylov space makes far more than one
block of the whole width does. Products of the filter and of the first blocks run in bfloat16 where the machine is fast
at it: an error of the subspace enters the result squared. Everything here keeps to [batch, ...] tensors on one device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eigenprune.ops._library import extension_status

# More columns in all, and a filter of higher degree, leave less excess and take longer; with these a Gaussian, whose
# spectrum falls slowly, stays below the default tolerance (`bench_svd.py` reports by how much).
BLOCK, ALL_BLOCKS = 3 / 8, 15 / 8  # share of the rank
FEW = 0.2  # share of the components up to which one block more saves a projection that would be made in vain
COLUMNS = 48  # a tile of AVX-512 products: a few columns above a multiple of it cost MKL much of a whole one
DEGREE, LOW_DEGREE = 3, 4
LOW_BELOW = 0.1  # share of the components up to which the second is needed
MORE_BLOCKS = 3  # in float32, one at a time, while the estimated excess is above the tolerance
# Largest amplification between two orthonormalisations. float32 and, since rounding is spread over all directions,
# bfloat16 stand it: much less leaves a larger excess on a spectrum like i^-1/2, much more loses directions.
MOST_AMPLIFICATION = 1e7
SAMPLED_VECTORS = 32
SAFETY = 1.4  # over the estimate below, so that it errs upwards: too small an estimate would pass for a met tolerance
_PROBE_STEPS = 4
_PASSES = 5  # of orthogonalisation against all blocks before: one or two, more only where a block breaks down
_UNITS = 2  # of LAPACK's tests of orthogonality, u times the length of a vector; they ask for 35


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products in it are measured or known to be fast, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    features = extension_status().build.get("cpu_features", {})
    # AVX-512-BF16 is quicker than float32 on AMD and slower on Intel, where tiles (AMX) are the quick way; with AVX2
    # alone it is slower too.
    quick = features.get("avx512_bf16") and features.get("amd")
    return torch.bfloat16 if quick or features.get("amx_bf16") else torch.float32


class Subspace:
    """A subspace of the columns of a [batch, short, long] float32, and more of it on demand.

    The random start is drawn on the device from a generator of its own and is the same for every matrix.
    """

    def __init__(self, a: Tensor, rank: int, seed: int) -> None:
        _, short, long = a.shape
        self._width = min(short, COLUMNS * max(1, round(rank * BLOCK / COLUMNS)))
        blocks = max(2, math.ceil(rank * ALL_BLOCKS / self._width))
        generator = torch.Generator(device=a.device).manual_seed(seed)
        start = torch.randn(long, self._width, generator=generator, device=a.device, dtype=torch.float32)
        self._a, self._rank = a, rank
        self._transposed = _transposed(a)
        self._low = a.to(fast_dtype(a.device))
        low_transposed = self._transposed.to(self._low.dtype)
        block = _orthonormal(_apply(self._low, start.expand(a.shape[0], -1, -1)))
        left, steps = LOW_DEGREE if rank < LOW_BELOW * short else DEGREE, 0
        while left > 0:
            block, reached = _filter(self._low, low_transposed, block, left)
            left, steps = left - reached, steps + 1
        blocks += steps > 1 or rank < FEW * short  # or a steep spectrum, on which the filter has done less
        # What is in use of the memory for all blocks grows; `refine` takes new memory.
        self._done, most = 0, min(short, blocks * self._width)
        self._basis = a.new_empty(a.shape[0], short, most)
        self._image = a.new_empty(a.shape[0], long, most)  # a^T basis, in float32: the result is made of it
        self._append(block)
        for _ in range(blocks - 1):
            self._extend()

    def refine(self) -> bool:
        """One more block, by products in float32: bfloat16 leaves 1e-3 of the norm where the tail is smaller. False
        when the subspace is the whole space."""
        self._low = self._a
        more = min(self._width, self._basis.shape[1] - self._done)
        self._basis = torch.cat([self._basis, torch.empty_like(self._basis[:, :, :more])], 2)
        self._image = torch.cat([self._image, torch.empty_like(self._image[:, :, :more])], 2)
        return self._extend()

    def project(self) -> tuple[Tensor, Tensor, Tensor]:
        """left [batch, short, rank], values [batch, rank], right [batch, rank, long]: the best with columns in it."""
        return _project(self._basis, self._image, self._rank)

    def _extend(self) -> bool:
        width = min(self._width, self._basis.shape[1] - self._done)
        if width > 0:
            block = _apply(self._low, self._image[:, :, self._done - width : self._done])
            self._append(_orthogonal_to(self._basis[:, :, : self._done], block))
        return width > 0

    def _append(self, block: Tensor) -> None:
        here = slice(self._done, self._done + block.shape[2])
        self._basis[:, :, here] = block
        self._image[:, :, here] = product(self._transposed, block)
        self._done = here.stop


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, [batch, ...]. For one matrix as a matrix: a batched product whose first operand is transposed takes CPU
    much longer."""
    return torch.mm(x[0], y[0]).unsqueeze(0) if x.shape[0] == 1 else x @ y


def _apply(low: Tensor, x: Tensor) -> Tensor:
    return product(low, x.to(low.dtype)).float()


def _transposed(a: Tensor) -> Tensor:
    """a^T; on CPU a copy, since a narrow product whose first operand is transposed takes MKL much longer, and there are
    many of them. One matrix is copied as a matrix, which is quicker."""
    if a.device.type != "cpu":
        return a.mT
    return a[0].T.contiguous().unsqueeze(0) if a.shape[0] == 1 else a.mT.contiguous()


def _filter(low: Tensor, transposed: Tensor, block: Tensor, degree: int) -> tuple[Tensor, int]:
    """The Chebyshev polynomial of `degree`, or of as much of it as `MOST_AMPLIFICATION` allows, on [0, b], b the
    smallest Ritz value; transposed is low^T."""
    image = _apply(transposed, block)  # [batch, long, width]
    smallest, largest = _extremes(product(image.mT, image))
    steepness = float((4 * largest / smallest).amax())  # T_d(2 x - 1) is about (4 x)^d / 2
    now = _apply(low, image)
    if not 0.5 * steepness**2 < MOST_AMPLIFICATION:  # so steep that a power step gains as much
        return _orthonormal(now), 1
    bound = smallest.view(-1, 1, 1)
    before, now = block, now.sub_(block * (bound / 2)).mul_(2 / bound)  # T_1(2 G / b - 1) X
    reached = 1
    while reached < degree and 0.5 * steepness ** (reached + 1) < MOST_AMPLIFICATION:
        further = _apply(low, _apply(transposed, now))
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
    """An orthonormal basis of the columns: Cholesky-QR, a second time where that was not enough."""
    return _orthogonal_to(block[:, :, :0], block)


def _orthonormal_once(block: Tensor) -> Tensor:
    """Cholesky-QR; Householder QR where a column of length 1 has too little that is not in those before."""
    block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(torch.finfo(block.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(product(block.mT, block))
    weakest = float(factor.diagonal(dim1=1, dim2=2).amin())
    if bool((info != 0).any()) or not weakest > 1e-3:  # the square of 1e-3 is what float32 still resolves
        householder: Tensor = torch.linalg.qr(block)[0]
        return householder
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, block, upper=True, left=False)
    return solved


def _departure(basis: Tensor, block: Tensor) -> float:
    """About the 1-norm of E = [basis, block]^T block - [0, I]^T in units of u, the largest of the batch.

    A column of E whose entries have no order has a 1-norm of up to its length^1/2 2-norms; the 2-norms are those of the
    rows of E^T times a few random vectors. No diagonal of a triangular factor tells them: of columns that fill most of
    the dimensions that are left, the smallest singular value is far below the smallest diagonal entry.
    """
    done = basis.shape[2]
    mixing = _mixing(done + block.shape[2], block)
    mixed = product(block, mixing[done:].expand(block.shape[0], -1, -1))
    if done > 0:
        mixed = mixed + product(basis, mixing[:done].expand(block.shape[0], -1, -1))
    rest = torch.linalg.vector_norm(product(block.mT, mixed) - mixing[done:], dim=2).amax()
    return float(rest) * math.sqrt(len(mixing) / mixing.shape[1]) / torch.finfo(block.dtype).eps


def _mixing(count: int, like: Tensor) -> Tensor:
    """[count, 8] without order, of mean square 1: the same on every call."""
    return torch.cos(torch.arange(count * 8, device=like.device, dtype=like.dtype).square()).view(-1, 8) * 2**0.5


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of what the columns of block, as many as fit, add to the orthonormal basis.

    Of a block of which little is new, or whose columns nearly depend on each other, what is new is orthogonal to the
    basis, and to itself, to u over its share only: it is made orthogonal again until the departure that is measured is
    one that LAPACK's tests would call small. Where nothing but rounding is new, Householder QR completes the basis.
    """
    for _ in range(_PASSES):
        if basis.shape[2] > 0:
            block = block - product(basis, product(basis.mT, block))
        block = _orthonormal_once(block)
        if _departure(basis, block) <= _UNITS * block.shape[1]:
            return block
    completed: Tensor = torch.linalg.qr(torch.cat([basis, block], 2))[0]
    return completed[:, :, basis.shape[2] :]


def _project(basis: Tensor, image: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of a [batch, short, long] whose columns lie in the span of the orthonormal basis; image is
    a^T basis."""
    rotation = torch.linalg.eigh(product(image.mT, image))[1][:, :, -rank:].flip(2)
    left = product(basis, rotation)
    right = product(rotation.mT, image.mT)
    values = torch.linalg.vector_norm(right, dim=2)
    # Rows i and j are orthogonal up to u s_1^2 / (s_i s_j), by the error of eigenvectors. What that adds up to depends
    # on the whole spectrum, not on s_1 / s_r alone: it is measured. 0 / 0 is no number, and asks for QR. Absorbing R
    # into the values costs u s_1^2 / s_r.
    unit = right / values.unsqueeze(2)
    if not _departure(unit.mT[:, :, :0], unit.mT) <= _UNITS * image.shape[1]:
        q, r = torch.linalg.qr(right.mT)
        diagonal = r.diagonal(dim1=1, dim2=2)
        return left * torch.where(diagonal < 0, -1, 1).unsqueeze(1), diagonal.abs(), q.mT
    return left, values, unit


def missed_energy(a: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """An estimate [batch] float64 of `sum of the rank largest sigma^2 - sum values^2`, the energy that a better
    subspace would have captured.

    To first order in the residual r_i = a v_i - s_i u_i, component i gains the mean of s_i^2 |r_i|^2 / (s_i^2 - lambda)
    over the eigenvalues lambda that the residual meets. Two steps of Lanczos on a mixture of the residuals give a Gauss
    quadrature for their distribution; at most `SAMPLED_VECTORS` evenly spaced components are looked at.
    """
    rank = values.shape[1]
    stride = -(-rank // SAMPLED_VECTORS)
    chosen = torch.arange(rank - 1, -1, -stride, device=a.device)
    weights = values.index_select(1, chosen).unsqueeze(1)  # [batch, 1, chosen]
    residual = product(a, right.index_select(1, chosen).mT) - left.index_select(2, chosen) * weights
    residual = residual * weights  # of a a^T
    nodes, shares = _quadrature(a, left, (residual @ _mixing(len(chosen), a)).mT)
    squares = weights.double().square()  # [batch, 1, chosen]
    gap = (squares - nodes.unsqueeze(2)).clamp_min(1e-300)  # [batch, 2, chosen]
    gap = torch.maximum(gap, 0.02 * squares[:, :, :1]).clamp_min(1e-300)
    gained = torch.linalg.vector_norm(residual, dim=1).double().square() * (shares.unsqueeze(2) / gap).sum(1)
    missed: Tensor = SAFETY * (rank / len(chosen)) * gained.sum(1)
    return missed


def _quadrature(a: Tensor, left: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights [batch, 2] float64 of a a^T outside of left, as the rows of start [batch, k, short] meet it."""

    def normed(x: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x / size.clamp_min(torch.finfo(x.dtype).tiny), size.double().flatten()

    first = normed(start)[0]
    image = product(first, a)
    one = torch.linalg.vector_norm(image, dim=(1, 2)).double().square()
    further = product(image, a.mT) - first * one.to(a.dtype).view(-1, 1, 1)
    second, beside = normed(further - product(product(further, left), left.mT))
    two = torch.linalg.vector_norm(product(second, a), dim=(1, 2)).double().square()
    root = torch.hypot((one - two) / 2, beside)
    nodes = torch.stack([(one + two) / 2 - root, (one + two) / 2 + root], 1)
    upper = (0.5 * (1 - (two - one) / (2 * root).clamp_min(1e-300))).clamp(0, 1)
    return nodes, torch.stack([1 - upper, upper], 1)
