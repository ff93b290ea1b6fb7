# SPDX-License-Identifier: Apache-2.0
"""The two products of the pivot layout put together: y[..., pivots] = z, y[..., the others] = rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eigenprune.ops._checks import check_parts, check_pivot_values
from eigenprune.ops._library import define_operator
from eigenprune.ops._pivots import source_positions
from eigenprune.ops._routes import call_without_autograd, needs_derivative, needs_torch_gradients
from eigenprune.ops.split_columns import split_columns

_OP = "eigenprune::merge_columns"


def merge_columns(z: Tensor, rest: Tensor, pivots: Tensor) -> Tensor:
    """Put columns together: y[..., pivots] = z, y[..., the others, ascending] = rest.

    A training step of `pivot_linear` ends in it: torch's own gather is slow for elements of two bytes.

    Args:
        z: [..., rank], float32, bfloat16, float16 or float64; any strides.
        rest: [..., out - rank], leading shape, dtype and device of z.
        pivots: [rank] int32 on z's device, distinct, in [0, out).

    Returns:
        [..., out], contiguous; the elements are moved, not computed with. Differentiable in z and rest, by
        `split_columns`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, pivots out of range or repeated (on CPU).
    """
    if not needs_derivative(z, rest):
        return call_without_autograd(_operator, z, rest, pivots)
    if needs_torch_gradients(z):
        return _fallback(z, rest, pivots)
    merged: Tensor = _Merge.apply(z, rest, pivots)  # type: ignore[no-untyped-call]
    return merged


def merge_columns_reference(z: Tensor, rest: Tensor, pivots: Tensor) -> Tensor:
    """The pure-torch twin of `merge_columns`. Same arguments; the values of the pivots are left to torch's index
    checks, so that it compiles into one graph."""
    check_parts(_OP, z, rest, pivots)
    rows = torch.cat((z, rest), dim=-1)  # pivots first
    return rows.index_select(-1, source_positions(pivots, rows.shape[-1]))


class _Merge(torch.autograd.Function):
    """The gradient in Python at its shortest; with `setup_context` apart, as functional transforms want it, or through
    the operator's own gradient, a call takes several times as long as a small layer's columns."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rest: Tensor, pivots: Tensor) -> Tensor:
        ctx.save_for_backward(pivots)
        return call_without_autograd(_operator, z, rest, pivots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return _backward(ctx, grad)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    z, rest = split_columns(grad, *ctx.saved_tensors)
    return z, rest, None


def _fallback(z: Tensor, rest: Tensor, pivots: Tensor) -> Tensor:
    check_parts(_OP, z, rest, pivots)
    if not torch.compiler.is_compiling():
        check_pivot_values(_OP, pivots, z.shape[-1] + rest.shape[-1])
    return merge_columns_reference(z, rest, pivots)


def _fake(z: Tensor, rest: Tensor, pivots: Tensor) -> Tensor:
    check_parts(_OP, z, rest, pivots)
    return z.new_empty((*z.shape[:-1], z.shape[-1] + rest.shape[-1]))


define_operator("merge_columns", _fallback)
_operator: Callable[..., Tensor] = torch.ops.eigenprune.merge_columns.default
torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
