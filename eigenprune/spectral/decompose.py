# SPDX-License-Identifier: Apache-2.0
"""A weight's singular components in a metric, and its factors at a rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.errors import WeightError
from eigenprune.spectral.metric import Metric


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of `R W S`, [min(m, n)] float64 on the CPU, largest first."""

    energies: Tensor

    def tail(self) -> Tensor:
        """[min(m, n) + 1]: the energy lost at rank 0, 1, ..., full."""
        lost = self.energies.flip(0).cumsum(0).flip(0)
        return torch.cat([lost, lost.new_zeros(1)])


@dataclass(frozen=True)
class Components:
    """All components of a weight [m, n] in a metric, the most worth first: the best W' of rank r is `left[:, :r] @
    right[:r]`.

    left: [m, k], right: [k, n], k at most min(m, n); float64.
    """

    left: Tensor
    right: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Balanced factors `left [m, rank]`, `right [rank, n]`."""
        return balance(self.left[:, :rank], self.right[:rank])


def spectrum(weight: Tensor, metric: Metric) -> Spectrum:
    """The spectrum of `weight` [m, n] in `metric`."""
    product = metric.inner.right_multiply(metric.output.transposed_multiply(weight.double()))
    values = torch.linalg.eigvalsh(_short_gram(product)).clamp_min(0)
    return Spectrum(values.flip(0).cpu())


def components(weight: Tensor, metric: Metric, rank: int | None = None) -> Components:
    """The `rank` leading components (default: all) of `weight` [m, n] in `metric`.

    With U the leading left singular vectors of `R W S`, left = R^-1 U and right = U^T R W, the projection form of the
    optimum: S, which a rank-deficient calibration makes singular, is never inverted.

    Raises:
        WeightError: the components are not finite.
    """
    m, n = weight.shape
    rank = min(m, n) if rank is None else rank
    outer = metric.output.transposed_multiply(weight.double())  # R W
    product = metric.inner.right_multiply(outer)  # R W S
    _, vectors = torch.linalg.eigh(_short_gram(product))
    vectors = vectors[:, -rank:].flip(1)
    if n < m:  # right singular vectors: turn them into left ones; QR keeps their order and survives zero columns
        vectors, _ = torch.linalg.qr(product @ vectors)
    del product
    right = vectors.t() @ outer
    del outer
    left = metric.output.transposed_solve(vectors)
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise WeightError(f"the components of a {m} x {n} weight are not finite; the statistics are degenerate")
    return Components(left, right)


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Give column i of `left` [m, r] and row i of `right` [r, n] the same norm; the product stays as it is.

    Balanced factors have the smallest range, which float16 needs.
    """
    left_norm = torch.linalg.vector_norm(left, dim=0)
    right_norm = torch.linalg.vector_norm(right, dim=1)
    alive = (left_norm > 0) & (right_norm > 0)
    scale = torch.where(alive, (right_norm / left_norm.clamp_min(1e-300)).sqrt(), torch.ones_like(left_norm))
    scale = scale.clamp_min(1e-150)
    return left * scale, right / scale.unsqueeze(1)


def _short_gram(product: Tensor) -> Tensor:
    """`product @ product.T` or `product.T @ product`, whichever is smaller.

    In float64, squaring leaves singular values of a float32 weight right to float32 accuracy and `eigh` of the short
    side costs a fraction of an SVD.
    """
    return product @ product.t() if product.shape[0] <= product.shape[1] else product.t() @ product
