# SPDX-License-Identifier: Apache-2.0
"""Published ways to share ranks out, each against its formula written out as a loop."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from eigenprune.errors import ConfigError
from eigenprune.spectral import ALLOCATIONS, Evidence, Options, Spectrum, rank_options, solve_allocation

SHAPES = {
    f"layers.{block}.{name}": shape for block in range(3) for name, shape in {"q": (24, 24), "up": (48, 24)}.items()
}
KEEPS = (0.8, 0.6, 0.45)
TOKENS = 4000


def energies(name: str) -> Tensor:
    seed = list(SHAPES).index(name)
    generator = torch.Generator().manual_seed(seed)
    power = 0.3 + 2 * float(torch.rand((), generator=generator))
    values = (1 + 9 * seed) * torch.arange(1, 25, dtype=torch.float64) ** -power
    return (values * (0.7 + torch.rand(24, generator=generator).double())).sort(descending=True).values


def options(layout: str = "pivot", multiple: int = 1) -> dict[str, Options]:
    return {name: rank_options(shape, Spectrum(energies(name)), layout, multiple) for name, shape in SHAPES.items()}


def changes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: energies(name) ** 0.5 * torch.randn(24, generator=generator).double() for name in SHAPES}


def evidence() -> Evidence:
    generator = torch.Generator().manual_seed(3)
    rand = {name: float(torch.rand((), generator=generator)) for name in SHAPES}
    probed = {name: {4: 0.5 + rand[name], 8: 0.3 * rand[name] + 0.1, 16: 0.05 * rand[name]} for name in SHAPES}
    return Evidence(
        TOKENS,
        fisher={name: 0.2 + value for name, value in rand.items()},
        influence={name: 0.05 + 0.3 * int(name.split(".")[1]) for name in SHAPES},
        changes=changes(),
        probed=probed,
    )


def dense() -> int:
    return sum(m * n for m, n in SHAPES.values())


def cost(shape: tuple[int, int], rank: int, layout: str) -> int:
    m, n = shape
    return min(m * n, rank * (m + n - rank) if layout == "pivot" else rank * (m + n))


def ranks(allocation: str, keep: float, layout: str = "pivot", multiple: int = 1) -> dict[str, int]:
    """Chosen ranks, the full one for dense."""
    found = solve_allocation(options(layout, multiple), keep, allocation, evidence())
    spent = sum(choice.cost for choice in found.choices.values())
    assert spent <= keep * dense()
    assert spent > keep * dense() - max(48 + 24, multiple * 72)
    return {name: choice.rank or 24 for name, choice in found.choices.items()}


def shares(found: dict[str, int]) -> dict[str, float]:
    return {name: cost(SHAPES[name], rank, "pivot") / math.prod(SHAPES[name]) for name, rank in found.items()}


def heap_loop(keep: float, layout: str, multiple: int, zero_sum: bool) -> dict[str, int]:
    """Literally: of all matrices' next steps, the one that the rule prefers, until the cost is within the budget."""
    at = dict.fromkeys(SHAPES, 24)
    running = 0.0
    while sum(cost(SHAPES[name], rank, layout) for name, rank in at.items()) > keep * dense():
        steps = []
        for name, rank in at.items():
            new = (rank - 1) // multiple * multiple
            if new >= multiple:
                steps.append((float(changes()[name][new:rank].sum()), name, new))
        rises, falls = [s for s in steps if s[0] >= 0], [s for s in steps if s[0] < 0]
        first, second = (rises, falls) if running <= 0 else (falls, rises)
        pool = (first or second) if zero_sum else steps
        change, name, new = min(pool, key=lambda step: abs(step[0]))
        running += change
        at[name] = new
    return at


@pytest.mark.parametrize("layout", ["pivot", "pair"])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("allocation", ["zero-sum", "least-change"])
def test_the_heaps_remove_what_the_loop_removes(allocation: str, keep: float, multiple: int, layout: str) -> None:
    found = solve_allocation(options(layout, multiple), keep, allocation, evidence()).choices
    wanted = heap_loop(keep, layout, multiple, allocation == "zero-sum")
    for name, choice in found.items():
        assert choice.cost == cost(SHAPES[name], wanted[name], layout)
        assert choice.rank in (wanted[name], 0)  # 0: the factors would be no smaller


@pytest.mark.parametrize("keep", KEEPS)
def test_energy_keeps_the_same_part_of_every_matrix(keep: float) -> None:
    found = ranks("energy", keep)
    kept = {name: float(energies(name)[:rank].sum() / energies(name).sum()) for name, rank in found.items()}
    below = {name: float(energies(name)[: rank - 1].sum() / energies(name).sum()) for name, rank in found.items()}
    # One threshold lies between what every matrix keeps and what it would keep with one component less; the fill adds
    # one component to some.
    assert max(sorted(below.values())[:3]) <= min(kept.values()) + 1e-12
    total = {t: sum(_least(name, t) for name in SHAPES) for t in kept.values()}
    threshold = max((t for t, spent in total.items() if spent <= keep * dense()), default=0.0)
    for name, rank in found.items():
        assert cost(SHAPES[name], rank, "pivot") >= _least(name, threshold)


def _least(name: str, threshold: float) -> int:
    """Cost of the least rank that keeps `threshold` of the energy."""
    part = energies(name).cumsum(0) / energies(name).sum()
    return cost(SHAPES[name], 1 + int((part < threshold - 1e-12).sum()), "pivot")


@pytest.mark.parametrize("keep", KEEPS)
def test_fisher_shares_are_in_proportion(keep: float) -> None:
    found, fisher = ranks("fisher", keep), evidence().fisher
    spent = {name: cost(SHAPES[name], rank, "pivot") for name, rank in found.items()}
    free = [name for name in SHAPES if found[name] < 24]
    rate = sum(spent[name] for name in free) / sum(fisher[name] for name in free)
    for name in free:
        assert abs(spent[name] - rate * fisher[name]) <= 2 * 72  # a rank step either way
    for name in set(SHAPES) - set(free):
        assert rate * fisher[name] >= math.prod(SHAPES[name]) - 2 * 72


FINE = 400  # options of the next tests: a step is a quarter of a percent


def fine_options() -> dict[str, Options]:
    found = {}
    for number, name in enumerate(SHAPES):
        lost = (1 + number) ** 3 * torch.linspace(1, 0, FINE + 1).double() ** (1 + number % 3)
        ranks, costs = torch.tensor([*range(1, FINE), 0]), torch.arange(1, FINE + 1)
        found[name] = Options(ranks, costs, lost[1:], float(lost[0]))
    return found


def fine_shares(allocation: str, keep: float) -> tuple[dict[str, float], dict[str, float]]:
    """The shares that an allocation gives, and the error of each matrix over all tokens at the uniform rank."""
    found = solve_allocation(fine_options(), keep, allocation, evidence()).choices
    assert keep * FINE * len(found) - 2 <= sum(choice.cost for choice in found.values()) <= keep * FINE * len(found)
    at = round(keep * FINE) - 1
    errors = {name: math.sqrt(2 * float(o.losses[at]) * TOKENS) for name, o in fine_options().items()}
    return {name: choice.cost / FINE for name, choice in found.items()}, errors


@pytest.mark.parametrize("keep", KEEPS)
def test_svd_llm_v2_removes_by_one_over_the_logarithm_of_the_error_within_a_type(keep: float) -> None:
    got, errors = fine_shares("svd-llm-v2", keep)
    assert min(errors.values()) > math.e**2
    for kind in ("q", "up"):
        names = [name for name in SHAPES if name.endswith(kind)]
        inverse = {name: 1 / math.log(errors[name]) for name in names}
        wanted = {name: 1 - len(names) * (1 - keep) * inverse[name] / sum(inverse.values()) for name in names}
        assert max(wanted.values()) - min(wanted.values()) > 0.03
        for name in names:
            assert wanted[name] > keep / 2  # else the guard acts
            assert got[name] == pytest.approx(wanted[name], abs=2 / FINE)  # rounded down, then filled by a step


def test_svd_llm_v2_never_goes_below_half_of_the_uniform_share() -> None:
    options = fine_options()
    for number, name in enumerate(options):  # one matrix with far smaller errors than its kind
        scale = 1e-8 if number == 0 else 1e12
        options[name] = dataclasses.replace(options[name], losses=options[name].losses * scale)
    found = solve_allocation(options, 0.3, "svd-llm-v2", evidence()).choices
    least = min(choice.cost for choice in found.values()) / FINE
    assert 0.15 - 1 / FINE <= least < 0.16  # half of 0.3, to a step


@pytest.mark.parametrize("keep", KEEPS)
def test_swift_gives_half_of_the_uniform_share_and_the_rest_by_its_score(keep: float) -> None:
    got, errors = fine_shares("swift", keep)
    score = {}
    for name in SHAPES:
        importance = 1 + int(name.split(".")[1]) / 2  # the influences stretched to [1, 2]
        score[name] = importance**0.5 * math.log(math.e + errors[name]) ** 0.5
    wanted = {name: keep * (0.5 + 0.5 * score[name] * len(score) / sum(score.values())) for name in SHAPES}
    assert max(wanted.values()) < 1
    assert max(wanted.values()) - min(wanted.values()) > 0.1
    for name in SHAPES:
        assert got[name] == pytest.approx(wanted[name], abs=2 / FINE)


@pytest.mark.parametrize("keep", [0.75, 0.6])
def test_asvd_cuts_all_matrices_at_one_measured_loss(keep: float) -> None:
    probed = evidence().probed
    found = solve_allocation(options(), keep, "asvd-search", evidence()).choices
    every = sorted(loss for table in probed.values() for loss in table.values())
    best = None
    for cut in every:  # the lowest cut that meets the budget
        at = {n: min((r for r, loss in table.items() if loss <= cut), default=24) for n, table in probed.items()}
        if sum(cost(SHAPES[n], r, "pivot") for n, r in at.items()) <= keep * dense():
            best = at
            break
    assert best is not None
    for name, choice in found.items():
        assert (choice.rank or 24) >= best[name]  # what is left of the budget is filled
    assert sum(c.cost for c in found.values()) <= keep * dense()


@pytest.mark.parametrize("keep", KEEPS)
def test_lems_minimises_the_measured_kl_spread_by_the_spectrum(keep: float) -> None:
    names = list(SHAPES)[:3]  # few enough to try everything
    chosen = {name: options(multiple=4)[name] for name in names}
    found = solve_allocation(chosen, keep, "lems", evidence()).choices
    budget = keep * sum(math.prod(SHAPES[name]) for name in names)

    def price(name: str, rank: int) -> float:
        if rank == 0:
            return 0.0
        energy = energies(name)
        kl = evidence().probed[name][4]
        return kl * float(energy[rank:].sum() / energy.sum()) / float(energy[4:].sum() / energy.sum())

    tables = [list(zip(chosen[n].ranks.tolist(), chosen[n].costs.tolist(), strict=True)) for n in names]
    best = min(
        sum(price(n, rank) for n, (rank, _) in zip(names, pick, strict=True))
        for pick in itertools.product(*tables)
        if sum(c for _, c in pick) <= budget
    )
    assert sum(price(name, choice.rank) for name, choice in found.items()) == pytest.approx(best, rel=1e-9)


def test_what_was_not_measured_is_asked_for_by_name() -> None:
    for name, row in ALLOCATIONS.items():
        if row.needs:
            with pytest.raises(ConfigError, match=r"needs .* of every matrix, and layers\.0\.q has none"):
                solve_allocation(options(), 0.7, name)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_min_keep_holds_for_every_matrix(allocation: str, layout: str) -> None:
    limited = {
        name: rank_options(shape, Spectrum(energies(name)), layout, 1, min_keep=0.5) for name, shape in SHAPES.items()
    }
    found = solve_allocation(limited, 0.7, allocation, evidence())
    assert sum(choice.cost for choice in found.choices.values()) <= 0.7 * dense()
    for name, choice in found.choices.items():
        assert choice.cost >= 0.5 * math.prod(SHAPES[name])
