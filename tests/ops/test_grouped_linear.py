# SPDX-License-Identifier: Apache-2.0
"""grouped_linear: the bits of the single operators for every layer, float64, gradients, awkward and bad groups."""

from __future__ import annotations

import resource

import pytest
import torch

from eigenprune.ops import (
    extension_status,
    grouped_linear,
    grouped_linear_reference,
    low_rank_linear,
    pivot_linear,
)
from tests.ops.helpers import DTYPES, error_bound, factors, normal, pivots_of, relative_error, run_python

operator = torch.ops.eigenprune.grouped_linear
ROUTES = pytest.mark.parametrize("route", [grouped_linear, operator], ids=["wrapper", "operator"])
# (out, rank, layout, bias), as ragged as a pruned attention block may be: empty and full ranks, an odd one, one output.
LAYERS = (
    (48, 20, "pair", True),
    (48, 48, "pivot", False),
    (1, 1, "pair", False),
    (33, 7, "pivot", True),
    (33, 0, "pivot", True),
    (16, 16, "any order", True),
    (96, 5, "any order", False),
)


def group(dtype=torch.float64, features=32, layers=LAYERS):
    """right, left, pivots, bias: the lists of a group."""
    lists = ([], [], [], [])
    for seed, (out, rank, layout, with_bias) in enumerate(layers):
        right, left = factors(out, rank, features, dtype, pivot=layout != "pair", seed=seed)
        pivots = None if layout == "pair" else pivots_of(out, rank, ascending=layout == "pivot", seed=seed)
        bias = normal(out, dtype=dtype, seed=50 + seed) if with_bias else None
        for entries, value in zip(lists, (right, left, pivots, bias), strict=True):
            entries.append(value)
    return lists


def one_by_one(x, right, left, pivots, bias):
    return [
        low_rank_linear(x, r, m, b) if p is None else pivot_linear(x, r, m, p, b)
        for r, m, p, b in zip(right, left, pivots, bias, strict=True)
    ]


def exact(x, right, left, pivots, bias):
    """In float64, by dense weights that are put together row by row."""
    outputs = []
    for r, m, p, b in zip(right, left, pivots, bias, strict=True):
        mixed = m.double() @ r.double()
        if p is not None:
            weight = torch.empty(m.shape[0] + r.shape[0], r.shape[1], dtype=torch.float64)
            is_rest = torch.ones(weight.shape[0], dtype=torch.bool).index_fill(0, p.long(), False)
            weight[p.long()], weight[is_rest] = r.double(), mixed
            mixed = weight
        outputs.append(x.double() @ mixed.T + (0 if b is None else b.double()))
    return outputs


@ROUTES
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 300, 1024, 1025])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layer_has_the_bits_of_its_single_operator(route, dtype, rows):
    """On both sides of every limit between the kernels; in bfloat16 odd and even ranks part ways within one call."""
    x, lists = normal(rows, 32, dtype=dtype), group(dtype)
    together = route(x, *lists)
    alone = one_by_one(x, *lists)
    assert isinstance(together, list)
    assert len(together) == len(LAYERS)
    for one, other, layer in zip(together, alone, LAYERS, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other), layer


@ROUTES
@pytest.mark.parametrize("shape", [(32,), (3, 5, 32), (0, 32), (2, 0, 32), (1, 1, 1, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64_for_any_leading_shape(route, dtype, shape):
    x, lists = normal(*shape, dtype=dtype), group(dtype)
    for y, truth, (out, rank, *_) in zip(route(x, *lists), exact(x, *lists), LAYERS, strict=True):
        assert y.shape == (*shape[:-1], out)
        if y.numel() and rank:
            # For float32 and float64 a bias or a single output may cancel most of the sum: the error is that of the
            # terms, of order one here, so it is compared with sqrt(elements) as well as with the result.
            bound = error_bound(dtype) * max(1.0, y.numel() ** 0.5 / float(truth.norm()))
            assert relative_error(y, truth) <= bound


@ROUTES
def test_views_of_larger_buffers(route):
    lists = group(features=64)
    x = normal(64, 5, 3).permute(2, 1, 0)
    right = [torch.stack((r, r), 2)[:, :, 0] for r in lists[0]]
    left = [m.T.contiguous().T for m in lists[1]]
    pivots = [None if p is None else torch.stack((p, p), 1)[:, 0] for p in lists[2]]
    for y, truth in zip(route(x, right, left, pivots, lists[3]), exact(x, *lists), strict=True):
        torch.testing.assert_close(y, truth)


@ROUTES
def test_no_layers_give_no_outputs(route):
    assert list(route(normal(3, 8), [], [], [], [])) == []


def test_pivots_and_bias_may_be_left_out():
    right, left = factors(9, 4, 6)
    x = normal(2, 6)
    (y,) = grouped_linear(x, [right], [left])
    assert torch.equal(y, low_rank_linear(x, right, left))
    assert torch.equal(y, grouped_linear(x, (right,), (left,), bias=(None,))[0])


@ROUTES
def test_gradients_match_finite_differences(route):
    layers = ((5, 3, "pair", True), (7, 3, "any order", True), (4, 2, "pivot", False))
    right, left, pivots, bias = group(features=4, layers=layers)
    shapes = [*right, *left, *bias[:2]]
    tensors = [normal(2, 3, 4).requires_grad_(), *(tensor.requires_grad_() for tensor in shapes)]

    def call(x, *flat):
        return tuple(route(x, list(flat[:3]), list(flat[3:6]), pivots, [*flat[6:], None]))

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@ROUTES
@pytest.mark.parametrize("which", ["x", "right", "left", "bias"])
def test_one_tensor_alone_gets_its_gradient(route, which):
    """Also a bias in a list whose other entries are None, which a list-blind autograd would forget."""
    x, (right, left, pivots, bias) = normal(2, 32), group()
    wanted = {"x": x, "right": right[3], "left": left[3], "bias": bias[3]}[which].requires_grad_()
    outputs = route(x, right, left, pivots, bias)
    outputs[3].sum().backward()
    lone = wanted.detach().clone().requires_grad_()
    single = {"x": x, "right": right[3], "left": left[3], "bias": bias[3], which: lone}
    pivot_linear(single["x"], single["right"], single["left"], pivots[3], single["bias"]).sum().backward()
    torch.testing.assert_close(wanted.grad, lone.grad)


def test_forward_derivative_is_not_dropped():
    x, tangent, lists = normal(2, 32), normal(2, 32, seed=9), group()
    _, derivatives = torch.func.jvp(lambda value: tuple(grouped_linear(value, *lists)), (x,), (tangent,))
    no_bias = (*lists[:3], [None] * len(LAYERS))
    for derivative, truth in zip(derivatives, exact(tangent, *no_bias), strict=True):
        torch.testing.assert_close(derivative, truth)


@ROUTES
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "training"])
def test_autocast_casts_like_linear(route, gradient):
    x, lists = normal(2, 32, dtype=torch.float32), group(torch.float32)
    lists[0][0].requires_grad_(gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = route(x, *lists)
    halves = [[None if t is None else t.detach().bfloat16() for t in entries] for entries in lists]
    halves[2] = lists[2]
    for y, truth, (_, rank, *_) in zip(outputs, exact(x.bfloat16(), *halves), LAYERS, strict=True):
        assert y.dtype == torch.bfloat16
        assert not rank or relative_error(y.detach(), truth) <= error_bound(torch.bfloat16)
    if gradient:
        outputs[0].sum().backward()
        assert lists[0][0].grad.dtype == torch.float32


@ROUTES
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("lengths", None, r"one entry a layer \(they have 7, 6, 7 and 7\)"),
        ("right", lambda t: t[:, :-1], r"layer 3: the last dimension of x .*x \[2, 32\], right \[7, 31\]"),
        ("right", lambda t: t[0], r"layer 3: right and left must be matrices"),
        ("left", lambda t: t[:, :-1], r"layer 3: the columns of left .*right \[7, 32\], left \[26, 6\]"),
        ("left", lambda t: t.to(torch.bfloat16), r"layer 3: left and x must have one dtype"),
        ("pivots", lambda t: t[:-1], r"layer 3: pivots must be \[rank\] .*right \[7, 32\], pivots \[6\]"),
        ("pivots", lambda t: t.long(), r"layer 3: pivots must be torch.int32, not torch.int64"),
        ("pivots", lambda t: t + 33, r"layer 3: pivot \d+ is outside \[0, 33\)"),
        ("pivots", lambda t: t * 0 + 4, r"layer 3: pivot 4 is repeated"),
        ("bias", lambda t: t[:-1], r"layer 3: bias must be \[33\] .*left \[26, 7\], bias \[32\]"),
    ],
)
def test_wrong_groups_are_named(route, gradient, which, change, message):
    lists = dict(zip(("right", "left", "pivots", "bias"), group(), strict=True))
    if which == "lengths":
        lists["left"].pop()
    else:
        lists[which][3] = change(lists[which][3])
    lists["right"][0].requires_grad_(gradient)
    with pytest.raises(RuntimeError, match="eigenprune::grouped_linear: .*" + message):
        route(normal(2, 32), *lists.values())


def test_reference_is_the_specification():
    x, lists = normal(2, 32), group()
    for y, truth in zip(grouped_linear_reference(x, *lists), exact(x, *lists), strict=True):
        torch.testing.assert_close(y, truth)


def test_threads_and_the_missing_extension_change_nothing():
    code = (
        "import torch, hashlib; torch.set_num_threads({});"
        "from eigenprune.ops import grouped_linear; g = torch.Generator().manual_seed(0);"
        "r = lambda *s: torch.randint(-4, 5, s, generator=g).float();"  # whole numbers: products are exact
        "p = torch.randperm(900, generator=g)[:300].to(torch.int32);"
        "ys = grouped_linear(r(57, 64), [r(300, 64), r(80, 64)], [r(600, 300), r(99, 80)], [p, None], [r(900), None]);"
        "print([hashlib.sha256(y.numpy().tobytes()).hexdigest() for y in ys])"
    )
    runs = [run_python(code.format(threads)) for threads in (1, 2, 3)]
    runs.append(run_python(code.format(1), EIGENPRUNE_NO_EXTENSION="1"))
    assert all(run.returncode == 0 for run in runs), [run.stderr for run in runs]
    assert len({run.stdout for run in runs}) == 1


def test_lists_are_given_back():
    """The stable ABI copies lists by hand. A leak of one 8-byte handle of the 21 of a call would be 5 MB here."""
    if not extension_status().loaded:
        pytest.skip("the extension is not loaded")
    if extension_status().build.get("sanitizers"):
        pytest.skip("a sanitizer keeps freed memory for a while, and counts leaks itself")
    x, lists = normal(1, 8), group(features=8)
    peaks = []
    for calls in (3000, 30000):
        for _ in range(calls):
            operator(x, *lists)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
    assert peaks[1] - peaks[0] < 2500
