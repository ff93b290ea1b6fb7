# SPDX-License-Identifier: Apache-2.0
"""The table of allocations, and the way in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from eigenprune.errors import BudgetError, ConfigError
from eigenprune.spectral.allocation.knapsack import exact_choice
from eigenprune.spectral.allocation.table import Choice, Solution, Table, fill, make_table
from eigenprune.spectral.allocation.uniform import uniform_choice
from eigenprune.spectral.worth import Options


@dataclass(frozen=True)
class Allocation:
    """What every matrix gets.

    Attributes:
        choices: by name.
        bound: what no choice within the budget can lose less than, proven; None where no loss was minimised.
    """

    choices: dict[str, Choice]
    bound: float | None = None

    @property
    def loss(self) -> float:
        """The estimated loss of all."""
        return sum(choice.loss for choice in self.choices.values())

    @property
    def gap(self) -> float | None:
        """How much of the loss a better choice may save at most, 0 where the choice is proven to be the best."""
        if self.bound is None:
            return None
        return max(0.0, self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def allocate(options: Mapping[str, Options], keep: float, allocation: str) -> dict[str, Choice]:
    """The choices of `solve_allocation`."""
    return solve_allocation(options, keep, allocation).choices


def solve_allocation(options: Mapping[str, Options], keep: float, allocation: str) -> Allocation:
    """Choose one option for every matrix, at most `keep` times the cost of all dense weights.

    `global` minimises the total estimated loss: the multiple-choice knapsack, solved exactly. `uniform` gives every
    matrix the rank nearest below `keep` of itself, and what is left to the matrices that are furthest below.

    Raises:
        BudgetError: even the smallest rank everywhere is too large.
        ConfigError: unknown allocation.
    """
    if allocation not in ALLOCATIONS:
        raise ConfigError(f"allocation {allocation!r} is unknown; there are: {', '.join(ALLOCATIONS)}")
    table = make_table(list(options.values()))
    budget = keep * float(table.dense.sum())
    smallest = float(table.costs[:, 0].sum())
    if smallest > budget * (1 + 1e-12):
        raise BudgetError(
            f"keep={keep:g} is {budget:,.0f} parameters, but the smallest ranks take {smallest:,.0f}: "
            f"keep at least {smallest / float(table.dense.sum()):.4f}, or lower rank_multiple"
        )
    solution = ALLOCATIONS[allocation](table, max(budget, smallest), keep)
    choices = {
        name: Choice(int(o.ranks[i]), int(o.costs[i]), float(o.losses[i]))
        for (name, o), i in zip(options.items(), solution.chosen.tolist(), strict=True)
    }
    return Allocation(choices, solution.bound)


def _global(table: Table, budget: float, keep: float) -> Solution:
    best = exact_choice(table, budget)
    return Solution(fill(table, best.chosen, budget, table.losses), best.bound)  # where losses are equal, the larger


def _uniform(table: Table, budget: float, keep: float) -> Solution:
    return Solution(uniform_choice(table, budget, keep))


ALLOCATIONS: dict[str, Callable[[Table, float, float], Solution]] = {"global": _global, "uniform": _uniform}
