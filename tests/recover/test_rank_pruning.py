# SPDX-License-Identifier: Apache-2.0
"""One truncation: ranks by energy or budget, and the proximal step, against a float64 SVD written out."""

import pytest
import torch
from torch import Tensor, nn

from eigenprune.errors import ConfigError
from eigenprune.layers import factored_parameters
from eigenprune.recover import RankTarget
from eigenprune.recover.rank_pruning import choose_ranks, low_rank_factors
from eigenprune.spectral import Metric

OUT, IN = 40, 24
# Both go through eigenvalues of a Gram in float64: squaring leaves half of its 16 digits to the small singular values.
EXACT = 1e-7


def weight(decay: float = 0.8, seed: int = 0) -> Tensor:
    """[OUT, IN] float64 with singular values decay^i."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(OUT, IN, dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64, generator=generator))
    return u @ torch.diag(decay ** torch.arange(IN, dtype=torch.float64)) @ v.t()


def linear(values: Tensor) -> nn.Linear:
    module = nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=values.dtype)
    module.weight.data = values
    return module


def plain(_name: str) -> Metric:
    return Metric()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shrink", [0.0, 0.05, 10.0])
def test_factors_are_the_truncated_svd_with_shrunk_values(turned: bool, shrink: float) -> None:
    values = weight().t() if turned else weight()
    u, s, vh = torch.linalg.svd(values, full_matrices=False)
    wanted = u[:, :9] @ torch.diag((s[:9] - shrink).clamp_min(0)) @ vh[:9]
    left, right = low_rank_factors(values, Metric(), 9, shrink)
    assert float((left @ right - wanted).abs().max()) <= EXACT


def test_shrinking_is_many_small_subgradient_steps() -> None:
    """The claim of the docstring, with the steps taken one by one: W - t U V^T, U and V of the truncated SVD."""
    values, steps, length = weight(), 50, 1e-3
    u, s, vh = torch.linalg.svd(values, full_matrices=False)
    now = u[:, :9] @ torch.diag(s[:9]) @ vh[:9]
    for _ in range(steps):
        u, _, vh = torch.linalg.svd(now, full_matrices=False)
        now = now - length * u[:, :9] @ vh[:9]
    left, right = low_rank_factors(values, Metric(), 9, steps * length)
    assert float((left @ right - now).abs().max()) <= EXACT


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("multiple", [1, 4])
def test_energy_gives_the_least_multiple_that_keeps_it(energy: float, multiple: int) -> None:
    kept = torch.linalg.svdvals(weight()).square().cumsum(0)
    needed = 1 + int((kept < energy * kept[-1]).sum())
    target = RankTarget(energy=energy, rank_multiple=multiple)
    assert choose_ranks({"a": linear(weight())}, target, 1.0, plain) == {"a": -(-needed // multiple) * multiple}


def test_a_layer_whose_energy_needs_full_rank_stays_dense() -> None:
    flat = linear(weight(decay=1.0))
    assert choose_ranks({"a": flat}, RankTarget(energy=0.99), 1.0, plain) == {"a": 0}
    # A pair stops paying at OUT x IN / (OUT + IN) = 15, which a pivoted layer does not.
    half = {layout: RankTarget(energy=0.6, layout=layout, rank_multiple=1) for layout in ("pair", "pivot")}
    assert choose_ranks({"a": flat}, half["pair"], 1.0, plain) == {"a": 0}
    assert choose_ranks({"a": flat}, half["pivot"], 1.0, plain) == {"a": 15}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_budget_is_kept(allocation: str, keep: float) -> None:
    layers = {"a": linear(weight(0.7)), "b": linear(weight(0.95, seed=1))}
    target = RankTarget(keep=keep, allocation=allocation, rank_multiple=1)
    ranks = choose_ranks(layers, target, keep, plain)
    spent = sum(factored_parameters(rank, OUT, IN, "pivot") if rank else OUT * IN for rank in ranks.values())
    assert 0.9 * keep <= spent / (2 * OUT * IN) <= keep
    if allocation == "global":  # to the weight whose components fade slowly
        assert ranks["a"] < (ranks["b"] or IN)
    else:
        assert abs(ranks["a"] - ranks["b"]) <= 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "not both"),
        ({"keep": 0.5, "energy": 0.9}, "not both"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"energy": 1.0}, "energy=1.0"),
        ({"keep": 0.5, "allocation": "magic"}, "global"),
        ({"keep": 0.5, "layout": "magic"}, "pivot"),
        ({"keep": 0.5, "rank_multiple": 0}, "rank_multiple"),
    ],
)
def test_impossible_targets_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RankTarget(**settings)
