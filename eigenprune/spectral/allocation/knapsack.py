# SPDX-License-Identifier: Apache-2.0
"""The exact multiple-choice knapsack: one option for every matrix, the least total loss within a budget.

The continuous relaxation (Sinha and Zoltners, 1979) is solved along the lower convex hulls: it gives a lower bound, a
price per unit of cost, and for every other option what it must cost at least. Options that cannot be part of anything
better than the best choice known are dropped; few matrices keep more than one. Over these, dynamic programming with
lists of states (Pisinger, 1995): a state that another beats in cost and in loss is dropped, and so is one whose own
relaxation reaches no better than the best choice known.
"""

import itertools
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from eigenprune.spectral.allocation.lagrangian import priced_choice
from eigenprune.spectral.allocation.table import Solution, Table

# Beyond these the least promising states are dropped, and the bound says what that may have missed.
MOST_STATES = 1 << 16  # kept for one matrix: bounds memory
MOST_WORK = 1 << 22  # tried in all: a second or two
LEAST_STATES = 64
TOLERANCE = 1e-12  # of the loss: what sums in float64 may differ by


@dataclass(frozen=True)
class _Class:
    """What is left of one matrix: options as differences from its choice in the relaxation, which comes first.

    columns [k] int64 in the table; costs [k]; excess [k]: loss + price x cost beyond the first, never negative.
    """

    row: int
    columns: Tensor
    costs: Tensor
    excess: Tensor


@dataclass(frozen=True)
class _Relaxation:
    """The continuous optimum: `bound`, the `price`, whole options `base` [matrices], and `room`, what they leave."""

    bound: float
    price: float
    base: Tensor
    room: float


def exact_choice(table: Table, budget: float, most_states: int = MOST_STATES) -> Solution:
    """The choice of least loss within `budget`; where the bound of states was met, the best found, and what is proven.

    Never worse than `priced_choice`, which it starts from.
    """
    known = priced_choice(table, budget)
    loss = table.loss(known)
    usable = _usable(table, budget)
    relaxed = _relax(table, usable, budget)
    gap = loss - relaxed.bound
    slack = TOLERANCE * abs(loss)
    if not gap > slack:
        return Solution(known, loss)
    if relaxed.price == 0:  # everything fits
        return Solution(relaxed.base, relaxed.bound)
    classes = _undecided(table, usable, relaxed, gap)
    steps, reached, missed = _search(classes, relaxed, gap, slack, most_states)
    chosen = known
    if steps is not None:
        chosen = relaxed.base.clone()
        for undecided, option in steps:
            chosen[undecided.row] = undecided.columns[option]
    return Solution(chosen, min(table.loss(chosen), relaxed.bound + min(reached, missed)))


def _usable(table: Table, budget: float) -> list[Tensor]:
    """Of every matrix the columns that fit at all and that no cheaper one beats, by rising cost and falling loss."""
    cheapest = table.costs.min(1).values
    room = budget - float(cheapest.sum())
    found = []
    for costs, losses, least in zip(table.costs, table.losses, cheapest, strict=True):
        order = torch.argsort(losses, stable=True)
        order = order[torch.argsort(costs[order], stable=True)]
        fits = order[(costs[order] - least <= max(room, 0.0))]
        best = torch.cat([torch.tensor([torch.inf], dtype=losses.dtype), losses[fits].cummin(0).values[:-1]])
        better = losses[fits] < best
        better[0] = True
        found.append(fits[better])
    return found


def _relax(table: Table, usable: list[Tensor], budget: float) -> _Relaxation:
    """Solve the relaxation: the steps along all hulls, by falling gain per cost, as far as the budget goes."""
    steps: list[tuple[float, int, int, float, float]] = []  # rate, row, column after it, cost, gain
    base = torch.stack([columns[0] for columns in usable])
    for row, columns in enumerate(usable):
        points = list(zip(table.costs[row, columns].tolist(), table.losses[row, columns].tolist(), strict=True))
        hull = _lower_hull(points)
        for at, after in itertools.pairwise(hull):
            cost, gain = points[after][0] - points[at][0], points[at][1] - points[after][1]
            steps.append((gain / cost, row, int(columns[after]), cost, gain))
    steps.sort(key=lambda step: (-step[0], step[1], step[3]))
    room = _whole_room(table, usable, budget - table.spent(base))
    bound, price = table.loss(base), 0.0
    for rate, row, column, cost, gain in steps:
        if cost > room:
            price = rate
            break
        base[row] = column
        room -= cost
        bound -= gain
    return _Relaxation(table.loss(base) - price * room, price, base, room)


def _whole_room(table: Table, usable: list[Tensor], room: float) -> float:
    """`room` rounded down to what differences of costs can make up: their greatest common divisor's multiples."""
    unit = 0
    for row, columns in enumerate(usable):
        costs = table.costs[row, columns]
        for cost in (costs - costs[0]).tolist():
            unit = gcd(unit, int(cost))
    return float(room // unit * unit) if unit else room


def _lower_hull(points: list[tuple[float, float]]) -> list[int]:
    """The vertices of the lower convex hull of `points`, sorted by rising cost and falling loss."""
    hull: list[int] = []
    for index, (cost, loss) in enumerate(points):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = points[hull[-2]], points[hull[-1]]
            if (y0 - y1) * (cost - x1) > (y1 - loss) * (x1 - x0):
                break
            hull.pop()
        hull.append(index)
    return hull


def _undecided(table: Table, usable: list[Tensor], relaxed: _Relaxation, gap: float) -> list[_Class]:
    """The matrices that may differ from the relaxation in something better than `gap` above it, likeliest first."""
    found: list[tuple[float, _Class]] = []
    for row, columns in enumerate(usable):
        first = relaxed.base[row]
        costs = table.costs[row, columns] - table.costs[row, first]
        excess = (table.losses[row, columns] - table.losses[row, first] + relaxed.price * costs).clamp_min(0.0)
        kept = (excess < gap) & (columns != first)
        if kept.any():
            zero = torch.zeros(1, dtype=costs.dtype)
            one = _Class(
                row,
                torch.cat([first.view(1), columns[kept]]),
                torch.cat([zero, costs[kept]]),
                torch.cat([zero, excess[kept]]),
            )
            found.append((float(one.excess[1:].min()), one))
    return [one for _, one in sorted(found, key=lambda pair: (pair[0], pair[1].row))]


def _search(
    classes: list[_Class], relaxed: _Relaxation, gap: float, slack: float, most_states: int
) -> tuple[list[tuple[_Class, int]] | None, float, float]:
    """Dynamic programming over `classes`.

    Returns the options of the best choice below `gap` (None: there is none), how far above the relaxation it stands,
    and the least that a dropped state might have reached.
    """
    best, missed = gap, float("inf")
    where: tuple[int, int] | None = None
    cost = torch.zeros(1, dtype=torch.float64)
    excess = torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    completion = _Completion(classes, relaxed.price)
    for stage, undecided in enumerate(classes):
        # Every state with every option; `parents` and `options` say where each came from.
        width = len(undecided.costs)
        new_cost = (cost.unsqueeze(1) + undecided.costs).flatten()
        new_excess = (excess.unsqueeze(1) + undecided.excess).flatten()
        bound = new_excess + completion.after(stage, relaxed.room - new_cost)
        alive = (bound < best - slack).nonzero().squeeze(1)
        alive = alive[_undominated(new_cost[alive], new_excess[alive], relaxed.price)]
        next_width = len(classes[stage + 1].costs) if stage + 1 < len(classes) else 1
        most = min(most_states, max(LEAST_STATES, MOST_WORK // (len(classes) * next_width)))
        if len(alive) > most:
            promising = torch.argsort(bound[alive])
            missed = min(missed, float(bound[alive[promising[most]]]))
            alive = alive[promising[:most]].sort().values
        if not len(alive):
            break
        cost, excess = new_cost[alive], new_excess[alive]
        trail.append((torch.div(alive, width, rounding_mode="floor").int(), (alive % width).short()))
        # The states as they are, with the relaxation's choice in all other matrices.
        value = torch.where(cost <= relaxed.room, excess + relaxed.price * (relaxed.room - cost), torch.inf)
        if float(value.min()) < best - slack:
            where = (stage, int(value.argmin()))
            best = float(value.min())
    if where is None:
        return None, best, missed
    steps: list[tuple[_Class, int]] = []
    stage, index = where
    for at in range(stage, -1, -1):
        parents, options = trail[at]
        steps.append((classes[at], int(options[index])))
        index = int(parents[index])
    return steps, best, missed


def _undominated(cost: Tensor, excess: Tensor, price: float) -> Tensor:
    """The positions of states that no state of at most the same cost equals or beats in loss."""
    loss = excess - price * cost
    order = torch.argsort(loss, stable=True)
    order = order[torch.argsort(cost[order], stable=True)]
    if not len(order):
        return order
    best = loss[order].cummin(0).values
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = loss[order][1:] < best[:-1]
    return order[first]


class _Completion:
    """The least excess that the matrices after a stage can add, in the relaxation, to states that leave some room."""

    def __init__(self, classes: list[_Class], price: float) -> None:
        self._up = _sorted_steps([_hull_steps(one.costs, one.excess) for one in classes], price)
        self._down = _sorted_steps([_hull_steps(-one.costs, one.excess) for one in classes], float("inf"))
        self._price = price

    def after(self, stage: int, room: Tensor) -> Tensor:
        """For `room` [states] left after `stage`; where it is negative, that much has to be given back."""
        later_up, later_down = self._up[2] > stage, self._down[2] > stage
        up = _cheapest(self._up[0][later_up], self._up[1][later_up], self._price, room)
        down = _cheapest(self._down[0][later_down], self._down[1][later_down], float("inf"), -room)
        return torch.where(room >= 0, up, down)


def _sorted_steps(steps: list[list[tuple[float, float]]], beyond: float) -> tuple[Tensor, Tensor, Tensor]:
    """(excess per cost, cost, stage) of all steps below the rate `beyond`, the lowest rate first."""
    found = sorted((rate, cost, stage) for stage, own in enumerate(steps) for rate, cost in own if rate < beyond)
    rates, costs, stages = zip(*found, strict=True) if found else ((), (), ())
    return (
        torch.tensor(rates, dtype=torch.float64),
        torch.tensor(costs, dtype=torch.float64),
        torch.tensor(stages, dtype=torch.int64),
    )


def _hull_steps(costs: Tensor, excess: Tensor) -> list[tuple[float, float]]:
    """(excess per cost, cost) of the steps along the lower hull of the options of positive cost, from (0, 0) on."""
    points = [(0.0, 0.0), *sorted((c, e) for c, e in zip(costs.tolist(), excess.tolist(), strict=True) if c > 0)]
    hull = [0]
    while hull[-1] + 1 < len(points):
        x, y = points[hull[-1]]
        hull.append(min(range(hull[-1] + 1, len(points)), key=lambda i: ((points[i][1] - y) / (points[i][0] - x), -i)))
    pairs = [(points[a], points[b]) for a, b in itertools.pairwise(hull)]
    return [((q[1] - p[1]) / (q[0] - p[0]), q[0] - p[0]) for p, q in pairs if q[0] > p[0]]


def _cheapest(rates: Tensor, costs: Tensor, beyond: float, amount: Tensor) -> Tensor:
    """The excess of `amount` >= 0 of cost taken from steps at their rising rates, and at the rate `beyond` after."""
    ends = torch.cat([costs.new_zeros(1), costs.cumsum(0)])
    values = torch.cat([costs.new_zeros(1), (rates * costs).cumsum(0)])
    rates = torch.cat([rates, rates.new_full((1,), beyond)])
    amount = amount.clamp_min(0.0)
    at = (torch.searchsorted(ends, amount, right=True) - 1).clamp_min(0)
    over = amount - ends[at]
    return values[at] + torch.where(over > 0, rates[at] * over, 0.0)
