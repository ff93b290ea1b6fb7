# SPDX-License-Identifier: Apache-2.0
"""The exact knapsack: equal to a table of all budgets on thousands of small cases, and proven optimal at real size."""

import time

import pytest
import torch

from eigenprune.spectral import Options, solve_allocation
from eigenprune.spectral.allocation.knapsack import exact_choice
from eigenprune.spectral.allocation.lagrangian import priced_choice
from eigenprune.spectral.allocation.table import make_table
from tests.spectral.test_allocation import dense, model

CASES = 1000
SUM = 1e-11  # relative: sums of a handful of float64 numbers, and the tolerance of the search


def any_options(generator: torch.Generator) -> list[Options]:
    """One to six matrices with any costs and losses at all: not convex, not even falling, with ties and zeros."""

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    found = []
    unit = draw(1, 4)[0]  # a common divisor, as multiples of a rank have
    for _ in range(draw(1, 7)[0]):
        count = draw(1, 7)[0]
        costs = sorted({unit * cost for cost in draw(1, 40, count)})
        losses = [float(loss) for loss in draw(0, 12, len(costs))]  # whole numbers: many ties
        if draw(0, 2)[0]:
            losses = (torch.rand(len(costs), generator=generator) ** 3).double().tolist()
        found.append(Options(torch.arange(len(costs)), torch.tensor(costs), torch.tensor(losses).double()))
    return found


def best_of_all(options: list[Options], budget: int) -> float | None:
    """The least loss at a cost of at most `budget`: the textbook table over every budget, in whole costs."""
    best: list[float | None] = [0.0] * (budget + 1)
    for one in options:
        pairs = list(zip(one.costs.tolist(), one.losses.tolist(), strict=True))
        best = [
            min(
                (before + loss for cost, loss in pairs if cost <= room and (before := best[room - cost]) is not None),
                default=None,
            )
            for room in range(budget + 1)
        ]
    return best[budget]


def test_thousands_of_small_cases_equal_the_table_of_all_budgets() -> None:
    generator = torch.Generator().manual_seed(0)
    solved, better = 0, 0
    for _ in range(CASES):
        options = any_options(generator)
        least, most = sum(int(o.costs.min()) for o in options), sum(int(o.costs.max()) for o in options)
        budget = int(torch.randint(least, most + 2, (), generator=generator))
        wanted = best_of_all(options, budget)
        table = make_table(options)
        found = exact_choice(table, budget + float(torch.rand((), generator=generator)) * 0.99)
        assert wanted is not None
        assert table.spent(found.chosen) <= budget
        assert table.loss(found.chosen) == pytest.approx(wanted, rel=SUM, abs=1e-15)
        assert found.bound == pytest.approx(wanted, rel=SUM, abs=1e-15)
        better += table.loss(found.chosen) < table.loss(priced_choice(table, budget)) * (1 - SUM)
        solved += 1
    assert solved == CASES
    assert better > CASES / 100  # the search is needed: one price alone misses some


def test_with_too_few_states_the_best_found_is_returned_with_a_bound_that_holds() -> None:
    generator = torch.Generator().manual_seed(1)
    missed = 0
    for _ in range(600):
        options = any_options(generator)
        least, most = sum(int(o.costs.min()) for o in options), sum(int(o.costs.max()) for o in options)
        budget = int(torch.randint(least, most + 2, (), generator=generator))
        table = make_table(options)
        found = exact_choice(table, budget, most_states=1)
        wanted = best_of_all(options, budget)
        assert wanted is not None
        assert table.spent(found.chosen) <= budget
        loss = table.loss(found.chosen)
        assert wanted * (1 - SUM) <= loss <= table.loss(priced_choice(table, budget)) * (1 + SUM)
        assert found.bound <= wanted * (1 + SUM) + 1e-15
        missed += loss > wanted * (1 + SUM)
        assert found.bound < loss or loss == pytest.approx(wanted, rel=SUM, abs=1e-15)
    assert missed >= 1  # so the bound was put to the test


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_at_real_size_the_choice_is_proven_in_two_seconds(layout: str, keep: float) -> None:
    options = model(layout, seed=3)
    table = make_table(list(options.values()))
    budget = keep * dense(options)
    began = time.process_time()
    found = exact_choice(table, budget)
    seconds = time.process_time() - began
    loss = table.loss(found.chosen)
    assert found.bound is not None
    assert loss - found.bound <= 1e-11 * loss
    assert loss <= table.loss(priced_choice(table, budget))
    assert 0.999 * budget <= table.spent(found.chosen) <= budget
    assert seconds < 2  # 0.2 on one core


def test_equal_matrices_with_equal_steps_do_not_blow_up_the_search() -> None:
    # Every order of upgrades is as good as every other: as many equal choices as there can be.
    count = 64
    costs, losses = torch.arange(1, 73) * 1536, torch.linspace(1, 0, 72).double()
    options = {str(i): Options(torch.arange(72), costs, losses) for i in range(count)}
    for keep in (0.3333, 0.5, 0.77):
        began = time.process_time()
        found = solve_allocation(options, keep, "global")
        assert time.process_time() - began < 2
        assert found.gap is not None
        assert found.gap <= 1e-11


def test_the_hardest_cases_end_in_time_with_a_bound() -> None:
    # Losses and costs strongly correlated, with noise far below a step: the relaxation decides nothing.
    generator = torch.Generator().manual_seed(0)
    options = {}
    for i in range(210):
        costs = torch.randint(10_000, 2_000_000, (72,), generator=generator).sort().values.unique()
        noise = torch.rand(len(costs), generator=generator).double()
        losses = 1 - costs.double() / 2e6 + 1e-6 * noise
        options[str(i)] = Options(torch.arange(len(costs)), costs, losses)
    table = make_table(list(options.values()))
    budget = 0.5 * dense(options)
    began = time.process_time()
    found = exact_choice(table, budget)
    assert time.process_time() - began < 20  # 2 on an idle core; without the limit on work, minutes
    loss = table.loss(found.chosen)
    assert found.bound is not None
    assert found.bound <= loss <= table.loss(priced_choice(table, budget))
    assert table.spent(found.chosen) <= budget
    assert loss - found.bound <= 1e-6 * loss


def test_the_gap_is_that_of_the_bound_and_there_is_none_without_a_loss_to_minimise() -> None:
    options = model("pivot", blocks=2)
    found = solve_allocation(options, 0.7, "global")
    assert found.gap is not None
    assert 0 <= found.gap <= 1e-11
    assert solve_allocation(options, 0.7, "uniform").gap is None
