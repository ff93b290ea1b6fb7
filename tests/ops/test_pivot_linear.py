# SPDX-License-Identifier: Apache-2.0
"""pivot_linear: the wrapper and the operator against float64, gradients, awkward and bad inputs, threads,
memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from eigenprune.ops import extension_status, pivot_linear, pivot_linear_reference
from tests.ops.helpers import DTYPES, error_bound, factors, normal, pivots_of, relative_error, run_python

operator = torch.ops.eigenprune.pivot_linear
ROUTES = pytest.mark.parametrize("route", [pivot_linear, operator], ids=["wrapper", "operator"])
PATTERNS = list(itertools.product([False, True], repeat=4))[1:]


def dense_weight(right, left, pivots):
    """The weight [out, in] in float64, row by row: written to share nothing with the code under test."""
    weight = torch.empty(left.shape[0] + right.shape[0], right.shape[1], dtype=torch.float64)
    place = {int(position): row for row, position in enumerate(pivots)}
    mixed = iter(left.double() @ right.double())
    for position in range(weight.shape[0]):
        weight[position] = right[place[position]].double() if position in place else next(mixed)
    return weight


def exact(x, right, left, pivots, bias=None):
    y = x.double() @ dense_weight(right, left, pivots).T
    return y if bias is None else y + bias.double()


def test_hand_worked_case():
    # Rows 2 and 0 are kept, in that order; row 1 = 10 * row 2 + 1 * row 0.
    right, left = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[10.0, 1.0]])
    pivots = torch.tensor([2, 0], dtype=torch.int32)
    y = pivot_linear(torch.tensor([3.0, 5.0]), right, left, pivots, torch.tensor([0.5, 0.25, 0.125]))
    assert y.tolist() == [5.5, 35.25, 3.125]


@ROUTES
@pytest.mark.parametrize("ascending", [False, True], ids=["any_order", "ascending"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(route, dtype, with_bias, ascending):
    right, left = factors(96, 40, 64, dtype, pivot=True)
    pivots = pivots_of(96, 40, ascending=ascending)
    x, bias = normal(3, 17, 64, dtype=dtype), normal(96, dtype=dtype, seed=5) if with_bias else None
    truth = exact(x, right, left, pivots, bias)
    y = route(x, right, left, pivots, bias)
    assert y.dtype == dtype
    assert y.shape == (3, 17, 96)
    assert relative_error(y, truth) <= error_bound(dtype)
    plain = pivot_linear_reference(x, right, left, pivots, bias)  # no worse than twice plain torch
    assert (y.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-300


@ROUTES
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_match_finite_differences(route, pattern):
    right, left = factors(7, 3, 4, pivot=True)
    pivots = pivots_of(7, 3, ascending=False)
    tensors = [normal(2, 3, 4), right, left, normal(7, seed=5)]
    for tensor, wanted in zip(tensors, pattern, strict=True):
        tensor.requires_grad_(wanted)
    x, right, left, bias = tensors
    assert torch.autograd.gradcheck(route, (x, right, left, pivots, bias))
    route(x, right, left, pivots, bias).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == list(pattern)


@ROUTES
def test_second_derivatives(route):
    right, left = factors(5, 2, 3, pivot=True)
    tensors = [tensor.requires_grad_() for tensor in (normal(2, 3), right, left)]
    assert torch.autograd.gradgradcheck(lambda x, r, m: route(x, r, m, pivots_of(5, 2, ascending=False), None), tensors)


@ROUTES
@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 0, 64), (2, 3, 1, 64)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 7, 47, 48], ids="rank{}".format)
def test_leading_shapes_and_ranks(route, shape, rank):
    right, left = factors(48, rank, 64, pivot=True)
    pivots, x, bias = pivots_of(48, rank, ascending=False), normal(*shape), normal(48, seed=5)
    y = route(x, right, left, pivots, bias)
    assert y.shape == (*shape[:-1], 48)
    torch.testing.assert_close(y, exact(x, right, left, pivots, bias))


@ROUTES
def test_views_of_larger_buffers(route):
    _, left = factors(48, 7, 64, pivot=True)
    x, right, bias = normal(64, 5, 3).permute(2, 1, 0), normal(7, 128)[:, ::2], normal(96)[::2]
    other = torch.full((7,), 99, dtype=torch.int32)
    pivots = torch.stack((pivots_of(48, 7, ascending=False), other), 1)[:, 0]
    assert not pivots.is_contiguous()
    torch.testing.assert_close(route(x, right, left, pivots, bias), exact(x, right, left, pivots, bias))


@ROUTES
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0, 7, 2], r"pivot 7 is outside \[0, 7\)"),
        ([0, -1, 2], r"pivot -1 is outside"),
        ([4, 2, 4], r"pivot 4 is repeated"),
    ],
    ids=["too_large", "negative", "repeated"],
)
def test_bad_pivots_are_refused(route, gradient, bad, message):
    right, left = factors(7, 3, 4, pivot=True)
    right.requires_grad_(gradient)
    with pytest.raises(RuntimeError, match="eigenprune::pivot_linear: " + message):
        route(normal(2, 4), right, left, torch.tensor(bad, dtype=torch.int32), None)


@ROUTES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (2, 7)}, r"last dimension of x .*x \[2, 7\], right \[3, 6\]"),
        ({"x": ()}, r"at least one dimension"),
        ({"right": (6,)}, r"must be matrices"),
        ({"left": (4, 2)}, r"columns of left .*right \[3, 6\], left \[4, 2\]"),
        ({"pivots": (4,)}, r"pivots must be \[rank\] .*right \[3, 6\], pivots \[4\]"),
        ({"bias": (4,)}, r"bias must be \[7\] .*left \[4, 3\], bias \[4\]"),
    ],
    ids=str,
)
def test_wrong_shapes_are_named(route, changes, message):
    shapes = {"x": (2, 6), "right": (3, 6), "left": (4, 3), "pivots": (3,), "bias": (7,), **changes}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors["pivots"] = torch.arange(shapes["pivots"][0], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="eigenprune::pivot_linear: .*" + message):
        route(*tensors.values())


@ROUTES
@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("right", torch.bfloat16, r"right and x must have one dtype \(torch.bfloat16, torch.float32\)"),
        ("left", torch.float64, "left and x must have one dtype"),
        ("bias", torch.float16, "bias and x must have one dtype"),
        ("pivots", torch.int64, "pivots must be torch.int32, not torch.int64"),
    ],
)
def test_wrong_dtypes_are_named(route, name, dtype, message):
    right, left = factors(7, 3, 6, torch.float32, pivot=True)
    tensors = {
        "x": torch.zeros(2, 6),
        "right": right,
        "left": left,
        "pivots": pivots_of(7, 3, ascending=True),
    }
    tensors["bias"] = torch.zeros(7)
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(RuntimeError, match=message):
        route(*tensors.values())


@ROUTES
@pytest.mark.parametrize("name", ["right", "pivots"])
def test_tensor_on_another_device_is_refused_not_read(route, name):
    right, left = factors(7, 3, 6, torch.float32, pivot=True)
    tensors = {
        "x": torch.zeros(2, 6),
        "right": right,
        "left": left,
        "pivots": pivots_of(7, 3, ascending=True),
    }
    tensors[name] = tensors[name].to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"same device|expected device|device meta"):
        route(*tensors.values(), None)


@ROUTES
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "training"])
def test_autocast_casts_like_linear(route, gradient):
    right, left = factors(48, 7, 64, torch.float32, pivot=True)
    pivots, x, bias = pivots_of(48, 7, ascending=False), normal(2, 64).float(), normal(48).float()
    right.requires_grad_(gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = route(x, right, left, pivots, bias)
    assert y.dtype == torch.bfloat16
    halves = [tensor.detach().bfloat16() for tensor in (x, right, left, bias)]
    truth = exact(*halves[:3], pivots, halves[3])
    assert relative_error(y.detach(), truth) <= error_bound(torch.bfloat16)
    if gradient:
        y.sum().backward()
        assert right.grad.dtype == torch.float32


def test_threads_do_not_change_a_bit():
    code = (
        "import torch, hashlib; torch.set_num_threads({});"
        "from eigenprune.ops import pivot_linear; g = torch.Generator().manual_seed(0);"
        "r = lambda *s: torch.randint(-4, 5, s, generator=g).float();"  # whole numbers: products are exact
        "p = torch.randperm(900, generator=g)[:300].to(torch.int32);"
        "y = pivot_linear(r(257, 64), r(300, 64), r(600, 300), p, r(900));"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    runs = [run_python(code.format(threads)) for threads in (1, 2, 3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert len({run.stdout for run in runs}) == 1


def saved_bytes(function):
    total = {}

    def note(tensor):
        total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return sum(total.values())


@ROUTES
def test_training_holds_no_more_than_two_linears(route):
    right, left = factors(96, 40, 64, torch.float32, pivot=True)
    x, bias = normal(4096, 64, dtype=torch.float32), normal(96, dtype=torch.float32)
    for tensor in (x, right, left, bias):
        tensor.requires_grad_()
    pivots = pivots_of(96, 40, ascending=True)
    plain = saved_bytes(lambda: F.linear(F.linear(x, right), left))
    # Positions of the output, int64, and the left factor with the rows of the pivots; whatever the number of rows.
    tables = 2 * 8 * 96 + 4 * 96 * 40
    assert saved_bytes(lambda: route(x, right, left, pivots, bias)) <= plain + tables


def test_forward_derivative_is_not_dropped():
    right, left = factors(7, 3, 4, pivot=True)
    pivots, x, tangent = pivots_of(7, 3, ascending=False), normal(2, 4), normal(2, 4, seed=9)
    _, derivative = torch.func.jvp(lambda value: pivot_linear(value, right, left, pivots), (x,), (tangent,))
    torch.testing.assert_close(derivative, exact(tangent, right, left, pivots))


def test_fallback_gives_the_same_numbers():
    if not extension_status().loaded:
        pytest.skip("the extension is not loaded: there is nothing to compare with")
    code = (
        "import torch; from eigenprune.ops import extension_status, pivot_linear, low_rank_linear;"
        "g = torch.Generator().manual_seed(0); r = lambda *s: torch.randint(-4, 5, s, generator=g).float();"
        "p = torch.tensor([8, 1, 3, 0], dtype=torch.int32); x, a, b, c = r(2, 7), r(4, 7), r(5, 4), r(9);"
        "y = torch.ops.eigenprune.low_rank_linear(x, a, b, c[:5]);"
        "print(pivot_linear(x, a, b, p, c).tolist(), y.tolist());"
        "print(extension_status().loaded)"
    )
    native, fallback = run_python(code), run_python(code, EIGENPRUNE_NO_EXTENSION="1")
    assert fallback.returncode == 0, fallback.stderr
    assert native.stdout.splitlines() == [fallback.stdout.splitlines()[0], "True"]
    assert fallback.stdout.splitlines()[1] == "False"
