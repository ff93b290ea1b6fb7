# SPDX-License-Identifier: Apache-2.0
"""Adding a low-rank change to a factored layer, and cutting the rank back, against dense float64 products."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from eigenprune import EigenpruneConfig, collect_statistics, prune_
from eigenprune.errors import CalibrationError, ConfigError, WeightError
from eigenprune.integrations.merging import (
    Delta,
    full_factors,
    merged_layer,
    merged_layout,
    principal_split,
    set_factors_,
    truncate_merged_,
)
from eigenprune.layers import LAYOUTS, LowRankLinear, factored_parameters, low_rank_layers, select_layers
from eigenprune.spectral import pivot_factors
from tests.helpers.pruned import picture, pruned_by
from tests.helpers.tiny_models import logits, tiny_model, token_windows

OUT, IN, RANK, ADDED = 24, 18, 7, 3
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(layout: str, dtype: torch.dtype = torch.float32, conv1d: bool = False, rank: int = RANK) -> LowRankLinear:
    left, right, pivots = random(OUT, rank), random(rank, IN, seed=1), None
    if layout == "pivot":
        left, right, pivots = pivot_factors(left, right)
    return LowRankLinear.from_factors(
        left.to(dtype), right.to(dtype), pivots=pivots, bias=random(OUT, seed=2).to(dtype), conv1d=conv1d
    )


def delta(seed: int = 5, rank: int = ADDED, **more: Tensor) -> Delta:
    return Delta.of(random(OUT, rank, seed=seed), random(rank, IN, seed=seed + 1), **more)


def weight_of(module: nn.Module) -> Tensor:
    """[out, in] float64, from the factors as they are stored."""
    if isinstance(module, LowRankLinear):
        left, right = module.left.weight.detach().double(), module.right.weight.detach().double()
        rows = torch.cat([right, left @ right])
        return left @ right if module.layout == "pair" else rows.index_select(0, module.row_positions())
    weight = module.weight.detach().double()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def changed(weight: Tensor, *deltas: Delta) -> Tensor:
    for one in deltas:
        weight = weight + one.left @ one.right
        weight = weight if one.scale is None else torch.diag(one.scale) @ weight
    return weight


def rounding(dtype: torch.dtype, rank: int) -> float:
    """Two factors rounded once each, entries below 10; a product sums `rank` of them."""
    return 2 * rank * torch.finfo(dtype).eps / 2 * 10 * 10


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_merged_weight_is_the_sum_rounded_once(layout: str, dtype: torch.dtype, scaled: bool, conv1d: bool) -> None:
    base = layer(layout, dtype, conv1d)
    first = delta(scale=random(OUT, seed=9).abs() + 0.5 if scaled else None)
    second = delta(seed=20, rank=2, bias=random(OUT, seed=10))
    before = weight_of(base)
    merged = merged_layer(base, [first, second])
    wanted = changed(before, first, second)
    rank = RANK + ADDED + 2
    assert float((weight_of(merged) - wanted).abs().max()) <= rounding(dtype, rank)
    assert (merged.layout, merged.rank, merged.conv1d) == ("pivot", rank, conv1d)  # 12 (24 + 18) > 24 x 18
    assert merged.right.weight.dtype == dtype
    assert torch.equal(merged.bias, (base.bias.double() + second.bias).to(dtype))
    x = random(5, IN, seed=30)
    wanted_output = x @ wanted.t() + merged.bias.double()
    assert torch.allclose(merged.double()(x), wanted_output, rtol=0, atol=IN * 5 * rounding(dtype, rank))  # |x| < 5
    assert torch.equal(weight_of(base), before)


def test_pair_keeps_its_old_columns_and_rows_bit_for_bit() -> None:
    base, added = layer("pair", torch.bfloat16), delta(rank=2)
    merged = merged_layer(base, [added])
    assert (merged.layout, merged.rank) == ("pair", RANK + 2)
    assert torch.equal(merged.left.weight[:, :RANK], base.left.weight)
    assert torch.equal(merged.right.weight[:RANK], base.right.weight)
    assert torch.equal(merged.left.weight[:, RANK:], added.left.bfloat16())
    assert torch.equal(merged.right.weight[RANK:], added.right.bfloat16())


@both_layouts
def test_merged_layer_never_takes_more_numbers_than_dense(layout: str) -> None:
    for rank in range(1, 30):
        stored = merged_layout(rank, OUT, IN, layout)
        size = OUT * IN if stored == "dense" else factored_parameters(rank, OUT, IN, stored)
        assert size <= OUT * IN
        assert (stored == "dense") == (rank >= IN)
        if stored != "dense" and layout == "pair":
            assert (stored == "pair") == (rank * (OUT + IN) < OUT * IN)


@both_layouts
@pytest.mark.parametrize("conv1d", [False, True])
def test_full_rank_becomes_dense_and_is_cut_back_to_the_old_layout_and_rank(layout: str, conv1d: bool) -> None:
    base, added = layer(layout, conv1d=conv1d), delta(rank=IN - RANK)
    model = nn.Sequential(merged_layer(base, [added]))
    assert type(model[0]).__name__ == ("Conv1D" if conv1d else "Linear")
    wanted = changed(weight_of(base), added)
    assert float((weight_of(model[0]) - wanted).abs().max()) <= rounding(torch.float32, IN)
    assert model[0].bias is base.bias
    truncate_merged_(model)
    assert isinstance(model[0], LowRankLinear)
    assert (model[0].layout, model[0].rank, model[0].conv1d) == (layout, RANK, conv1d)
    u, s, vh = torch.linalg.svd(wanted)
    best = u[:, :RANK] @ torch.diag(s[:RANK]) @ vh[:RANK]
    assert float((weight_of(model[0]) - best).abs().max()) <= 10 * rounding(torch.float32, IN)


@both_layouts
def test_a_change_of_nothing_changes_nothing(layout: str) -> None:
    base = layer(layout)
    idle = Delta.of(torch.zeros(OUT, ADDED), random(ADDED, IN))
    merged = merged_layer(base, [idle])
    assert torch.equal(merged.left.weight, base.left.weight)
    assert torch.equal(merged.right.weight, base.right.weight)
    assert merged.rank == RANK
    partly = Delta.of(torch.cat([torch.zeros(OUT, 1), random(OUT, 1)], 1), random(2, IN))
    assert merged_layer(base, [partly]).rank == RANK + 1


def test_small_adapters_survive_float16() -> None:
    """B of 1e-6 beside A of 1 is below the smallest float16 that has all its bits; balanced, both are 1e-3."""
    added = Delta.of(random(OUT, 2) * 1e-6, random(2, IN))
    merged = merged_layer(layer("pair", torch.float16), [added])
    got = merged.left.weight[:, RANK:].detach().double() @ merged.right.weight[RANK:].detach().double()
    wanted = added.left @ added.right
    assert float((got - wanted).norm() / wanted.norm()) <= 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_is_refused(bad: float) -> None:
    broken = random(ADDED, IN)
    broken[1, 2] = bad
    with pytest.raises(WeightError, match="NaN or infinity"):
        merged_layer(layer("pivot"), [Delta.of(random(OUT, ADDED), broken)])


def test_a_bias_for_a_layer_that_has_none_is_refused() -> None:
    base = layer("pair")
    base.bias = None
    with pytest.raises(ConfigError, match="bias"):
        merged_layer(base, [delta(bias=random(OUT))])


@both_layouts
def test_gradient_flags_and_mode_are_kept(layout: str) -> None:
    base = layer(layout).eval()
    base.requires_grad_(False)
    base.bias.requires_grad_(True)
    merged = merged_layer(base, [delta()])
    assert {name: p.requires_grad for name, p in merged.named_parameters()} == {
        "bias": True,
        "left.weight": False,
        "right.weight": False,
    }
    assert not merged.training
    assert merged.bias is base.bias


@both_layouts
def test_principal_split_is_the_singular_value_decomposition(layout: str) -> None:
    base = layer(layout, torch.float64)
    left, right, other_left, other_right = principal_split(base, 3)
    u, s, vh = torch.linalg.svd(weight_of(base))
    best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    assert float((left @ right - best).abs().max()) <= 1e-12
    assert float((other_left @ other_right - (weight_of(base) - best)).abs().max()) <= 1e-12
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1))
    set_factors_(base, other_left, other_right)
    assert (base.rank, base.layout) == (RANK - 3, layout)
    assert float((weight_of(base) - (other_left @ other_right)).abs().max()) <= 1e-12
    fresh = LowRankLinear(IN, OUT, RANK - 3, layout=layout, dtype=torch.float64)
    fresh.load_state_dict(base.state_dict(), strict=True)  # sizes and pivots fit each other
    x = random(4, IN)
    assert torch.equal(fresh(x), base(x))


@both_layouts
def test_full_factors_multiply_to_the_weight(layout: str) -> None:
    base = layer(layout, torch.float64)
    left, right = full_factors(base)
    assert left.shape == (OUT, RANK)
    assert float((left @ right - weight_of(base)).abs().max()) <= 1e-13


def merged_model() -> tuple[nn.Module, nn.Module]:
    """A pruned Llama, and the same with a change merged into every factored layer."""
    models = []
    for _ in range(2):
        model = tiny_model("llama")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prune_(model, EigenpruneConfig(keep=0.6, method="svd", allocation="uniform"), progress=False)
        models.append(model)
    for number, (name, module) in enumerate(low_rank_layers(models[1]).items()):
        m, n = module.out_features, module.in_features
        change = Delta.of(random(m, 4, seed=number), 0.01 * random(4, n, seed=number + 50))
        models[1].set_submodule(name, merged_layer(module, [change]))
    return models[0], models[1]


def test_truncation_in_a_metric_keeps_more_of_the_output_than_plain() -> None:
    dense = tiny_model("llama")
    statistics = collect_statistics(dense, token_windows(16, 32), select_layers(dense).chosen, progress=False)
    base, merged = merged_model()
    whole, lost = logits(merged), {}
    for name, given in (("plain", None), ("metric", statistics)):
        _, model = merged_model()
        assert truncate_merged_(model, statistics=given) is model
        assert {n: (x.layout, x.rank) for n, x in low_rank_layers(model).items()} == {
            n: (x.layout, x.rank) for n, x in low_rank_layers(base).items()
        }
        lost[name] = float((logits(model) - whole).norm() / whole.norm())
    assert 0 < lost["metric"] < lost["plain"] < 1


def test_truncation_takes_explicit_ranks_and_leaves_smaller_layers_alone() -> None:
    _, model = merged_model()
    names = list(low_rank_layers(model))
    untouched = model.get_submodule(names[1])
    truncate_merged_(model, {names[0]: 5, names[1]: 500})
    assert low_rank_layers(model)[names[0]].rank == 5
    assert model.get_submodule(names[1]) is untouched


def test_truncation_of_what_cannot_be_truncated_is_refused() -> None:
    base, merged = merged_model()
    name = next(iter(low_rank_layers(merged)))
    with pytest.raises(ConfigError, match="no layer of this model was merged"):
        truncate_merged_(base)
    with pytest.raises(ConfigError, match="no layer 'nowhere'"):
        truncate_merged_(merged, {"nowhere": 3})
    with pytest.raises(ConfigError, match="not a linear layer"):
        truncate_merged_(merged, {"model.norm": 3})
    with pytest.raises(ConfigError, match="at least 1"):
        truncate_merged_(merged, {name: 0})
    dense = tiny_model("llama")
    chosen = dict(list(select_layers(dense).chosen.items())[1:])
    statistics = collect_statistics(dense, token_windows(), chosen, progress=False)
    with pytest.raises(CalibrationError, match=name):
        truncate_merged_(merged, statistics=statistics)


def test_statistics_of_layers_that_have_lost_channels_since_are_refused_and_nothing_is_changed() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    statistics = collect_statistics(dense, token_windows(), select_layers(dense).chosen, progress=False)
    report = pruned_by(model, method="kfac-channels", keep=0.5)
    narrowed = [found.name for found in report.layers if found.kept_shape is not None]
    ranks = dict.fromkeys(low_rank_layers(model), 2) | dict.fromkeys(narrowed, 2)
    before = picture(model)
    with pytest.raises(CalibrationError, match=r"has \d+ (in|out)puts, and the statistics are of \d+: it has lost"):
        truncate_merged_(model, ranks, statistics=statistics)
    assert picture(model) == before
    truncate_merged_(model, ranks)
    assert {layer.rank for layer in low_rank_layers(model).values()} == {2}
    assert torch.isfinite(logits(model)).all()
