# SPDX-License-Identifier: Apache-2.0
"""Weights that are views, and operators on empty and tiny tensors (rows G19, G20, G21)."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eigenprune import EigenpruneConfig, prune_
from eigenprune.errors import WeightError
from eigenprune.layers import LowRankLinear
from eigenprune.ops import low_rank_linear, pivot_linear

OUT, IN = 48, 64


def _values() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))


def _strided(values: Tensor) -> Tensor:
    wide = torch.full((OUT, 2 * IN), torch.nan)
    wide[:, ::2] = values
    return wide[:, ::2]


def _offset(values: Tensor) -> Tensor:
    long = torch.full((5 + values.numel() + 7,), torch.nan)
    long[5 : 5 + values.numel()] = values.flatten()
    return long[5 : 5 + values.numel()].view(OUT, IN)


# Way to hold the same weight -> the tensor that holds it; what lies around it in memory is NaN.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda values: values.t().contiguous().t(),
    "strided": _strided,
    "offset": _offset,
    "expanded": lambda values: values[:1].expand(OUT, IN),
}


def _pruned(weight: Tensor, conv1d: bool = False) -> LowRankLinear:
    model = nn.Sequential(nn.ReLU(), Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT, bias=False))
    model[1].weight = nn.Parameter(weight.t() if conv1d else weight, requires_grad=False)
    with pytest.warns(UserWarning, match="no data"):
        prune_(model, EigenpruneConfig(keep=0.6, method="svd"), progress=False)
    assert isinstance(model[1], LowRankLinear)
    return model[1]


@pytest.mark.parametrize("view", VIEWS)
def test_g19_weight_that_is_a_view_is_pruned_like_its_copy(view: str) -> None:
    values = VIEWS[view](_values())
    assert view == "offset" or not values.is_contiguous()
    found, wanted = _pruned(values), _pruned(values.clone(memory_format=torch.contiguous_format))
    assert found.right.weight.is_contiguous()
    assert found.left.weight.is_contiguous()
    # The truncation is worked out in float64 from the same numbers, whose order in memory may change a sum's order
    # there; what is left after rounding the factors to float32 is one rounding each.
    scale = float(values.abs().max()) * found.rank**0.5
    assert float((found.weight - wanted.weight).abs().max()) <= 4 * torch.finfo(torch.float32).eps * scale


def test_g19_conv1d_is_pruned_like_the_linear_of_the_same_weight() -> None:
    conv, linear = _pruned(_values(), conv1d=True), _pruned(_values())
    assert conv.weight.shape == (IN, OUT)
    assert float((conv.weight.t() - linear.weight).abs().max()) <= 4 * torch.finfo(torch.float32).eps * 4 * OUT**0.5


# out, in, rank, rows of the input
TINY = (
    *((1, 1, 1, 1), (1, 1, 1, 0), (1, 7, 1, 3), (7, 1, 1, 3), (2, 2, 1, 1), (2, 2, 2, 1)),
    *((7, 5, 5, 2), (5, 7, 5, 2), (3, 4, 0, 2), (3, 0, 0, 2), (1, 5, 0, 0), (4, 4, 4, 0)),
)


@pytest.mark.parametrize("sizes", TINY, ids=str)
def test_g20_empty_and_tiny_shapes_are_defined(sizes: tuple[int, int, int, int]) -> None:
    out, inner, rank, rows = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, right, bias = normal(rows, inner), normal(rank, inner), normal(out)
    left, mix = normal(out, rank), normal(out - rank, rank)
    pivots = torch.arange(out - 1, out - 1 - rank, -1).int()
    pair = bias.repeat(rows, 1)
    for i, o, r in itertools.product(range(rows), range(out), range(rank)):
        pair[i, o] += left[o, r] * (right[r] @ x[i])
    weight = torch.zeros(out, inner, dtype=torch.float64)
    weight[pivots.long()] = right
    others = [o for o in range(out) if o not in pivots.tolist()]
    weight[others] = mix @ right
    # Sums of at most 7 products of 7 products each.
    close = {"rtol": 0.0, "atol": 64 * torch.finfo(torch.float64).eps * 16}
    torch.testing.assert_close(low_rank_linear(x, right, left, bias), pair, **close)
    torch.testing.assert_close(pivot_linear(x, right, mix, pivots, bias), x @ weight.t() + bias, **close)


@pytest.mark.parametrize("operator", ["low_rank_linear", "pivot_linear"])
def test_g21_meta_tensors_give_shapes_and_no_data(operator: str) -> None:
    x, right, bias = (torch.empty(size, device="meta") for size in ((2, 3, 8), (4, 8), (12,)))
    if operator == "low_rank_linear":
        y = low_rank_linear(x, right, torch.empty(12, 4, device="meta"), bias)
    else:
        pivots = torch.empty(4, dtype=torch.int32, device="meta")
        y = pivot_linear(x, right, torch.empty(8, 4, device="meta"), pivots, bias)
    assert (y.device.type, tuple(y.shape)) == ("meta", (2, 3, 12))


def test_g21_meta_model_is_refused_before_anything_changes() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = list(model)
    with pytest.raises(WeightError, match="meta device"):
        prune_(model, EigenpruneConfig(keep=0.6, method="svd"), progress=False)
    assert list(model) == before


@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_g21_layer_on_the_meta_device_gives_the_shape(layout: str) -> None:
    layer = LowRankLinear(8, 12, 4, layout=layout, device="meta")
    assert tuple(layer(torch.empty(2, 3, 8, device="meta")).shape) == (2, 3, 12)
