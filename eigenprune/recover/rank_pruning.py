# SPDX-License-Identifier: Apache-2.0
"""The step of Trained Rank Pruning: choose a rank for every weight, and replace it by its best one of that rank.

Trained Rank Pruning (Xu et al., IJCAI 2020, arXiv 2004.14566) trains as ever, and every m steps puts `T = D(W)` in the
place of W, with D the truncated SVD at an energy threshold; the nuclear norm of W, by its subgradient `U V^T`, joins
the loss with a small weight lambda.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eigenprune.errors import ConfigError
from eigenprune.layers import LAYOUTS, dense_weight, factored_parameters
from eigenprune.spectral import ALLOCATIONS, Metric, Spectrum, allocate, components, rank_options, spectrum

MetricOf = Callable[[str], Metric]


@dataclass(frozen=True)
class RankTarget:
    """How much of the layers is to stay: a budget or an energy.

    Attributes:
        keep: kept fraction of their parameters, in (0, 1], when factored in `layout`.
        energy: or the part of each weight's squared length that stays, in (0, 1).
        allocation: of the budget: `uniform`, or `global`, which is sound in a loss metric only.
        layout: `pivot` or `pair`.
        rank_multiple: ranks are multiples of this.

    Raises:
        ConfigError: neither or both of keep and energy, or a value is out of range.
    """

    keep: float | None = None
    energy: float | None = None
    allocation: str = "uniform"
    layout: str = "pivot"
    rank_multiple: int = 8

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.energy is None):
            raise ConfigError("say keep (a budget of parameters) or energy (a threshold in each weight), and not both")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep!r} must be in (0, 1]: the fraction of parameters that stays")
        if self.energy is not None and not 0 < self.energy < 1:
            raise ConfigError(f"energy={self.energy!r} must be in (0, 1): the part of the squared length that stays")
        if self.allocation not in ALLOCATIONS:
            raise ConfigError(f"allocation {self.allocation!r} is unknown; there are: {', '.join(ALLOCATIONS)}")
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout {self.layout!r} is unknown; there are: {', '.join(LAYOUTS)}")
        if self.rank_multiple < 1:
            raise ConfigError(f"rank_multiple={self.rank_multiple!r} must be at least 1")


def choose_ranks(
    layers: Mapping[str, nn.Module], target: RankTarget, keep: float, metric_of: MetricOf
) -> dict[str, int]:
    """{layer: rank}, 0 for a layer that stays dense: factors of any rank that is wanted would be no smaller.

    Args:
        layers: dense ones.
        target: what is wanted in the end.
        keep: what is wanted now, where the target is a budget.
        metric_of: in which metric each weight is measured.
    """
    if target.energy is not None:
        return {name: _rank_of_energy(module, target, metric_of(name)) for name, module in layers.items()}
    options = {}
    for name, module in layers.items():
        weight = dense_weight(module).detach()
        if target.allocation == "global":
            found = spectrum(weight, metric_of(name))
        else:
            found = Spectrum(torch.zeros(min(weight.shape), dtype=torch.float64))  # only the shape counts
        options[name] = rank_options((weight.shape[0], weight.shape[1]), found, target.layout, target.rank_multiple)
    return {name: choice.rank for name, choice in allocate(options, keep, target.allocation).items()}


def _rank_of_energy(module: nn.Module, target: RankTarget, metric: Metric) -> int:
    weight = dense_weight(module).detach()
    m, n = weight.shape
    lost = spectrum(weight, metric).tail()
    enough = lost <= (1 - float(target.energy or 0)) * lost[0]
    rank = int(enough.int().argmax())  # the first
    rank = max(1, -(-rank // target.rank_multiple)) * target.rank_multiple
    return rank if rank < min(m, n) and factored_parameters(rank, m, n, target.layout) < m * n else 0


def low_rank_factors(weight: Tensor, metric: Metric, rank: int, shrink: float = 0.0) -> tuple[Tensor, Tensor]:
    """The best factors `left [m, rank]`, `right [rank, n]`, float64, of `weight` [m, n] in `metric`.

    Args:
        weight: any floating dtype.
        metric: `Metric()` for the plain one, the only one in which `shrink` is a step down the nuclear norm.
        rank: of the factors.
        shrink: taken off each singular value, down to zero: `shrink` many unit steps along the subgradient `-U V^T` of
            the nuclear norm, which is the proximal step of that length.
    """
    left, right = components(weight, metric, rank).truncated(rank)
    if shrink:
        # Balanced factors of a plain SVD: both norms of component i are sqrt(sigma_i).
        sigma = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
        left = left * ((sigma - shrink).clamp_min(0) / sigma.clamp_min(torch.finfo(sigma.dtype).tiny))
    return left, right
