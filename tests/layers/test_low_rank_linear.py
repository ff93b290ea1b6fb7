# SPDX-License-Identifier: Apache-2.0
"""`LowRankLinear` against the dense layer it stands for, and what must never be bypassed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eigenprune.errors import ConfigError
from eigenprune.layers import LAYOUTS, LowRankLinear, factored_parameters
from eigenprune.layers.low_rank_linear import plain_weight

OUT, IN, RANK = 24, 18, 7
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def layer(layout: str, bias: bool = True, dtype: torch.dtype = torch.float64, conv1d: bool = False) -> LowRankLinear:
    generator = torch.Generator().manual_seed(0)
    pivots = torch.randperm(OUT, generator=generator)[:RANK].sort().values.int() if layout == "pivot" else None
    rows = OUT - RANK if layout == "pivot" else OUT
    return LowRankLinear.from_factors(
        torch.randn(rows, RANK, generator=generator).to(dtype),
        torch.randn(RANK, IN, generator=generator).to(dtype),
        pivots=pivots,
        bias=torch.randn(OUT, generator=generator).to(dtype) if bias else None,
        conv1d=conv1d,
    )


def literal_weight(module: LowRankLinear) -> Tensor:
    """[out, in] float64, row by row."""
    left, right = module.left.weight.detach().double(), module.right.weight.detach().double()
    if module.layout == "pair":
        return left @ right
    rows, mixed = [], iter(left)
    for position in range(module.out_features):
        if position in module.pivots.tolist():
            rows.append(right[module.pivots.tolist().index(position)])
        else:
            rows.append(next(mixed) @ right)
    return torch.stack(rows)


def expected(module: LowRankLinear, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.detach().double()
    return F.linear(x.detach().double(), literal_weight(module), bias)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_right(got: Tensor, module: LowRankLinear, x: Tensor, eps: float | None = None) -> None:
    """Each output sums `in` products for each of `rank` inner values, which are rounded, and then `rank` products."""
    eps = torch.finfo(got.dtype).eps if eps is None else eps
    left, right = module.left.weight.detach().double().abs(), module.right.weight.detach().double().abs()
    inner = x.detach().double().abs() @ right.t()
    size = float(torch.cat([inner @ left.t(), inner], -1).max() + 4)  # with the bias of at most 4
    assert float((got.detach().double() - expected(module, x)).abs().max()) <= (IN + RANK + 2) * eps * size


@both_layouts
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 0), (2, 1, 4)])
def test_forward_is_the_dense_layer(layout: str, bias: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module, x = layer(layout, bias, dtype), inputs(*shape, dtype=dtype)
    got = module(x)
    assert got.dtype == dtype
    assert got.shape == (*shape, OUT)
    if got.numel():
        assert_right(got, module, x)


@both_layouts
@pytest.mark.parametrize("conv1d", [False, True])
def test_weight_is_the_product_in_the_orientation_of_the_dense_layer(layout: str, conv1d: bool) -> None:
    module = layer(layout, conv1d=conv1d)
    wanted = literal_weight(module)
    weight = module.weight
    assert weight.shape == ((IN, OUT) if conv1d else (OUT, IN))
    assert (
        float(((weight.t() if conv1d else weight) - wanted).abs().max()) <= RANK * torch.finfo(torch.float64).eps * 50
    )
    with pytest.raises((AttributeError, KeyError)):
        module.weight = nn.Parameter(wanted)
    assert_right(module(inputs(3)), module, inputs(3))


def test_row_positions_tell_where_each_output_stands() -> None:
    module = layer("pivot")
    pivots = module.pivots.tolist()
    others = [row for row in range(OUT) if row not in pivots]
    assert module.row_positions().tolist() == [
        pivots.index(row) if row in pivots else RANK + others.index(row) for row in range(OUT)
    ]


@both_layouts
def test_parameters_are_as_counted_and_named_as_in_a_checkpoint(layout: str) -> None:
    module = layer(layout)
    assert sum(p.numel() for p in module.parameters()) - OUT == factored_parameters(RANK, OUT, IN, layout)
    names = {"left.weight", "right.weight", "bias"}
    assert set(module.state_dict()) == (names | {"pivots"} if layout == "pivot" else names)
    assert f"rank={RANK}, layout={layout}" in repr(module)
    assert module.rank == RANK


class Scaled(nn.Module):
    """Stands for any wrapper around a child: a LoRA, a quantised layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight, self.out_features, self.calls = inner, inner.weight, inner.out_features, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * self.inner(x)


class Doubled(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * super().forward(x)


@both_layouts
@pytest.mark.parametrize("child", ["left", "right"])
@pytest.mark.parametrize("way", ["wrapper", "subclass", "forward hook", "pre hook", "forward attribute"])
def test_whatever_changes_a_child_is_heard(layout: str, child: str, way: str) -> None:
    module, x = layer(layout), inputs(4)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        getattr(twin, child).weight.mul_(2)
    inner: nn.Linear = getattr(module, child)
    calls = []
    if way == "wrapper":
        setattr(module, child, Scaled(inner))
    elif way == "subclass":
        new = Doubled(inner.in_features, inner.out_features, bias=False, dtype=torch.float64)
        new.weight = inner.weight
        setattr(module, child, new)
    elif way == "forward hook":
        inner.register_forward_hook(lambda m, args, y: (calls.append(1), 2 * y)[1])
    elif way == "pre hook":
        inner.register_forward_pre_hook(lambda m, args: (calls.append(1), (2 * args[0],))[1])
    else:
        own = inner.forward
        inner.forward = lambda y: (calls.append(1), 2 * own(y))[1]
    got = module(x)
    assert_right(got, twin, x)
    assert len(calls) == 1 or getattr(module, child).calls == 1


@both_layouts
@pytest.mark.parametrize("child", ["left", "right"])
def test_backward_hooks_of_a_child_are_called(layout: str, child: str) -> None:
    x = inputs(4).requires_grad_()
    for way in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        module, calls = layer(layout), []
        getattr(getattr(module, child), way)(lambda *args, calls=calls: calls.append(1))
        module(x).sum().backward()
        assert calls == [1], way


@both_layouts
def test_an_offload_hook_brings_the_weights_in(layout: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(layer(layout, dtype=torch.float32))
    x = inputs(4, dtype=torch.float32)
    wanted = copy.deepcopy(model[0])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].left.weight.device.type == "meta"
    assert_right(model(x), wanted, x)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_right(model(x), wanted, x)


@both_layouts
def test_autocast_computes_in_its_dtype(layout: str) -> None:
    module, x = layer(layout, dtype=torch.float32), inputs(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    # Operands and the inner values are rounded to bfloat16.
    assert_right(got, module, x, eps=torch.finfo(torch.bfloat16).eps)
    calm = F.linear(x, literal_weight(module).float(), module.bias)
    assert not torch.equal(got.float(), calm)


@both_layouts
def test_an_input_of_another_dtype_is_refused_as_by_a_linear(layout: str) -> None:
    module = layer(layout, dtype=torch.float32)
    assert plain_weight(module.left, inputs(4)) is None
    with pytest.raises(RuntimeError, match="dtype"):
        module(inputs(4))


@both_layouts
@pytest.mark.parametrize("plain", [True, False])
def test_gradients_are_those_of_the_dense_computation(layout: str, plain: bool) -> None:
    module, x = layer(layout), inputs(2, 3).requires_grad_()
    if not plain:
        module.left.register_forward_hook(lambda *args: None)  # the children, one after the other
    outer = torch.randn(2, 3, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (module(x) * outer).sum().backward()
    left, right = (child.weight.detach().clone().requires_grad_() for child in (module.left, module.right))
    bias, other = module.bias.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    select = torch.eye(OUT, dtype=torch.float64)
    if layout == "pivot":
        pivots = module.pivots.tolist()
        select = select[:, pivots + [row for row in range(OUT) if row not in pivots]]
        weight = select @ torch.cat([right, left @ right])
    else:
        weight = left @ right
    (F.linear(other, weight, bias) * outer).sum().backward()
    for got, wanted in [
        (module.left.weight, left),
        (module.right.weight, right),
        (module.bias, bias),
        (x, other),
    ]:
        # Sums of at most 6 x 24 products each.
        assert float((got.grad - wanted.grad).norm()) <= 144 * torch.finfo(torch.float64).eps * float(
            wanted.grad.norm()
        )


@both_layouts
def test_copies_and_state_dicts_are_bit_equal(layout: str, tmp_path) -> None:
    module, x = layer(layout), inputs(4)
    twin = copy.deepcopy(module)
    fresh = LowRankLinear(IN, OUT, RANK, layout=layout, dtype=torch.float64)
    fresh.load_state_dict(module.state_dict(), strict=True)
    for other in (twin, fresh):
        assert torch.equal(other(x), module(x))
        assert torch.equal(other.weight, module.weight)
    with torch.no_grad():
        twin.left.weight.zero_()
    assert not torch.equal(twin(x), module(x))
    assert isinstance(module.bias, nn.Parameter)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_the_dtype_keeps_the_pivots_whole(layout: str, dtype: torch.dtype) -> None:
    module = layer(layout, dtype=torch.float32).to(dtype)
    x = inputs(4, dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    if layout == "pivot":
        assert module.pivots.dtype == torch.int32
        assert torch.equal(module.pivots, layer(layout).pivots)
    assert_right(module(x), module, x)


@pytest.mark.parametrize("rank", [1, IN])
@both_layouts
def test_the_smallest_and_the_full_rank_work(layout: str, rank: int) -> None:
    module = LowRankLinear(IN, IN, rank, layout=layout, dtype=torch.float64)
    assert module.left.weight.shape[0] == (IN - rank if layout == "pivot" else IN)
    x = inputs(3)
    assert_right(module(x), module, x)


@pytest.mark.parametrize("rank", [0, -1, IN + 1])
def test_an_impossible_rank_is_a_config_error(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} is not in 1..{IN}"):
        LowRankLinear(IN, OUT, rank)


def test_an_unknown_layout_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="there are: pair, pivot"):
        LowRankLinear(IN, OUT, 2, layout="triple")
