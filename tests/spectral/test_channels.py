# SPDX-License-Identifier: Apache-2.0
"""Removal of hidden channels against its formulas, and the joint choice against all that there is to choose."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eigenprune.calibrate import ChannelGroup, Statistics
from eigenprune.calibrate.statistics import Facts
from eigenprune.spectral import channel_plans, components, find_method, joint_options, reduced_weights
from eigenprune.spectral import channels as channels_module
from eigenprune.spectral.channels import ChannelPlan, kept_counts, remove_channels
from eigenprune.spectral.decompose import Spectrum
from eigenprune.spectral.worth import parameter_cost

OUT, CHANNELS, IN, TOKENS = 12, 40, 14, 400
GROUP = ChannelGroup(("gate", "up"), "down")
EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(width: int, seed: int) -> Tensor:
    rows = normal(TOKENS, width, seed=seed) @ (normal(width, width, seed=seed + 1) / width**0.5 + torch.eye(width))
    return rows.t() @ rows / TOKENS


def literal_loss(weight: Tensor, other: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    """1/2 tr(F (W - W') C (W - W')^T)."""
    error = weight - other
    return 0.5 * float((outputs @ error @ inputs).mul(error).sum())


def compensated(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """The columns `kept` of the least squares solution of W' x[kept] = W x, and zeros: [m, n]."""
    found = torch.zeros_like(weight)
    found[:, kept] = weight @ inputs[:, kept] @ torch.linalg.inv(inputs[kept][:, kept])
    return found


def test_loss_of_a_removal_is_that_of_the_best_weights_on_the_channels_that_stay() -> None:
    weight, inputs, outputs = normal(OUT, CHANNELS, seed=1), gram(CHANNELS, 2), gram(OUT, 4)
    found = remove_channels(weight, inputs, outputs, [40, 37, 20, 9])
    assert found[0][1] == 0
    assert found[0][0].tolist() == list(range(CHANNELS))
    losses = [loss for _, loss in found]
    assert losses == sorted(losses)
    for (kept, loss), (fewer, _) in itertools.pairwise(found):
        assert set(fewer.tolist()) < set(kept.tolist())
        best = compensated(weight, inputs, kept)
        # A chain of Schur complements: each loses the condition of C, below 1e3 here, in float64.
        assert loss == pytest.approx(literal_loss(weight, best, inputs, outputs), rel=1e4 * EPS * CHANNELS, abs=1e-12)
        nudged = best.clone()
        nudged[:, kept] += 1e-3 * normal(OUT, len(kept), seed=9)
        assert literal_loss(weight, nudged, inputs, outputs) > literal_loss(weight, best, inputs, outputs)


def test_one_channel_less_is_the_cheapest_one() -> None:
    weight, inputs, outputs = normal(OUT, CHANNELS, seed=11), gram(CHANNELS, 12), gram(OUT, 14)
    ((kept, loss),) = remove_channels(weight, inputs, outputs, [CHANNELS - 1])
    each = {}
    for gone in range(CHANNELS):
        others = torch.tensor([i for i in range(CHANNELS) if i != gone])
        each[gone] = literal_loss(weight, compensated(weight, inputs, others), inputs, outputs)
    assert set(range(CHANNELS)) - set(kept.tolist()) == {min(each, key=each.__getitem__)}
    assert loss == pytest.approx(min(each.values()), rel=1e-10)


def test_removal_in_blocks_is_close_to_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, outputs = normal(OUT, CHANNELS, seed=21), gram(CHANNELS, 22), gram(OUT, 24)
    ((_, blocks),) = remove_channels(weight, inputs, outputs, [10])
    monkeypatch.setattr(channels_module, "REMOVED_AT_ONCE", 1)
    ((_, single),) = remove_channels(weight, inputs, outputs, [10])
    longest = weight.norm(dim=0).argsort(descending=True)[:10]
    assert single <= blocks < literal_loss(weight, compensated(weight, inputs, longest), inputs, outputs)


@pytest.fixture
def group() -> tuple[dict[str, nn.Module], Statistics]:
    layers = {"gate": (CHANNELS, IN), "up": (CHANNELS, IN), "down": (OUT, CHANNELS)}
    modules: dict[str, nn.Module] = {}
    tensors = {"input_gram.gate/0": gram(IN, 31).float(), "input_gram.down/0": gram(CHANNELS, 33).float()}
    for seed, (name, (m, n)) in enumerate(layers.items()):
        modules[name] = nn.Linear(n, m, bias=False)
        modules[name].weight = nn.Parameter(normal(m, n, seed=40 + seed).float())
        tensors[f"output_gram.{name}/0"] = gram(m, 50 + 2 * seed).float()
    facts = Facts(100_000, 75_000, 1, TOKENS, "next-token", "float32", "")
    return modules, Statistics(tensors, {"gate": "gate", "up": "gate", "down": "down"}, facts)


def test_removal_and_truncation_of_the_consumer_add_up(group: tuple[dict[str, nn.Module], Statistics]) -> None:
    modules, statistics = group
    method = find_method("kfac-channels")
    plans = channel_plans(GROUP, modules, method, statistics, 8)
    assert [len(plan.kept) for plan in plans] == kept_counts(CHANNELS, 8)
    weight = modules["down"].weight.detach().double()
    shrunk = channels_module._Grams(GROUP, modules, method, statistics)
    for plan in plans[1:]:
        reduced, metric = reduced_weights(GROUP, modules, method, statistics, plan.kept)["down"]
        for rank in (3, 8):
            found = components(reduced, metric, rank)
            whole = torch.zeros_like(weight)
            whole[:, plan.kept] = found.left @ found.right
            loss = literal_loss(weight, whole, shrunk.inputs, shrunk.outputs["down"])
            estimate = plan.loss + 0.5 * float(plan.spectra[-1].tail()[rank])
            assert loss == pytest.approx(estimate, rel=1e-9)


def test_what_stays_of_a_producer_is_its_rows(group: tuple[dict[str, nn.Module], Statistics]) -> None:
    modules, statistics = group
    method = find_method("kfac-channels")
    plan = channel_plans(GROUP, modules, method, statistics, 8)[2]
    for number, name in enumerate(GROUP.producers):
        reduced, metric = reduced_weights(GROUP, modules, method, statistics, plan.kept)[name]
        assert torch.equal(reduced, modules[name].weight.detach().double()[plan.kept])
        found = components(reduced, metric, 5)
        inner, outer = metric.inner.matrix, metric.output.matrix
        assert inner is not None
        assert outer is not None
        error = outer.t() @ (reduced - found.left @ found.right) @ inner
        assert float(error.square().sum()) == pytest.approx(float(plan.spectra[number].tail()[5]), rel=1e-9)


def test_plans_come_back_from_disk_and_damage_is_measured_anew(
    group: tuple[dict[str, nn.Module], Statistics], tmp_path: Path
) -> None:
    modules, statistics = group
    method = find_method("kfac-channels")

    def plans() -> list[ChannelPlan]:
        return channel_plans(GROUP, modules, method, statistics, 8, tmp_path)

    first = plans()
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    assert [(plan.kept.tolist(), plan.loss) for plan in plans()] == [(plan.kept.tolist(), plan.loss) for plan in first]
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:-100])
    assert [plan.loss for plan in plans()] == [plan.loss for plan in first]
    assert file.stat().st_mtime_ns != stamp


def random_plans(seed: int) -> list[ChannelPlan]:
    generator = torch.Generator().manual_seed(seed)
    plans = []
    for number, count in enumerate([16, 8]):
        spectra = tuple(
            Spectrum(torch.rand(min(count, 12), generator=generator).double().sort(descending=True).values)
            for _ in range(3)
        )
        plans.append(ChannelPlan(torch.arange(count), float(number) * 0.3, spectra))
    return plans


SHAPES = {"gate": (16, 12), "up": (16, 12), "down": (12, 16)}


@pytest.mark.parametrize("seed", range(4))
def test_joint_options_are_the_best_there_is_at_every_price(seed: int) -> None:
    joint = joint_options(
        random_plans(seed), SHAPES, "pivot", 4, cost_of=lambda _name, shape: parameter_cost(shape, "pivot")
    )
    everything = [
        (
            sum(int(options.costs[i]) for options, i in zip(own, columns, strict=True)),
            plan.loss + sum(float(options.losses[i]) for options, i in zip(own, columns, strict=True)),
        )
        for plan, own in zip(joint.plans, joint.own, strict=True)
        for columns in itertools.product(*(range(len(options.ranks)) for options in own))
    ]
    costs, losses = joint.options.costs.tolist(), joint.options.losses.tolist()
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)
    assert (costs[-1], losses[-1], int(joint.options.ranks[-1])) == (3 * 16 * 12, 0.0, 0)
    for price in (1e-4, 1e-3, 3e-3, 1e-2, 3e-2):
        best = min(loss + price * cost for cost, loss in everything)
        found = min(loss + price * cost for cost, loss in zip(costs, losses, strict=True))
        assert found == pytest.approx(best, rel=0.01)  # prices lie 4 % apart


def test_choices_add_up_to_the_option() -> None:
    joint = joint_options(
        random_plans(9), SHAPES, "pivot", 4, cost_of=lambda _name, shape: parameter_cost(shape, "pivot")
    )
    for number, cost, loss in zip(joint.options.ranks, joint.options.costs, joint.options.losses, strict=True):
        choices, kept = joint.choices(int(number))
        assert sum(choice.cost for choice in choices) == int(cost)
        assert sum(choice.loss for choice in choices) == pytest.approx(float(loss), rel=1e-12, abs=1e-15)
        assert kept is None or len(kept) == 8
    assert any(joint.choices(int(number))[1] is not None for number in joint.options.ranks)


def test_min_keep_leaves_out_plans_with_too_little() -> None:
    joint = joint_options(
        random_plans(9),
        SHAPES,
        "pivot",
        4,
        cost_of=lambda _name, shape: parameter_cost(shape, "pivot"),
        min_keep=0.6,
    )
    for number in joint.options.ranks.tolist():
        choices, kept = joint.choices(number)
        assert kept is None
        assert all(choice.cost >= 0.6 * 16 * 12 for choice in choices)
