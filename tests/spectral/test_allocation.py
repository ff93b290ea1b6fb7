# SPDX-License-Identifier: Apache-2.0
"""Ranks under one budget: against brute force on small cases, and exact to a thousandth on real shapes."""

import itertools

import pytest
import torch

from eigenprune.errors import BudgetError, ConfigError
from eigenprune.spectral import ALLOCATIONS, Choice, Options, Spectrum, allocate, rank_options

WITHOUT_EVIDENCE = [name for name, row in ALLOCATIONS.items() if not row.needs]
STEADY = ["global", "uniform"]  # whose estimated loss falls with every budget: others follow another measure

SMOLLM2 = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}


def random_spectrum(count: int, generator: torch.Generator) -> Spectrum:
    """Energies that decay as a random power law of a random size, over some orders of magnitude."""
    power, size = (float(torch.rand((), generator=generator)) for _ in range(2))
    energies = 10 ** (3 * size) * torch.arange(1, count + 1, dtype=torch.float64) ** (-0.2 - 2 * power)
    return Spectrum((energies * (0.5 + torch.rand(count, generator=generator))).sort(descending=True).values)


def model(layout: str, blocks: int = 30, multiple: int = 8, seed: int = 0) -> dict[str, Options]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{block}.{name}": rank_options(shape, random_spectrum(min(shape), generator), layout, multiple)
        for block in range(blocks)
        for name, shape in SMOLLM2.items()
    }


def small(seed: int) -> dict[str, Options]:
    generator = torch.Generator().manual_seed(seed)
    options = {}
    for i in range(int(torch.randint(1, 5, (), generator=generator))):
        shape = tuple(torch.randint(3, 8, (2,), generator=generator).tolist())
        layout = ("pair", "pivot")[int(torch.randint(2, (), generator=generator))]
        options[str(i)] = rank_options(shape, random_spectrum(min(shape), generator), layout, 1)
    return options


def spent(chosen: dict[str, Choice]) -> int:
    return sum(choice.cost for choice in chosen.values())


def loss(chosen: dict[str, Choice]) -> float:
    return sum(choice.loss for choice in chosen.values())


def dense(options: dict[str, Options]) -> int:
    return sum(int(o.costs[-1]) for o in options.values())


def smallest(options: dict[str, Options]) -> int:
    return sum(int(o.costs[0]) for o in options.values())


def brute_force(options: dict[str, Options], budget: float) -> float:
    tables = [list(zip(o.costs.tolist(), o.losses.tolist(), strict=True)) for o in options.values()]
    return min(sum(x[1] for x in pick) for pick in itertools.product(*tables) if sum(x[0] for x in pick) <= budget)


def test_the_global_choice_is_that_of_brute_force() -> None:
    cases = 0
    for seed in range(60):
        options = small(seed)
        for keep in (0.5, 0.65, 0.8, 0.9):
            budget = keep * dense(options)
            if smallest(options) > budget:
                continue
            chosen = allocate(options, keep, "global")
            assert spent(chosen) <= budget
            # Both are sums of at most 4 losses; the search ends where 1e-12 of the loss is left to gain.
            assert loss(chosen) == pytest.approx(brute_force(options, budget), rel=2e-12)
            cases += 1
    assert cases > 150


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("layout", ["pair", "pivot"])
@pytest.mark.parametrize("allocation", WITHOUT_EVIDENCE)
def test_on_real_shapes_the_budget_is_met_to_a_thousandth(layout: str, allocation: str, keep: float) -> None:
    options = model(layout)
    chosen = allocate(options, keep, allocation)
    assert list(chosen) == list(options)
    assert keep - 0.001 <= spent(chosen) / dense(options) <= keep
    for name, choice in chosen.items():
        at = options[name].ranks.tolist().index(choice.rank)
        assert (choice.cost, choice.loss) == (int(options[name].costs[at]), float(options[name].losses[at]))


@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_the_global_choice_loses_less_than_the_uniform_one(layout: str) -> None:
    options = model(layout, blocks=6)
    for keep in (0.9, 0.8, 0.6, 0.4):
        assert loss(allocate(options, keep, "global")) < loss(allocate(options, keep, "uniform"))


@pytest.mark.parametrize("layout", ["pair", "pivot"])
@pytest.mark.parametrize("allocation", STEADY)
def test_a_larger_budget_never_loses_more(layout: str, allocation: str) -> None:
    options = model(layout, blocks=4)
    losses = [loss(allocate(options, 0.3 + 0.7 * i / 60, allocation)) for i in range(61)]
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-9)
    assert losses[-1] == 0


@pytest.mark.parametrize("layout", ["pair", "pivot"])
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.6, 0.4])
def test_uniform_gives_every_matrix_its_share_to_one_rank_step(layout: str, keep: float) -> None:
    options = model(layout, blocks=3)
    for name, choice in allocate(options, keep, "uniform").items():
        costs = options[name].costs.tolist()
        at = costs.index(choice.cost)
        below = costs[at - 1] if at else 0
        above = costs[at + 1] if at + 1 < len(costs) else choice.cost + 1
        share = keep * costs[-1]
        assert below <= share <= above, name


@pytest.mark.parametrize("allocation", WITHOUT_EVIDENCE)
@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_keeping_all_makes_everything_dense(layout: str, allocation: str) -> None:
    options = model(layout, blocks=2)
    assert all(choice.rank == 0 for choice in allocate(options, 1.0, allocation).values())


@pytest.mark.parametrize("allocation", WITHOUT_EVIDENCE)
def test_a_budget_below_the_smallest_ranks_names_what_is_possible(allocation: str) -> None:
    options = model("pivot", blocks=1)
    least = smallest(options) / dense(options)
    with pytest.raises(BudgetError, match=rf"keep at least {least:.4f}"):
        allocate(options, least * 0.999, allocation)
    chosen = allocate(options, least, allocation)
    assert spent(chosen) == smallest(options)


def test_the_advice_of_the_budget_error_can_be_followed() -> None:
    options = model("pivot", blocks=1)
    with pytest.raises(BudgetError) as caught:
        allocate(options, 1e-3, "global")
    advised = float(str(caught.value).split("keep at least ")[1].split(",")[0])
    allocate(options, advised, "global")


def test_an_unknown_allocation_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="there are: global, uniform"):
        allocate(model("pair", blocks=1), 0.8, "best")


@pytest.mark.parametrize("allocation", WITHOUT_EVIDENCE)
@pytest.mark.parametrize("energies", ["equal", "zero", "huge", "tiny"])
def test_spectra_without_a_preference_still_fill_the_budget(allocation: str, energies: str) -> None:
    value = {"equal": 1.0, "zero": 0.0, "huge": 1e200, "tiny": 1e-200}[energies]
    found = Spectrum(torch.full((64,), value, dtype=torch.float64))
    options = {str(i): rank_options((64, 64), found, "pivot", 8) for i in range(12)}
    for keep in (0.5, 0.8, 1.0):
        chosen = allocate(options, keep, allocation)
        largest_step = max(int((o.costs[1:] - o.costs[:-1]).max()) for o in options.values())
        assert keep * dense(options) - largest_step < spent(chosen) <= keep * dense(options)


@pytest.mark.parametrize("allocation", WITHOUT_EVIDENCE)
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.77, 0.95, 1.0])
def test_one_matrix_gets_the_largest_rank_that_fits(allocation: str, keep: float) -> None:
    options = {"x": rank_options((40, 56), random_spectrum(40, torch.Generator().manual_seed(0)), "pivot", 1)}
    chosen = allocate(options, keep, allocation)["x"]
    assert chosen.cost == max(cost for cost in options["x"].costs.tolist() if cost <= keep * 40 * 56)


def test_a_matrix_that_can_only_be_dense_takes_its_share_of_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    options = {
        "x": rank_options((40, 56), random_spectrum(40, generator), "pivot", 1),
        "y": rank_options((40, 56), random_spectrum(40, generator), "pivot", 64),
    }
    for allocation in WITHOUT_EVIDENCE:
        chosen = allocate(options, 0.8, allocation)
        assert chosen["y"].rank == 0
        assert 0.79 * dense(options) < spent(chosen) <= 0.8 * dense(options)
