# SPDX-License-Identifier: Apache-2.0
"""Components removed one step after another by their first-order change of the loss (ZS-SVD, IO-SVD)."""

import heapq
from collections.abc import Callable
from itertools import pairwise

import torch

from eigenprune.errors import ConfigError
from eigenprune.spectral.allocation.case import Case
from eigenprune.spectral.allocation.table import Solution

Pick = Callable[[float, float | None, float | None], bool]  # running sum, next rise, next fall -> take the rise


def zero_sum(case: Case) -> Solution:
    """ZS-SVD, arXiv 2602.02848: the predicted loss is kept near zero.

    Every matrix offers its smallest component that is left (with a rank multiple: that many). While the running sum of
    the removed changes is at most zero, the smallest rise is removed, else the smallest fall.
    """
    return _remove(case, lambda running, rise, fall: fall is None or (rise is not None and running <= 0))


def least_change(case: Case) -> Solution:
    """IO-SVD, arXiv 2605.15626: the component of the smallest predicted change, up or down, goes next."""
    return _remove(case, lambda _, rise, fall: fall is None or (rise is not None and rise <= -fall))


def _remove(case: Case, takes_rise: Pick) -> Solution:
    """Remove steps, smallest change first among rises and among falls, until the budget is met.

    A matrix whose factors would be no smaller than its weight stays dense until enough of its steps are gone, as in
    both papers, and those steps then cost nothing.
    """
    levels = [_levels(case, row) for row in range(len(case.options))]
    at = [0] * len(levels)
    spent = sum(steps[0][0] for steps in levels)
    heaps: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])  # rises, falls

    def offer(row: int) -> None:
        if at[row] + 1 < len(levels[row]):
            change = levels[row][at[row] + 1][1]
            heapq.heappush(heaps[change < 0], (abs(change), row))

    for row in range(len(levels)):
        offer(row)
    running = 0.0
    while spent > case.budget and any(heaps):
        rise = heaps[0][0][0] if heaps[0] else None
        fall = -heaps[1][0][0] if heaps[1] else None
        _, row = heapq.heappop(heaps[not takes_rise(running, rise, fall)])
        spent -= levels[row][at[row]][0]
        at[row] += 1
        spent += levels[row][at[row]][0]
        running += levels[row][at[row]][1]
        offer(row)
    return Solution(torch.tensor([levels[row][step][2] for row, step in enumerate(at)]))


def _levels(case: Case, row: int) -> list[tuple[float, float, int]]:
    """The steps of one matrix, from dense down: (cost, change of the loss by this step, column of the table)."""
    name, options = list(case.options.items())[row]
    if name not in case.evidence.changes:
        raise ConfigError(f"this allocation needs the first-order changes of every matrix, and {name} has none")
    changes = case.evidence.changes[name].double()
    column = {rank: at for at, rank in enumerate(options.ranks.tolist()) if rank}
    dense = len(options.ranks) - 1
    levels = [(float(options.costs[dense]), 0.0, dense)]
    if not column:
        return levels
    ordered = sorted(column)
    step = min((later - rank for rank, later in pairwise(ordered)), default=ordered[0])
    upper = len(changes)
    for rank in range((upper - 1) // step * step, ordered[0] - 1, -step):
        if rank in column or rank > ordered[-1]:  # else a rank that costs more than a larger one
            at = column.get(rank, dense)
            levels.append((float(options.costs[at]), float(changes[rank:upper].sum()), at))
            upper = rank
    return levels
