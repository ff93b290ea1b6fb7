# SPDX-License-Identifier: Apache-2.0
"""low_rank_linear: the wrapper and the operator against float64, gradients, awkward and bad inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from eigenprune.ops import low_rank_linear, low_rank_linear_reference
from tests.ops.helpers import DTYPES, error_bound, factors, normal, relative_error

operator = torch.ops.eigenprune.low_rank_linear
ROUTES = pytest.mark.parametrize("route", [low_rank_linear, operator], ids=["wrapper", "operator"])


def exact(x, right, left, bias=None):
    y = x.double() @ right.double().T @ left.double().T
    return y if bias is None else y + bias.double()


@ROUTES
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(route, dtype, with_bias):
    right, left = factors(96, 40, 64, dtype)
    x, bias = normal(3, 17, 64, dtype=dtype), normal(96, dtype=dtype, seed=5) if with_bias else None
    truth = exact(x, right, left, bias)
    y = route(x, right, left, bias)
    assert y.dtype == dtype
    assert y.shape == (3, 17, 96)
    assert relative_error(y, truth) <= error_bound(dtype)
    plain = F.linear(F.linear(x, right), left, bias)  # no worse than twice what torch itself does
    assert (y.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-300


@ROUTES
@pytest.mark.parametrize("pattern", list(itertools.product([False, True], repeat=4))[1:])
def test_gradients_match_finite_differences(route, pattern):
    right, left = factors(5, 3, 4)
    tensors = [normal(2, 3, 4), right, left, normal(5, seed=5)]
    for tensor, wanted in zip(tensors, pattern, strict=True):
        tensor.requires_grad_(wanted)
    assert torch.autograd.gradcheck(route, tensors)
    route(*tensors).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == list(pattern)


@ROUTES
@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 0, 64), (2, 3, 1, 64)], ids=str)
@pytest.mark.parametrize("rank", [1, 7, 48], ids="rank{}".format)
def test_leading_shapes_and_ranks(route, shape, rank):
    right, left = factors(48, rank, 64)
    x, bias = normal(*shape), normal(48, seed=5)
    y = route(x, right, left, bias)
    assert y.shape == (*shape[:-1], 48)
    torch.testing.assert_close(y, exact(x, right, left, bias))


@ROUTES
def test_rank_zero_leaves_the_bias(route):
    bias = normal(4)
    right, left = normal(0, 6), normal(4, 0)
    y = route(normal(2, 6), right, left, bias)
    assert torch.equal(y, bias.expand(2, 4))


@ROUTES
def test_views_of_larger_buffers(route):
    right, left = factors(48, 7, 64)
    x = normal(64, 5, 3).permute(2, 1, 0)
    strided_right = normal(7, 128)[:, ::2]
    bias = normal(96)[::2]
    torch.testing.assert_close(route(x, strided_right, left, bias), exact(x, strided_right, left, bias))
    column_major = right.T.contiguous().T
    torch.testing.assert_close(route(x, column_major, left, None), exact(x, right, left))


@ROUTES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (2, 7)}, r"last dimension of x .*x \[2, 7\], right \[3, 6\]"),
        ({"x": ()}, r"at least one dimension"),
        ({"right": (6,)}, r"must be matrices"),
        ({"left": (4, 2)}, r"columns of left .*right \[3, 6\], left \[4, 2\]"),
        ({"left": (3,)}, r"must be matrices"),
        ({"bias": (5,)}, r"bias must be \[4\] .*left \[4, 3\], bias \[5\]"),
        ({"bias": (1,)}, r"bias must be \[4\]"),
    ],
    ids=str,
)
def test_wrong_shapes_are_named(route, changes, message):
    shapes = {"x": (2, 6), "right": (3, 6), "left": (4, 3), "bias": (4,), **changes}
    with pytest.raises(RuntimeError, match="eigenprune::low_rank_linear: .*" + message):
        route(*(torch.zeros(shape) for shape in shapes.values()))


@ROUTES
@pytest.mark.parametrize("name", ["right", "left", "bias"])
def test_mixed_dtypes_are_refused(route, name):
    tensors = {"x": torch.zeros(2, 6), "right": torch.zeros(3, 6), "left": torch.zeros(4, 3)}
    tensors["bias"] = torch.zeros(4)
    tensors[name] = tensors[name].bfloat16()
    with pytest.raises(RuntimeError, match=f"{name} and x must have one dtype .torch.bfloat16, torch.float32"):
        route(*tensors.values())


@ROUTES
def test_integers_are_refused(route):
    tensors = [torch.zeros(shape, dtype=torch.int64) for shape in ((2, 6), (3, 6), (4, 3))]
    with pytest.raises(RuntimeError, match="x must be float32"):
        route(*tensors, None)


@ROUTES
def test_weight_on_another_device_is_refused_not_read(route):
    # An offloaded weight is on `meta`: the fake kernel must not answer in place of the real one.
    x, left = torch.zeros(2, 6), torch.zeros(4, 3)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"same device|expected device|device meta"):
        route(x, torch.zeros(3, 6, device="meta"), left, None)


@ROUTES
def test_autocast_casts_like_linear(route):
    right, left = factors(48, 7, 64, torch.float32)
    x, bias = normal(2, 64, dtype=torch.float32), normal(48, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = route(x, right, left, bias)
    assert y.dtype == torch.bfloat16
    truth = exact(*(tensor.bfloat16() for tensor in (x, right, left, bias)))
    assert relative_error(y, truth) <= error_bound(torch.bfloat16)


def test_reference_is_the_specification():
    right, left = factors(9, 4, 6)
    x, bias = normal(2, 6), normal(9)
    torch.testing.assert_close(low_rank_linear_reference(x, right, left, bias), exact(x, right, left, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_are_bit_equal(dtype):
    right, left = factors(96, 40, 64, dtype)
    x = normal(64, 64, dtype=dtype)
    first = operator(x, right, left, None)
    assert all(torch.equal(first, operator(x, right, left, None)) for _ in range(5))
