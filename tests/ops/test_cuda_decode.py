# SPDX-License-Identifier: Apache-2.0
"""Both factored linears on a GPU: against float64, awkward memory, wrong pivots, graphs, streams, a second device.

All of it is skipped where there is no GPU or no CUDA build; tests/ops/test_cuda_emulation.py needs neither.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eigenprune.ops import extension_status, pivot_linear_reference
from tests.ops.helpers import DTYPES, error_bound, factors, normal, pivots_of, relative_error

os.environ.setdefault("EIGENPRUNE_CUDA_DECODE", "1")  # read at the first call on a GPU; these tests are the only ones

DECODE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("pair", "pivot")


def why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not extension_status().build.get("cuda_architectures"):
        return "the extension was built without CUDA kernels (EIGENPRUNE_BUILD=cuda)"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=f"not run: {why_not()}")]


class Layer:
    """Factors of one layout on a device, its exact output, and what plain torch makes of it."""

    def __init__(self, layout: str, out: int, rank: int, features: int, dtype: torch.dtype, *, bias: bool = True):
        self.pivots = pivots_of(out, rank, ascending=False).cuda() if layout == "pivot" else None
        right, left = factors(out, rank, features, dtype, pivot=layout == "pivot")
        self.right, self.left = right.cuda(), left.cuda()
        self.bias = normal(out, dtype=dtype, seed=5).cuda() if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.pivots is None:
            return torch.ops.eigenprune.low_rank_linear(x, self.right, self.left, self.bias)
        return torch.ops.eigenprune.pivot_linear(x, self.right, self.left, self.pivots, self.bias)

    def plain(self, x: Tensor) -> Tensor:
        if self.pivots is None:
            return F.linear(F.linear(x, self.right), self.left, self.bias)
        return pivot_linear_reference(x, self.right, self.left, self.pivots, self.bias)

    def exact(self, x: Tensor) -> Tensor:
        right, left = self.right.cpu().double(), self.left.cpu().double()
        weight = left @ right
        if self.pivots is not None:
            place = {int(position): row for row, position in enumerate(self.pivots)}
            mixed = iter(weight)
            rows = [right[place[o]] if o in place else next(mixed) for o in range(len(left) + len(right))]
            weight = torch.stack(rows) if rows else right
        y = x.cpu().double() @ weight.T
        return y if self.bias is None else y + self.bias.cpu().double()

    def check(self, x: Tensor) -> None:
        y, truth = self(x), self.exact(x)
        assert y.dtype == x.dtype
        assert y.device == x.device
        assert y.shape == truth.shape
        if truth.numel() == 0:
            return
        error = (y.cpu().double() - truth).abs().max()
        plain_error = (self.plain(x).cpu().double() - truth).abs().max()
        # One unit of the largest value: where plain torch happens to be exact, twice nothing is nothing.
        allowance = torch.finfo(x.dtype).eps * truth.abs().max()
        assert error <= 2 * plain_error + allowance
        if truth.norm() > 0 and truth.numel() >= 64:  # the bound is of a mean
            assert relative_error(y.cpu(), truth) <= error_bound(x.dtype)


def kernel_names(function) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", range(18))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64_on_both_sides_of_the_rule(dtype, rows, layout):
    Layer(layout, 576, 200, 320, dtype).check(normal(rows, 320, dtype=dtype).cuda())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DECODE_DTYPES, ids=str)
def test_a_few_rows_take_two_launches_of_ours(dtype, layout):
    layer = Layer(layout, 64, 16, 32, dtype)
    few, many = normal(4, 32, dtype=dtype).cuda(), normal(17, 32, dtype=dtype).cuda()
    for x in (few, many):  # the first call loads libraries
        layer(x)
    names = kernel_names(lambda: layer(few))
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert len(names) == 2, names
    assert sum("project" in name for name in names) == 1
    assert sum("expand" in name for name in names) == 1
    assert not any("project" in name for name in kernel_names(lambda: layer(many)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DECODE_DTYPES, ids=str)
def test_ragged_sizes(dtype, layout):
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        rows, rank, more, features = (int(torch.randint(1, 68, (1,), generator=generator)) for _ in range(4))
        layer = Layer(layout, rank + more, rank, features, dtype, bias=rows % 2 == 0)
        layer.check(normal(1 + rows % 17, features, dtype=dtype).cuda())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("out", "rank", "features"), [(576, 0, 576), (16, 16, 0), (0, 0, 8), (16, 16, 8), (1, 1, 1)], ids=str
)
def test_empty_sides(layout, out, rank, features):
    for dtype in DECODE_DTYPES:
        Layer(layout, out, rank, features, dtype).check(normal(3, features, dtype=dtype).cuda())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
@pytest.mark.parametrize(
    ("out", "rank", "features"),
    [(576, 230, 576), (1536, 336, 576), (2048, 816, 2048), (8192, 1312, 2048), (4096, 1640, 4096), (1024, 656, 4096)],
    ids=str,
)
def test_real_sizes(out, rank, features, rows, layout):
    for dtype in DECODE_DTYPES:
        Layer(layout, out, rank, features, dtype).check(normal(rows, features, dtype=dtype).cuda())


def shifted(tensor: Tensor, by: int) -> Tensor:
    """The same values, contiguous, `by` elements behind an aligned address."""
    buffer = tensor.new_empty(tensor.numel() + by)
    return buffer[by:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DECODE_DTYPES, ids=str)
def test_unaligned_slices(dtype, by, layout):
    layer, x = Layer(layout, 96, 40, 64, dtype), normal(5, 64, dtype=dtype).cuda()
    for name in ("right", "left", "bias"):
        setattr(layer, name, shifted(getattr(layer, name), by))
    if layer.pivots is not None:
        layer.pivots = shifted(layer.pivots, by)
    layer.check(shifted(x, by))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_that_are_not_contiguous(layout):
    layer = Layer(layout, 96, 40, 64, torch.bfloat16)
    layer.check(normal(64, 5, 3, dtype=torch.bfloat16).cuda().permute(2, 1, 0))
    layer.check(normal(64, dtype=torch.bfloat16).cuda())
    layer.bias = normal(192, dtype=torch.bfloat16).cuda()[::2]
    if layer.pivots is not None:
        layer.pivots = torch.stack((layer.pivots, layer.pivots), 1).flatten()[::2]
    layer.check(normal(5, 128, dtype=torch.bfloat16).cuda()[:, ::2])
    layer.right, layer.left = layer.right.T.contiguous().T, layer.left.T.contiguous().T
    layer.check(normal(5, 64, dtype=torch.bfloat16).cuda())


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("wrong", [-1, 96, 2**31 - 1, -(2**31), "repeated"])
@pytest.mark.parametrize("dtype", DECODE_DTYPES, ids=str)
def test_wrong_pivots_give_nan_and_touch_nothing_else(dtype, wrong, rows):
    layer, x = Layer("pivot", 96, 40, 64, dtype), normal(rows, 64, dtype=dtype).cuda()
    neighbours = [torch.zeros(1 << 16, dtype=torch.uint8, device="cuda") for _ in range(8)]
    before = [tensor.clone() for tensor in (x, layer.right, layer.left, layer.bias)]
    layer.pivots[7] = layer.pivots[3] if wrong == "repeated" else wrong
    y = layer(x)
    torch.cuda.synchronize()
    assert bool(y.isnan().all())
    after = (x, layer.right, layer.left, layer.bias)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(bool(tensor.any()) for tensor in neighbours)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DECODE_DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype, layout):
    layer, x = Layer(layout, 96, 40, 64, dtype), normal(12, 64, dtype=dtype).cuda()
    clean = layer(x)
    x[3, 5], x[10, 0] = float("nan"), float("inf")
    y = layer(x)
    others = [row for row in range(12) if row not in (3, 10)]
    assert torch.equal(y[others], clean[others])
    assert bool(y[3].isnan().all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_captured_into_a_graph(rows, layout):
    layer, x = Layer(layout, 1024, 328, 512, torch.bfloat16), normal(rows, 512, dtype=torch.bfloat16).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)  # libraries load outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in (11, 12, 13):
        x.copy_(normal(rows, 512, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_streams_at_once_are_bit_equal_to_one(layout):
    layer = Layer(layout, 2048, 816, 2048, torch.bfloat16)
    inputs = [normal(4, 2048, dtype=torch.bfloat16, seed=seed).cuda() for seed in range(40)]
    expected = [layer(x) for x in inputs]
    torch.cuda.synchronize()
    streams, outputs = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for index, x in enumerate(inputs):
        with torch.cuda.stream(streams[index % 2]):
            outputs.append(layer(x))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_runs_on_the_current_stream():
    layer, x = Layer("pivot", 1024, 328, 512, torch.bfloat16), normal(4, 512, dtype=torch.bfloat16).cuda()
    expected, zero = layer(x), torch.zeros_like(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # about 30 ms: a launch on another stream would see the zeros
        zero.copy_(x)
        y = layer(zero)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: fewer than two CUDA devices")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 17])
def test_second_device_while_the_first_is_current(rows, layout):
    layer, x = Layer(layout, 96, 40, 64, torch.bfloat16), normal(rows, 64, dtype=torch.bfloat16).cuda()
    expected = layer(x)
    for name in ("right", "left", "bias", "pivots"):
        value = getattr(layer, name)
        setattr(layer, name, None if value is None else value.to("cuda:1"))
    y = layer(x.to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y.to("cuda:0"), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DECODE_DTYPES, ids=str)
def test_repeated_runs_are_bit_equal(dtype, layout):
    layer, x = Layer(layout, 1024, 328, 1000, dtype), normal(7, 1000, dtype=dtype).cuda()
    first = layer(x)
    assert all(torch.equal(first, layer(x)) for _ in range(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    for layout in LAYOUTS:
        layer, x = Layer(layout, 12, 5, 8, dtype), normal(2, 8, dtype=dtype).cuda()
        name = "low_rank_linear" if layer.pivots is None else "pivot_linear"
        arguments = (x, layer.right, layer.left, *(() if layer.pivots is None else (layer.pivots,)), layer.bias)
        torch.library.opcheck(getattr(torch.ops.eigenprune, name).default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_into_one_graph(layout):
    layer, x = Layer(layout, 96, 40, 64, torch.bfloat16), normal(2, 64, dtype=torch.bfloat16).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(layer.__call__, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
