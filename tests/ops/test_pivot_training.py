# SPDX-License-Identifier: Apache-2.0
"""A training step through the pivot layout, against a dense float64 layer."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eigenprune.ops import pivot_linear

IN, OUT, RANK, ROWS = 24, 40, 10, 30


def arguments(dtype: torch.dtype, rows: int = ROWS) -> list[Tensor]:
    """x, right, left, bias (all with gradients), pivots."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, IN), (RANK, IN), (OUT - RANK, RANK), (OUT,))
    values = [torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    pivots = torch.randperm(OUT, generator=generator)[:RANK].int()
    return [*(value.requires_grad_() for value in values), pivots]


def dense(x: Tensor, right: Tensor, left: Tensor, bias: Tensor, pivots: Tensor) -> Tensor:
    rest = [i for i in range(OUT) if i not in set(pivots.tolist())]
    rows: list[Tensor] = [right[0]] * OUT
    for number, position in enumerate(pivots.tolist()):
        rows[position] = right[number]
    for number, position in enumerate(rest):
        rows[position] = left[number] @ right
    return F.linear(x, torch.stack(rows), bias)


def results(run: Callable[..., Tensor], values: list[Tensor], goal: Tensor) -> list[Tensor]:
    output = run(*values[:4], values[4])
    gradients = torch.autograd.grad((output * goal.to(output.dtype)).sum(), values[:4])
    return [tensor.detach().double() for tensor in (output, *gradients)]


def pivoted(x: Tensor, right: Tensor, left: Tensor, bias: Tensor, pivots: Tensor) -> Tensor:
    return pivot_linear(x, right, left, pivots, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_are_those_of_the_dense_layer(dtype: torch.dtype) -> None:
    values = arguments(dtype)
    goal = torch.randn(ROWS, OUT, generator=torch.Generator().manual_seed(1))
    goal = goal.to(dtype).double()
    exact = [value.detach().double().requires_grad_() for value in values[:4]] + [values[4]]
    for got, wanted in zip(results(pivoted, values, goal), results(dense, exact, goal), strict=True):
        # Two products in a row, rounded once each; entries are sums of up to IN and OUT terms of one size.
        assert float((got - wanted).abs().max()) <= 4 * torch.finfo(dtype).eps * float(wanted.abs().max())


def test_first_and_second_derivatives_match_finite_differences() -> None:
    values = arguments(torch.float64, rows=3)
    assert torch.autograd.gradcheck(pivoted, values)
    assert torch.autograd.gradgradcheck(pivoted, values)


def test_gradients_of_single_rows_by_vmap() -> None:
    x, right, left, bias, pivots = arguments(torch.float64)

    def loss(left: Tensor, row: Tensor) -> Tensor:
        return pivoted(row.unsqueeze(0), right, left, bias, pivots).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(left.detach(), x.detach())
    whole = torch.autograd.grad(pivoted(x, right, left, bias, pivots).square().sum(), left)[0]
    assert torch.allclose(each.sum(0), whole)


def test_forward_differentiation_agrees_with_backward() -> None:
    values = arguments(torch.float64, rows=3)
    tangents = tuple(torch.randn_like(value) for value in values[:4])
    _, forward = torch.func.jvp(lambda *v: pivoted(*v, values[4]), tuple(v.detach() for v in values[:4]), tangents)
    output = pivoted(*values)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad((output * weights).sum(), values[:4])
    through_backward = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert torch.allclose((forward * weights).sum(), through_backward)


@pytest.mark.parametrize(("pivots", "says"), [([0, 1, 1], "pivot 1 is repeated"), ([0, 1, 40], "outside")])
def test_bad_pivots_are_refused(pivots: list[int], says: str) -> None:
    values = arguments(torch.float32)
    values[4] = torch.cat([torch.tensor(pivots), torch.arange(20, 20 + RANK - len(pivots))]).int()
    with pytest.raises(RuntimeError, match=says):
        pivoted(*values)
