# SPDX-License-Identifier: Apache-2.0
"""The table of allocations, and the way in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from eigenprune.calibrate import ChannelGroup
from eigenprune.errors import BudgetError, ConfigError
from eigenprune.spectral.allocation.case import Case, Evidence
from eigenprune.spectral.allocation.heap import least_change, zero_sum
from eigenprune.spectral.allocation.knapsack import exact_choice
from eigenprune.spectral.allocation.probed import asvd_search, lems
from eigenprune.spectral.allocation.shares import energy, fisher, svd_llm_v2, swift, uniform
from eigenprune.spectral.allocation.table import Choice, Solution, choice_of, fill, make_table
from eigenprune.spectral.worth import Options


@dataclass(frozen=True)
class AllocationRow:
    """One way to share a budget out.

    Attributes:
        solve: the formula.
        source: where it stands.
        needs: what it looks at beside the options: `fisher`, `influence`, `changes`, `probe-kl`, `probe-loss`, or
            nothing; see `Evidence`.
    """

    solve: Callable[[Case], Solution]
    source: str
    needs: str = ""


@dataclass(frozen=True)
class Allocation:
    """What every matrix gets.

    Attributes:
        choices: by name.
        bound: what no choice within the budget can lose less than, proven; None where no loss was minimised.
        kept: of each channel group that loses some, the channels that stay, [k] int64.
    """

    choices: dict[str, Choice]
    bound: float | None = None
    kept: dict[ChannelGroup, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The estimated loss of all."""
        return sum(choice.loss for choice in self.choices.values())

    @property
    def gap(self) -> float | None:
        """What part of the loss a better choice might save at most, 0 where this one is proven to be the best."""
        if self.bound is None:
            return None
        return max(0.0, self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def allocate(options: Mapping[str, Options], keep: float, allocation: str) -> dict[str, Choice]:
    """The choices of `solve_allocation`, for allocations that need the options alone."""
    return solve_allocation(options, keep, allocation).choices


def solve_allocation(
    options: Mapping[str, Options], keep: float, allocation: str, evidence: Evidence | None = None
) -> Allocation:
    """Choose one option for every matrix, at most `keep` times the cost of all dense weights.

    Args:
        options: by name, costs in the unit of the budget.
        keep: the budget, as a fraction of the cost of all dense weights.
        allocation: a row of `ALLOCATIONS`.
        evidence: what the row needs beside the options.

    Raises:
        BudgetError: even the smallest rank everywhere is too large.
        ConfigError: unknown allocation, or what it needs was not measured.
    """
    if allocation not in ALLOCATIONS:
        raise ConfigError(f"allocation {allocation!r} is unknown; there are: {', '.join(ALLOCATIONS)}")
    table = make_table(list(options.values()))
    budget = keep * float(table.dense.sum())
    smallest = float(table.costs[:, 0].sum())
    if smallest > budget * (1 + 1e-12):
        if table.costs.shape[1] == 1:
            raise BudgetError(
                f"keep={keep:g} cannot be met: in the unit of this budget no rank is cheaper than the dense weights; "
                "count another budget (parameters, bytes), lower rank_multiple or min_keep, or leave out faster_at"
            )
        raise BudgetError(
            f"keep={keep:g} is a budget of {budget:,.0f}, but the smallest ranks take {smallest:,.0f}: "
            f"keep at least {smallest / float(table.dense.sum()):.4f}, lower rank_multiple or min_keep, or leave out "
            "faster_at"
        )
    case = Case(options, table, max(budget, smallest), keep, evidence or Evidence())
    solution = ALLOCATIONS[allocation].solve(case)
    choices = {
        name: choice_of(own, number)
        for (name, own), number in zip(options.items(), solution.chosen.tolist(), strict=True)
    }
    return Allocation(choices, solution.bound)


def _global(case: Case) -> Solution:
    best = exact_choice(case.table, case.budget)
    # Where losses are equal, the larger rank.
    return Solution(fill(case.table, best.chosen, case.budget, case.table.losses), best.bound)


ALLOCATIONS: dict[str, AllocationRow] = {
    "global": AllocationRow(_global, "the least estimated loss in all: multiple-choice knapsack, exact"),
    "uniform": AllocationRow(uniform, "the same share of every matrix"),
    "energy": AllocationRow(energy, "the same part of the energy of every matrix"),
    "fisher": AllocationRow(fisher, "Palu, arXiv 2407.21118", "fisher"),
    "svd-llm-v2": AllocationRow(svd_llm_v2, "SVD-LLM v2, arXiv 2503.12340, with a floor"),
    "swift": AllocationRow(swift, "Swift-SVD, arXiv 2604.01609, alpha 0.5", "influence"),
    "zero-sum": AllocationRow(zero_sum, "ZS-SVD, arXiv 2602.02848", "changes"),
    "least-change": AllocationRow(least_change, "IO-SVD, arXiv 2605.15626", "changes"),
    "asvd-search": AllocationRow(asvd_search, "ASVD, arXiv 2312.05821", "probe-loss"),
    "lems": AllocationRow(lems, "LEMS (2026), gamma 0", "probe-kl"),
}
