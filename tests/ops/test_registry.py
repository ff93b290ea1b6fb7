# SPDX-License-Identifier: Apache-2.0
"""Every operator of the namespace, as the dispatcher knows it: opcheck, compile, signatures, the missing
extension."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import eigenprune.ops as ops
from eigenprune.ops._library import SCHEMAS
from tests.ops.helpers import ROOT, factors, normal, pivots_of, run_python


def registered_operators() -> list[str]:
    """Names from the dispatcher itself, so that an operator nobody listed here is still found."""
    schemas = torch._C._jit_get_all_schemas()
    return sorted({s.name.removeprefix("eigenprune::") for s in schemas if s.name.startswith("eigenprune::")})


def samples_low_rank_linear(dtype: torch.dtype):
    right, left = factors(12, 5, 8, dtype)
    bias = normal(12, dtype=dtype)
    yield normal(2, 3, 8, dtype=dtype), right, left, bias
    yield normal(8, dtype=dtype), right, left, None
    yield normal(0, 8, dtype=dtype), right, left, bias
    yield normal(8, 4, dtype=dtype).T, right, left, bias
    yield normal(2, 8, dtype=dtype).requires_grad_(), right.clone().requires_grad_(), left, bias
    yield normal(2, 8, dtype=dtype), right, left.clone().requires_grad_(), bias.clone().requires_grad_()


def samples_pivot_linear(dtype: torch.dtype):
    right, left = factors(12, 5, 8, dtype, pivot=True)
    for ascending, (x, right_like, _, bias) in enumerate(samples_low_rank_linear(dtype)):
        mixing = left.clone().requires_grad_(bias is not None and bias.requires_grad)
        leading = right.clone().requires_grad_(right_like.requires_grad)
        yield x, leading, mixing, pivots_of(12, 5, ascending=bool(ascending % 2)), bias


def samples_grouped_linear(dtype: torch.dtype):
    for pair, pivot in zip(samples_low_rank_linear(dtype), samples_pivot_linear(dtype), strict=True):
        x, right, left, bias = pair
        _, rows, mix, pivots, _ = pivot
        yield x, [right, rows], [left, mix], [None, pivots], [bias, None]


def samples_split_columns(dtype: torch.dtype):
    for ascending, shape in enumerate(((2, 3, 12), (12,), (0, 12), (5, 12))):
        yield normal(*shape, dtype=dtype).requires_grad_(shape == (5, 12)), pivots_of(12, 5, ascending=bool(ascending))
    yield normal(12, 4, dtype=dtype).T, pivots_of(12, 5, ascending=True)


def samples_merge_columns(dtype: torch.dtype):
    for y, pivots in samples_split_columns(dtype):
        z, rest = (part.detach() for part in ops.split_columns_reference(y, pivots))
        yield z.requires_grad_(y.requires_grad), rest.requires_grad_(y.requires_grad), pivots


def samples_gram_svd(dtype: torch.dtype):
    dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    yield normal(3, 5, 8, dtype=dtype), 4, True, False
    yield normal(3, 8, 5, dtype=dtype).mT, 5, dtype == torch.float64, True
    yield normal(0, 5, 8, dtype=dtype), 2, True, False


def samples_truncated_svd(dtype: torch.dtype):
    yield normal(3, 5, 8, dtype=dtype), [4], True, 0.005, 0, "auto"
    yield normal(2, 3, 8, 5, dtype=dtype), [1, 2, 3, 4, 5, 0], True, 0.005, 0, "auto"
    yield normal(8, 5, dtype=dtype), None, False, 0.005, 0, "exact"
    yield normal(0, 8, 5, dtype=dtype), None, True, 0.005, 0, "auto"
    yield normal(40, 60, dtype=dtype), [5], True, 0.005, 3, "subspace"


SAMPLES = {
    "gram_svd": samples_gram_svd,
    "grouped_linear": samples_grouped_linear,
    "low_rank_linear": samples_low_rank_linear,
    "merge_columns": samples_merge_columns,
    "pivot_linear": samples_pivot_linear,
    "split_columns": samples_split_columns,
    "truncated_svd": samples_truncated_svd,
}
WITHOUT_GRADIENT = ("gram_svd", "truncated_svd")


def leaves_of(arguments, gradient: bool):
    """The same arguments as leaves; the floating point ones, in lists too, ask for a gradient or do not."""
    return tree_map_only(
        torch.Tensor, lambda a: a.detach().clone().requires_grad_(gradient and a.is_floating_point()), arguments
    )


def test_every_operator_has_samples_a_wrapper_and_a_reference():
    names = registered_operators()
    assert len(names) >= 2
    assert set(SAMPLES) == set(names), "an operator without samples would go unchecked"
    for name in names:
        assert callable(getattr(ops, name))
        assert callable(getattr(ops, name + "_reference"))


@pytest.mark.parametrize("name", registered_operators())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name, dtype):
    operator = getattr(torch.ops.eigenprune, name).default
    for arguments in SAMPLES[name](dtype):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("route", ["wrapper", "operator"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", registered_operators())
def test_compiles_into_one_graph(name, gradient, route):
    if name in WITHOUT_GRADIENT:
        pytest.skip("returns several tensors and has no gradient: see test_a_decomposition_compiles_into_one_graph")
    function = getattr(ops, name) if route == "wrapper" else getattr(torch.ops.eigenprune, name)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: function(*a), fullgraph=True, backend=count)
    arguments = next(iter(SAMPLES[name](torch.float32)))
    for _ in range(2):
        leaves = leaves_of(arguments, gradient)
        y = compiled(*leaves)
        torch.testing.assert_close(y, function(*leaves), rtol=0, atol=0)
        assert all(output.requires_grad == gradient for output in tree_leaves(y))
    assert len(graphs) == 1, "the compiled function was not called, fell apart, or was compiled twice"


@pytest.mark.parametrize("route", ["wrapper", "operator"])
@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_decomposition_compiles_into_one_graph(name, route):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    arguments = next(iter(SAMPLES[name](torch.float32)))
    if route == "operator":
        function = getattr(torch.ops.eigenprune, name)
    elif name == "truncated_svd":
        function, arguments = ops.truncated_svd, arguments[:2]
    else:
        function = ops.gram_svd
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: function(*a), fullgraph=True, backend=count)
    for _ in range(2):
        for x, y in zip(compiled(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert len(graphs) == 1, "the compiled function was not called, fell apart, or was compiled again"


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", registered_operators())
def test_inductor_agrees(name, gradient):
    if name in WITHOUT_GRADIENT:
        pytest.skip("a decomposition is one node: inductor calls it, and adds nothing")
    torch._dynamo.reset()
    function = getattr(ops, name)
    compiled = torch.compile(function, fullgraph=True)
    arguments = next(iter(SAMPLES[name](torch.float32)))
    left, right = leaves_of(arguments, gradient), leaves_of(arguments, gradient)
    y, expected = compiled(*left), function(*right)
    torch.testing.assert_close(y, expected)
    if gradient:
        for outputs in (y, expected):
            sum(output.square().sum() for output in tree_leaves(outputs)).backward()
        for one, other in zip(tree_leaves(left), tree_leaves(right), strict=True):
            if other is not None and other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)


def test_dynamic_rows_do_not_recompile():
    torch._dynamo.reset()
    right, left = factors(12, 5, 8, torch.float32, pivot=True)
    pivots, frames = pivots_of(12, 5, ascending=True), []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(ops.pivot_linear, fullgraph=True, dynamic=True, backend=count)
    for rows in (3, 5, 9):
        compiled(normal(rows, 8, dtype=torch.float32), right, left, pivots)
    assert len(frames) == 1


def test_schemas_in_python_and_cpp_agree():
    source = re.sub(r'"\s*"', "", (ROOT / "csrc" / "ops.cpp").read_text())  # joins what C++ joins
    in_cpp = dict(re.findall(r'library\.def\(\s*"(\w+)(.+?)"\)', source))
    assert in_cpp == dict(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert str(getattr(torch.ops.eigenprune, name).default._schema) == f"eigenprune::{name}{schema}"


def test_missing_extension_is_reported_and_everything_still_runs():
    result = run_python(
        "import torch; from eigenprune.ops import extension_status, pivot_linear\n"
        "status = extension_status(); print(status.loaded, status.reason)\n"
        "torch.library.opcheck(torch.ops.eigenprune.low_rank_linear.default,"
        " (torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 2), None))\n"
        "p = torch.tensor([1, 0], dtype=torch.int32)\n"
        "torch.library.opcheck(torch.ops.eigenprune.pivot_linear.default,"
        " (torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 2), p, None))\n"
        "x, a, b = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 2)\n"
        "torch.library.opcheck(torch.ops.eigenprune.truncated_svd.default,"
        " (torch.randn(3, 4, 6), [2], True, 0.005, 0, 'auto'))\n"
        "try: torch.ops.eigenprune.pivot_linear(x, a, b, p * 0, None)\n"
        "except RuntimeError as error: print(error)\n",
        EIGENPRUNE_NO_EXTENSION="1",
    )
    assert result.returncode == 0, result.stderr
    assert "False EIGENPRUNE_NO_EXTENSION is set" in result.stdout
    assert "eigenprune::pivot_linear: pivot 0 is repeated" in result.stdout


def test_status_says_what_was_built():
    status = ops.extension_status()
    assert status.reason
    if not status.loaded:
        pytest.skip(f"no extension here: {status.reason}")
    assert status.path is not None
    assert status.build["torch_target"] == "2.10"
    assert set(status.build["cpu_features"]) >= {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
