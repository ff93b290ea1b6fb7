# SPDX-License-Identifier: Apache-2.0
"""Every rule against a few literal lines on tiny tensors, and the parts that rules are made of."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from eigenprune.calibrate import EntryStatistics
from eigenprune.entries import RULES, select_entries
from eigenprune.entries.brain_surgeon import best_swaps
from eigenprune.entries.budget import Threshold, highest_of_all, highest_of_rows
from eigenprune.entries.pq_index import pq_index, shares_by_index
from tests.entries.test_ken import oracle

KEEP = 0.4
NAMES = ("x.weight", "y.weight")


def problem() -> tuple[dict[str, Tensor], dict[str, Tensor], EntryStatistics, EntryStatistics]:
    generator = torch.Generator().manual_seed(3)

    def tensors() -> dict[str, Tensor]:
        return {name: torch.randn(5, 6, generator=generator) for name in NAMES}

    def statistics() -> EntryStatistics:
        inputs = torch.randn(40, 6, generator=generator) * torch.arange(1, 7)
        gram = {"x.weight": inputs.t() @ inputs / 40}
        square = {"x.weight": gram["x.weight"].diagonal().clone()}
        gradient = tensors()
        return EntryStatistics(
            gradient, {n: 2 * g.square() + 0.1 for n, g in gradient.items()}, square, gram, frozenset(), 40
        )

    base = tensors()
    return (
        base,
        {n: w + 0.3 * torch.randn(5, 6, generator=generator) for n, w in base.items()},
        statistics(),
        statistics(),
    )


def best(scores: dict[tuple, float], count: int) -> set[tuple]:
    return set(sorted(scores, key=lambda place: (-scores[place], place))[:count])


def literal(rule: str) -> set[tuple]:
    """The (tensor, row, column) that are kept, by the formula of each rule."""
    base, tuned, domain, general = problem()
    places = list(itertools.product(NAMES, range(5), range(6)))

    def value(tensors: object, place: tuple) -> float:
        name, i, j = place
        return float(tensors[name][i, j])  # type: ignore[index]

    def taylor(statistics: EntryStatistics, place: tuple) -> float:
        d = value(tuned, place) - value(base, place)
        return abs(value(statistics.gradient, place) * d) + value(statistics.squared_gradient, place) * d * d / 2

    formulas = {
        "magnitude": lambda p: abs(value(tuned, p)),
        "delta": lambda p: abs(value(tuned, p) - value(base, p)),
        "delta-fisher": lambda p: (value(tuned, p) - value(base, p)) ** 2 * value(domain.squared_gradient, p),
        "d-pruner": lambda p: taylor(domain, p) + taylor(general, p),
        "wanda": lambda p: (
            abs(value(tuned, p))
            * (math.sqrt(float(domain.input_square["x.weight"][p[2]])) if p[0] == "x.weight" else 1)
        ),
    }
    scores = {place: formulas[rule](place) for place in places}
    if RULES[rule].scope == "global":
        return best(scores, round(KEEP * len(places)))
    rows = itertools.product(NAMES, range(5))
    return set().union(*(best({p: s for p, s in scores.items() if p[:2] == row}, 2) for row in rows))


def chosen(rule: str, **settings: object) -> set[tuple]:
    base, tuned, domain, general = problem()
    masks = select_entries(base, tuned, rule, KEEP, statistics=domain, general=general, **settings)  # type: ignore[arg-type]
    return {(name, int(i), int(j)) for name in masks for i, j in masks[name].nonzero()}


@pytest.mark.parametrize("rule", ["magnitude", "delta", "delta-fisher", "d-pruner", "wanda"])
def test_rule_equals_its_formula_written_out(rule: str) -> None:
    assert chosen(rule) == literal(rule)


@pytest.mark.parametrize("rule", ["ken", "ken-fast"])
def test_ken_in_the_table_is_the_oracle_on_the_tuned_rows(rule: str) -> None:
    _, tuned, _, _ = problem()
    expected = {
        (name, i, j)
        for name in NAMES
        for i in range(5)
        for j, kept in enumerate(oracle(tuned[name][i].tolist(), 2))
        if kept
    }
    assert chosen(rule) == expected


def test_random_differs_by_seed_and_is_the_same_for_one() -> None:
    assert chosen("random", seed=1) == chosen("random", seed=1)
    assert chosen("random", seed=1) != chosen("random", seed=2)


def test_sap_keeps_less_of_a_tensor_with_a_higher_index() -> None:
    _, tuned, _, _ = problem()
    tuned["x.weight"] = tuned["x.weight"] ** 3  # few large ones
    index = {}
    for name, w in tuned.items():
        values = w.double().abs().flatten().tolist()
        index[name] = 1 - sum(v**0.5 for v in values) ** 2 / sum(values) / len(values)
        assert pq_index(iter(w.split(2))) == pytest.approx(index[name], rel=1e-5)
    masks = select_entries({}, tuned, "sap", KEEP, reset="zero")
    counts = {name: int(masks[name].sum()) for name in NAMES}
    gamma = (60 - 24) / (30 * sum(index.values()))
    assert sum(counts.values()) == 24
    for name, w in tuned.items():
        assert abs(counts[name] - 30 * (1 - gamma * index[name])) <= 1
        kept = w.abs()[masks[name]]
        assert kept.min() >= w.abs()[~masks[name]].max()
    assert pq_index([torch.ones(7)]) == pytest.approx(0, abs=1e-6)
    assert pq_index([torch.zeros(7)]) == 0


def test_shares_by_index_meet_every_budget() -> None:
    sizes = {"a": 100, "b": 1000, "c": 3}
    for keep in (0.0, 0.01, 0.05, 0.3, 0.77, 1.0):
        counts = shares_by_index(sizes, {"a": 0.0, "b": 0.2, "c": 0.5}, keep)
        assert sum(counts.values()) == math.floor(keep * 1103 + 0.5)
        assert all(0 <= counts[name] <= size for name, size in sizes.items())


def loss(change: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    gone = change * ~kept
    return ((gone @ gram) * gone).sum(1)


def test_brain_surgeon_leaves_no_swap_that_helps_and_never_makes_it_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 9, generator=generator, dtype=torch.float64) + 2 * torch.randn(12, 1, generator=generator)
    change, gram = torch.randn(20, 9, generator=generator, dtype=torch.float64), inputs.t() @ inputs
    kept = best_swaps(change, gram, 4, block=18)
    start = highest_of_rows(change.square() * gram.diagonal(), 4)
    found = loss(change, gram, kept)
    assert (found <= loss(change, gram, start)).all()
    assert (found < 0.9 * loss(change, gram, start)).any(), "there was something to gain"
    assert (kept.sum(1) == 4).all()
    for row, i, j in itertools.product(range(20), range(9), range(9)):
        if not kept[row, i] and kept[row, j]:
            other = kept[row].clone()
            other[i], other[j] = True, False
            assert loss(change[row, None], gram, other[None]) >= found[row] * (1 - 1e-9)


def test_brain_surgeon_in_the_table_swaps_with_the_input_gram() -> None:
    base, tuned, domain, _ = problem()
    change = {name: (tuned[name] - base[name]).double() for name in NAMES}
    expected = best_swaps(change["x.weight"], domain.input_gram["x.weight"].double(), 2)
    assert {p for p in chosen("icbs") if p[0] == "x.weight"} == {
        ("x.weight", int(i), int(j)) for i, j in expected.nonzero()
    }
    by_size = highest_of_rows(change["y.weight"].abs(), 2)
    assert {p[1:] for p in chosen("icbs") if p[0] == "y.weight"} == {(int(i), int(j)) for i, j in by_size.nonzero()}


def test_a_weight_stored_sideways_is_chosen_as_its_transpose() -> None:
    base, tuned, domain, _ = problem()
    sideways = EntryStatistics(
        domain.gradient, domain.squared_gradient, domain.input_square, domain.input_gram, frozenset({"x.weight"}), 40
    )
    turned = [
        {"x.weight": model["x.weight"].t().contiguous(), "y.weight": model["y.weight"]} for model in (base, tuned)
    ]
    for rule in ("wanda", "icbs"):
        plain = select_entries(base, tuned, rule, KEEP, statistics=domain)
        other = select_entries(*turned, rule, KEEP, statistics=sideways)
        assert torch.equal(plain["x.weight"], other["x.weight"].t())
        assert torch.equal(plain["y.weight"], other["y.weight"])


def test_streamed_threshold_equals_a_sort_of_all_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        "many ties": torch.randint(0, 4, (50, 7), generator=generator).float(),
        "zeros": torch.zeros(11),
        "spread": torch.randn(40, 9, generator=generator).exp() ** 8,
        "tiny": torch.rand(13, generator=generator) * 1e-42,
    }
    flat = torch.cat([tensor.flatten() for tensor in scores.values()])
    order = flat.sort(descending=True, stable=True).indices
    for count in (0, 1, 5, 200, 340, 500, len(flat) - 3, len(flat)):
        threshold = Threshold(scores, lambda name: scores[name].reshape(-1, 1).split(17), count)
        found = torch.cat([threshold.mask(name, scores[name].numel()) for name in scores])
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(found, expected), count


def test_least_shares_are_met_tensor_by_tensor_and_the_sum_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {f"t{i}": torch.rand(40, generator=generator) * 10**-i for i in range(5)}
    kept: dict[str, Tensor] = {}
    highest_of_all(dict.fromkeys(scores, 40), lambda name: [scores[name]], 0.5, 0.2, kept.__setitem__)
    counts = [int(kept[name].sum()) for name in scores]
    assert sum(counts) == 100
    assert min(counts) == 8
    for name, mask in kept.items():
        assert not mask.any() or mask.all() or scores[name][mask].min() >= scores[name][~mask].max()
