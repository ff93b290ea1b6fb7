# SPDX-License-Identifier: Apache-2.0
"""The difference of two weights as a product of two thin factors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.errors import ConfigError
from eigenprune.spectral.decompose import balance
from eigenprune.spectral.metric import Metric


@dataclass(frozen=True)
class ThinDifference:
    """`left [m, r] @ right [r, n]`, float64, near a difference [m, n] of two weights.

    `energy` is the part of its squared length in the metric that the factors hold, 0 to 1.
    """

    left: Tensor
    right: Tensor
    energy: float

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.right.shape[0]


def thin_difference(
    difference: Tensor, metric: Metric, *, rank: int | None = None, energy: float | None = None
) -> ThinDifference:
    """The best factors of `difference` [m, n] in `metric`, at a fixed rank or at the least one that keeps `energy`.

    Args:
        difference: [m, n], any floating dtype.
        metric: what length is measured in; `Metric()` for plain singular values.
        rank: the rank, or with `energy` the largest one; cut to min(m, n).
        energy: the part, in (0, 1], of the squared length in the metric that is kept.

    Raises:
        ConfigError: neither is given, or one is out of range.
    """
    check_rank_and_energy(rank, energy)
    most = min(difference.shape) if rank is None else min(rank, *difference.shape)
    outer = metric.output.transposed_multiply(difference.double())
    vectors, values = leading_singular_vectors(metric.inner.right_multiply(outer), min(difference.shape))
    energies = values.square()
    total = float(energies.sum())
    if energy is not None and total > 0:
        reached = energies.cumsum(0) >= energy * total * (1 - 1e-12)  # an energy of 1 must not ask for the rounding too
        most = min(most, 1 + int((~reached).sum()))
    vectors = vectors[:, :most]
    left, right = balance(metric.output.transposed_solve(vectors), vectors.t() @ outer)
    return ThinDifference(left, right, float(energies[:most].sum()) / total if total > 0 else 1.0)


def leading_singular_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading left singular vectors [m, rank] and singular values [rank] of `matrix` [m, n]."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank]


def check_rank_and_energy(rank: int | None, energy: float | None) -> None:
    """Check that there is a `rank` from 1 on, or an `energy` in (0, 1], or both.

    Raises:
        ConfigError: there is neither, or one is out of range.
    """
    if rank is None and energy is None:
        raise ConfigError("say the rank, or the energy to keep (0.9 keeps 90 % of the squared length), or both")
    if rank is not None and rank < 1:
        raise ConfigError(f"a rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy={energy!r} must be in (0, 1]: the part of the squared length that is kept")
