# SPDX-License-Identifier: Apache-2.0
"""The options of all matrices side by side, and a choice among them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.spectral.worth import Options


@dataclass(frozen=True)
class Choice:
    """What one matrix gets: `rank` (0: dense), its cost in the unit of the budget, the estimated loss, and its bits.

    0 bits stand for floating point, and for what is not chosen here. `forced` says that there was nothing else.
    """

    rank: int
    cost: int
    loss: float
    bits: int = 0
    forced: bool = False


def choice_of(options: Options, number: int) -> Choice:
    """The choice `number` of `options`."""
    return Choice(
        rank=int(options.ranks[number]),
        cost=int(options.costs[number]),
        loss=float(options.losses[number]),
        bits=0 if options.bits is None else int(options.bits[number]),
        forced=len(options.ranks) == 1,
    )


@dataclass(frozen=True)
class Table:
    """The options of all matrices, padded: [matrices, options] float64, by rising cost.

    Attributes:
        costs: in the unit of the budget; whole numbers, exact below 2^53; padding is infinite.
        losses: padding is infinite.
        dense: [matrices], the cost of the dense weights.
    """

    costs: Tensor
    losses: Tensor
    dense: Tensor

    def spent(self, chosen: Tensor) -> float:
        """The cost of option `chosen[i]` in every matrix i."""
        return float(self.costs.gather(1, chosen.unsqueeze(1)).sum())

    def loss(self, chosen: Tensor) -> float:
        """The estimated loss of option `chosen[i]` in every matrix i."""
        return float(self.losses.gather(1, chosen.unsqueeze(1)).sum())


@dataclass(frozen=True)
class Solution:
    """The options chosen, [matrices] int64, and a proven lower bound of the loss, None where nothing was minimised."""

    chosen: Tensor
    bound: float | None = None


def make_table(options: Sequence[Options]) -> Table:
    """The table of `options`."""
    width = max(len(o.ranks) for o in options)
    costs = torch.full((len(options), width), torch.inf, dtype=torch.float64)
    losses = torch.full((len(options), width), torch.inf, dtype=torch.float64)
    for i, o in enumerate(options):
        costs[i, : len(o.costs)] = o.costs.double()
        losses[i, : len(o.losses)] = o.losses
    return Table(costs, losses, torch.stack([o.costs[-1] for o in options]).double())


def fill(table: Table, chosen: Tensor, budget: float, losses: Tensor) -> Tensor:
    """Upgrade one matrix after another, by the largest gain per cost that still fits, until none does."""
    rows = torch.arange(len(chosen))
    chosen = chosen.clone()
    while True:
        left = budget - table.spent(chosen)
        more = table.costs - table.costs[rows, chosen].unsqueeze(1)
        gain = losses[rows, chosen].unsqueeze(1) - losses
        possible = (more > 0) & (more <= left) & gain.isfinite() & (gain >= 0)
        if not possible.any():
            return chosen
        rate = torch.where(possible, gain / more.clamp_min(1), -1.0)
        best = int(rate.argmax())
        row, column = divmod(best, rate.shape[1])
        chosen[row] = column
