# SPDX-License-Identifier: Apache-2.0
"""Ranks for all matrices under one budget."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.errors import BudgetError, ConfigError
from eigenprune.spectral.worth import Options


@dataclass(frozen=True)
class Choice:
    """What one matrix gets: `rank` (0: dense), its parameters, and the estimated loss."""

    rank: int
    cost: int
    loss: float


@dataclass(frozen=True)
class _Table:
    """The options of all matrices side by side, padded: [matrices, options], by rising cost."""

    costs: Tensor  # float64; padding is infinite
    losses: Tensor
    dense: Tensor  # [matrices]


def allocate(options: Mapping[str, Options], keep: float, allocation: str) -> dict[str, Choice]:
    """Choose one option for every matrix, at most `keep` times the dense parameters in all.

    `global` minimises the total estimated loss: a multiple-choice knapsack, solved along the lower convex hull of the
    options (one price per parameter for all matrices, by bisection), and the remainder of the budget filled with the
    upgrades that gain most per parameter. `uniform` gives every matrix the rank nearest below `keep` of itself, and
    fills likewise with the matrices that are furthest below.

    Raises:
        BudgetError: even the smallest rank everywhere is too large.
        ConfigError: unknown allocation.
    """
    if allocation not in ALLOCATIONS:
        raise ConfigError(f"allocation {allocation!r} is unknown; there are: {', '.join(ALLOCATIONS)}")
    table = _table(list(options.values()))
    budget = keep * float(table.dense.sum())
    smallest = float(table.costs[:, 0].sum())
    if smallest > budget * (1 + 1e-12):
        raise BudgetError(
            f"keep={keep:g} is {budget:,.0f} parameters, but the smallest ranks take {smallest:,.0f}: "
            f"keep at least {smallest / float(table.dense.sum()):.4f}, or lower rank_multiple"
        )
    chosen = ALLOCATIONS[allocation](table, budget, keep)
    return {
        name: Choice(int(o.ranks[i]), int(o.costs[i]), float(o.losses[i]))
        for (name, o), i in zip(options.items(), chosen.tolist(), strict=True)
    }


def _table(options: list[Options]) -> _Table:
    width = max(len(o.ranks) for o in options)
    costs = torch.full((len(options), width), torch.inf, dtype=torch.float64)
    losses = torch.full((len(options), width), torch.inf, dtype=torch.float64)
    for i, o in enumerate(options):
        costs[i, : len(o.costs)] = o.costs.double()
        losses[i, : len(o.losses)] = o.losses
    return _Table(costs, losses, torch.stack([o.costs[-1] for o in options]).double())


def _global(table: _Table, budget: float, keep: float) -> Tensor:
    chosen = _at_price(table, _price(table, budget))
    return _fill(table, chosen, budget, table.losses)


def _at_price(table: _Table, price: float) -> Tensor:
    """The option of least loss + price x cost in every matrix, [matrices]; the cheaper of two equals."""
    total = table.losses + price * table.costs
    return torch.where(table.costs.isinf(), torch.inf, total).argmin(1)


def _price(table: _Table, budget: float) -> float:
    """The least price per parameter, in loss, at which the choice fits the budget."""
    low, high = 0.0, 1.0
    while _spent(table, _at_price(table, high)) > budget:
        low, high = high, high * 4
        if high > 1e300:
            break
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high / 16
        if middle in (low, high) or high < 1e-300:
            break
        if _spent(table, _at_price(table, middle)) > budget:
            low = middle
        else:
            high = middle
        if low > 0 and high / low < 1 + 1e-12:
            break
    return high


def _uniform(table: _Table, budget: float, keep: float) -> Tensor:
    fits = table.costs <= keep * table.dense.unsqueeze(1) * (1 + 1e-12)
    chosen = (fits.sum(1) - 1).clamp_min(0)
    if _spent(table, chosen) > budget:  # small matrices whose smallest rank is above their share
        chosen = torch.zeros_like(chosen)
    # Fill by lowest kept share after the upgrade: as if every matrix lost the square of what it is short of the whole.
    shortfall = (1 - table.costs / table.dense.unsqueeze(1)).clamp_min(0) ** 2 * table.dense.unsqueeze(1)
    limited = torch.where(_at_most_one_above(fits), shortfall, torch.inf)
    return _fill(table, chosen, budget, limited)


def _at_most_one_above(fits: Tensor) -> Tensor:
    """`fits` with the first option above it added."""
    shifted = torch.cat([torch.ones_like(fits[:, :1]), fits[:, :-1]], 1)
    return fits | shifted


def _fill(table: _Table, chosen: Tensor, budget: float, losses: Tensor) -> Tensor:
    """Upgrade one matrix after another, by the largest gain per parameter that still fits, until none does."""
    rows = torch.arange(len(chosen))
    chosen = chosen.clone()
    while True:
        left = budget - _spent(table, chosen)
        more = table.costs - table.costs[rows, chosen].unsqueeze(1)
        gain = losses[rows, chosen].unsqueeze(1) - losses
        possible = (more > 0) & (more <= left) & gain.isfinite() & (gain >= 0)
        if not possible.any():
            return chosen
        rate = torch.where(possible, gain / more.clamp_min(1), -1.0)
        best = int(rate.argmax())
        row, column = divmod(best, rate.shape[1])
        chosen[row] = column


def _spent(table: _Table, chosen: Tensor) -> float:
    return float(table.costs.gather(1, chosen.unsqueeze(1)).sum())


ALLOCATIONS: dict[str, Callable[[_Table, float, float], Tensor]] = {"global": _global, "uniform": _uniform}
