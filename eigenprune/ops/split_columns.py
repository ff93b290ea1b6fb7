# SPDX-License-Identifier: Apache-2.0
"""The columns of the pivot layout taken apart: z = y[..., pivots], rest = y[..., the others]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eigenprune.ops._checks import check_columns, check_pivot_values
from eigenprune.ops._library import define_operator
from eigenprune.ops._pivots import row_positions
from eigenprune.ops._routes import call_without_autograd, needs_derivative, needs_torch_gradients

_OP = "eigenprune::split_columns"


def split_columns(y: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """Take columns apart; `merge_columns` puts them together again, and each is the gradient of the other.

    Args:
        y: [..., out], float32, bfloat16, float16 or float64; any strides.
        pivots: [rank] int32 on y's device, distinct, in [0, out).

    Returns:
        z [..., rank] = y[..., pivots] and rest [..., out - rank], the other columns in ascending order; contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, pivots out of range or repeated (on CPU).
    """
    if needs_derivative(y) and needs_torch_gradients(y):
        return _fallback(y, pivots)
    parts: tuple[Tensor, Tensor] = (
        _operator(y, pivots) if needs_derivative(y) else call_without_autograd(_operator, y, pivots)
    )
    return parts


def split_columns_reference(y: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """The pure-torch twin of `split_columns`. Same arguments; the values of the pivots are left to torch's index
    checks, so that it compiles into one graph."""
    check_columns(_OP, "y", y, pivots)
    rank, out_features = pivots.shape[0], y.shape[-1]
    positions = row_positions(pivots, out_features)
    return y.index_select(-1, positions[:rank]), y.index_select(-1, positions[rank:])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad_z: Tensor, grad_rest: Tensor) -> tuple[Tensor, None]:
    merged: Tensor = torch.ops.eigenprune.merge_columns.default(grad_z, grad_rest, *ctx.saved_tensors)
    return merged, None


def _fallback(y: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    check_columns(_OP, "y", y, pivots)
    if not torch.compiler.is_compiling():
        check_pivot_values(_OP, pivots, y.shape[-1])
    return split_columns_reference(y, pivots)


def _fake(y: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    check_columns(_OP, "y", y, pivots)
    rank = pivots.shape[0]
    return y.new_empty((*y.shape[:-1], rank)), y.new_empty((*y.shape[:-1], y.shape[-1] - rank))


define_operator("split_columns", _fallback)
_operator: Callable[..., Any] = torch.ops.eigenprune.split_columns.default
torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
