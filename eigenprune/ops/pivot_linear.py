# SPDX-License-Identifier: Apache-2.0
"""A Linear stored as its pivot rows and the mix that gives the other rows: r (m + n - r) numbers.

Source: PIFA, arXiv 2501.19090. If rows `pivots` of a weight W [out, in] of rank r are independent, every
other row is a combination of them: W[pivots] = right, W[rest] = left @ right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eigenprune.ops._autocast import cast_arguments, has_autocast, register_autocast
from eigenprune.ops._checks import check_factors, check_pivot_shape, check_pivot_values
from eigenprune.ops._gradients import sum_to_bias, weight_gradient
from eigenprune.ops._library import define_operator
from eigenprune.ops._routes import call_without_autograd, needs_derivative
from eigenprune.ops.merge_columns import merge_columns, merge_columns_reference
from eigenprune.ops.split_columns import split_columns

_OP = "eigenprune::pivot_linear"


def pivot_linear(x: Tensor, right: Tensor, left: Tensor, pivots: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a Linear in the pivot layout: y[pivots] = z, y[rest] = z @ left.T, with z = x @ right.T; + bias.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64; any strides, any leading shape, even empty.
        right: [rank, in], the pivot rows of the weight, dtype and device of x.
        left: [out - rank, rank], the mix that gives the other rows, in ascending order of their position,
            likewise.
        pivots: [rank] int32 on x's device, positions of the pivot rows in the output: distinct, in [0, out),
            in the order of the rows of `right`.
        bias: [out], dtype and device of x, or None.

    Returns:
        [..., out], dtype and device of x. Differentiable in x, right, left and bias. Under autocast the
        floating point inputs are cast first. Without a gradient and where this package's CPU kernels compute
        (`python -m eigenprune` says where), sums are kept in float32 and the result is the same for any number
        of threads.

    Raises:
        RuntimeError: shapes that do not fit, mixed dtypes or devices, pivots out of range or repeated; the
            text names the operator and both shapes. A CUDA device is not stopped to look at the pivots: there
            wrong ones give an output full of NaN (compiled kernel) or a device-side assertion (pure torch),
            never a foreign read.

    Source: PIFA, arXiv 2501.19090.
    """
    if has_autocast(x):
        x, right, left, bias = cast_arguments((x, right, left, bias), x.device.type)
    if needs_derivative(x, right, left, bias):
        # torch's own gradients run in C++, those of the operator in Python.
        return _composed(x, right, left, pivots, bias)
    return call_without_autograd(_operator, x, right, left, pivots, bias)


def _composed(x: Tensor, right: Tensor, left: Tensor, pivots: Tensor, bias: Tensor | None) -> Tensor:
    """Through torch's own gradients of the two products, which keep x and z as two `nn.Linear` do."""
    _check(x, right, left, pivots, bias)
    z = F.linear(x, right)  # [..., rank]
    try:
        y = merge_columns(z, F.linear(z, left), pivots)
    except RuntimeError:  # in the name of this operator, if it is the pivots
        check_pivot_values(_OP, pivots, left.shape[0] + right.shape[0])
        raise
    return y if bias is None else y + bias


def pivot_linear_reference(
    x: Tensor, right: Tensor, left: Tensor, pivots: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The pure-torch twin of `pivot_linear`: specification, test oracle and fallback. Same arguments.

    No shape depends on a value, so it compiles into one graph. It leaves the *values* of the pivots to
    torch's own index checks; the operator's fallback kernel checks them first.
    """
    _check(x, right, left, pivots, bias)
    z = F.linear(x, right)  # [..., rank]
    y = merge_columns_reference(z, F.linear(z, left), pivots)
    return y if bias is None else y + bias


def _check(x: Tensor, right: Tensor, left: Tensor, pivots: Tensor, bias: Tensor | None) -> None:
    out_features = left.shape[0] + right.shape[0] if left.dim() and right.dim() else 0
    check_factors(_OP, x, right, left, bias, out_features)
    check_pivot_shape(_OP, right, pivots, x)


def _fallback(x: Tensor, right: Tensor, left: Tensor, pivots: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, right, left, pivots, bias)
    check_pivot_values(_OP, pivots, left.shape[0] + right.shape[0])
    return pivot_linear_reference(x, right, left, pivots, bias)


def _fake(x: Tensor, right: Tensor, left: Tensor, pivots: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, right, left, pivots, bias)
    return x.new_empty((*x.shape[:-1], left.shape[0] + right.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, right, left, pivots, _ = inputs
    needs_x, needs_right, needs_left, _, _ = ctx.needs_input_grad[:5]
    # z = x @ right.T is not kept: computing it again is one of seven products and saves [tokens, rank] per
    # layer.
    ctx.save_for_backward(
        x if needs_right or needs_left else None,
        right if needs_x or needs_left else None,
        left if needs_x or needs_right else None,
        pivots,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, right, left, pivots = ctx.saved_tensors
    needs_x, needs_right, needs_left, _, needs_bias = ctx.needs_input_grad[:5]
    grad_x = grad_right = grad_left = None
    if needs_x or needs_right or needs_left:
        grad_direct, grad_mixed = split_columns(grad, pivots)
        if needs_left:
            grad_left = weight_gradient(grad_mixed, F.linear(x, right))
        if needs_x or needs_right:
            grad_z = grad_direct + grad_mixed @ left  # [..., rank]
            grad_x = grad_z @ right if needs_x else None
            grad_right = weight_gradient(grad_z, x) if needs_right else None
    return grad_x, grad_right, grad_left, None, sum_to_bias(grad) if needs_bias else None


define_operator("pivot_linear", _fallback)
_operator: Callable[..., Tensor] = torch.ops.eigenprune.pivot_linear.default
register_autocast("pivot_linear", _operator)
torch.library.register_fake(_OP, _fake)
torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
