# SPDX-License-Identifier: Apache-2.0
"""y = (x @ right.T) @ left.T + bias: a Linear whose weight is kept as the product left @ right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eigenprune.ops._autocast import cast_arguments, has_autocast, register_autocast
from eigenprune.ops._checks import check_factors
from eigenprune.ops._gradients import sum_to_bias, weight_gradient
from eigenprune.ops._library import define_operator
from eigenprune.ops._routes import call_without_autograd, needs_derivative

_OP = "eigenprune::low_rank_linear"


def low_rank_linear(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a factored Linear: `(x @ right.T) @ left.T + bias`.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64; any strides, any leading shape, also an empty
            one.
        right: [rank, in], dtype and device of x.
        left: [out, rank], likewise.
        bias: [out], likewise, or None.

    Returns:
        [..., out], dtype and device of x. Differentiable in every argument; a gradient keeps x and the product
        of rank columns, as two `nn.Linear` do. Under autocast the inputs are cast first. Without a
        gradient and where this package's CPU kernels compute (`python -m eigenprune` says where), sums are kept in
        float32 and the result is the same for any number of threads.

    Raises:
        RuntimeError: shapes that do not fit, mixed dtypes or devices; the text names the operator and both
            shapes.
    """
    if has_autocast(x):
        x, right, left, bias = cast_arguments((x, right, left, bias), x.device.type)
    if needs_derivative(x, right, left, bias):
        return _composed(x, right, left, bias)
    return call_without_autograd(_operator, x, right, left, bias)


def _composed(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
    """Through torch's own gradients, which keep x and the product [..., rank]."""
    check_factors(_OP, x, right, left, bias, left.shape[0] if left.dim() else 0)
    return F.linear(F.linear(x, right), left, bias)


def low_rank_linear_reference(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None) -> Tensor:
    """The pure-torch twin of `low_rank_linear`: specification, test oracle and fallback. Same arguments."""
    check_factors(_OP, x, right, left, bias, left.shape[0] if left.dim() else 0)
    return F.linear(F.linear(x, right), left, bias)


def _fake(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
    check_factors(_OP, x, right, left, bias, left.shape[0] if left.dim() else 0)
    return x.new_empty((*x.shape[:-1], left.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, right, left, _ = inputs
    needs_x, needs_right, needs_left, _ = ctx.needs_input_grad[:4]
    # z = x @ right.T is not kept: computing it again is one of seven products and saves [tokens, rank] per
    # layer.
    ctx.save_for_backward(
        x if needs_right or needs_left else None,
        right if needs_x or needs_left else None,
        left if needs_x or needs_right else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, right, left = ctx.saved_tensors
    needs_x, needs_right, needs_left, needs_bias = ctx.needs_input_grad[:4]
    grad_z = grad @ left if needs_x or needs_right else None  # [..., rank]
    return (
        grad_z @ right if needs_x and grad_z is not None else None,
        weight_gradient(grad_z, x) if needs_right and grad_z is not None else None,
        weight_gradient(grad, F.linear(x, right)) if needs_left else None,
        sum_to_bias(grad) if needs_bias else None,
    )


define_operator("low_rank_linear", low_rank_linear_reference)
_operator: Callable[..., Tensor] = torch.ops.eigenprune.low_rank_linear.default
register_autocast("low_rank_linear", _operator)
torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
