# SPDX-License-Identifier: Apache-2.0
"""Several factored linears that read one input (q, k, v; gate, up), each with its own rank and layout, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eigenprune.ops._autocast import cast_arguments, has_autocast, register_autocast
from eigenprune.ops._checks import check_equal_lengths, check_factors, check_pivot_shape, check_pivot_values
from eigenprune.ops._library import define_operator, implement
from eigenprune.ops._routes import call_without_autograd, needs_derivative
from eigenprune.ops.low_rank_linear import low_rank_linear_reference
from eigenprune.ops.pivot_linear import pivot_linear_reference

_OP = "eigenprune::grouped_linear"


def grouped_linear(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    pivots: Sequence[Tensor | None] | None = None,
    bias: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Apply several factored Linears to one input: the work of all of them is divided over the threads once.

    Every list has one entry a layer. A layer with pivots is a `pivot_linear`, a layer without is a
    `low_rank_linear`; in groups both may stand, and ranks and outputs may differ.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64; any strides, any leading shape, also an empty one.
        right: [rank_i, in] each, dtype and device of x.
        left: [out_i, rank_i] each, likewise; [out_i - rank_i, rank_i] where the layer has pivots.
        pivots: [rank_i] int32 on x's device, as in `pivot_linear`, or None; None for a list of nothing but None.
        bias: [out_i] each, dtype and device of x, or None; None for a list of nothing but None.

    Returns:
        A list of [..., out_i], one a layer, with the very bits that `low_rank_linear` and `pivot_linear` give.
        Differentiable in everything floating. Under autocast the floating point inputs are cast first.

    Raises:
        RuntimeError: lists of different lengths, and whatever the single operators refuse; the text names the
            operator, the layer by its number from 0, and both shapes.
    """
    pivots = [None] * len(right) if pivots is None else pivots
    bias = [None] * len(right) if bias is None else bias
    if has_autocast(x):
        x, right, left, pivots, bias = cast_arguments((x, right, left, pivots, bias), x.device.type)
    if needs_derivative(x, *right, *left, *bias):
        return _composed(x, right, left, pivots, bias)
    outputs: list[Tensor] = call_without_autograd(_operator, x, right, left, pivots, bias)
    return outputs


def grouped_linear_reference(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    pivots: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
) -> list[Tensor]:
    """The pure-torch twin of `grouped_linear`: specification, test oracle and fallback. Same arguments, all given.

    Like `pivot_linear_reference` it leaves the values of the pivots to torch's own index checks.
    """
    _check(x, right, left, pivots, bias)
    return [
        low_rank_linear_reference(x, one, other, shift)
        if columns is None
        else pivot_linear_reference(x, one, other, columns, shift)
        for one, other, columns, shift in zip(right, left, pivots, bias, strict=True)
    ]


def _check(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    pivots: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
) -> None:
    check_equal_lengths(_OP, right, left, pivots, bias)
    for i, (one, other, columns, shift) in enumerate(zip(right, left, pivots, bias, strict=True)):
        check_factors(_where(i), x, one, other, shift, _out_features(one, other, columns))
        if columns is not None:
            check_pivot_shape(_where(i), one, columns, x)


def _check_values(right: Sequence[Tensor], left: Sequence[Tensor], pivots: Sequence[Tensor | None]) -> None:
    for i, (one, other, columns) in enumerate(zip(right, left, pivots, strict=True)):
        if columns is not None:
            check_pivot_values(_where(i), columns, _out_features(one, other, columns))


def _where(layer: int) -> str:
    return f"{_OP}: layer {layer}"


def _out_features(right: Tensor, left: Tensor, pivots: Tensor | None) -> int:
    if not (right.dim() and left.dim()):  # no matrices; check_factors says so
        return 0
    return left.shape[0] + (0 if pivots is None else right.shape[0])


def _composed(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    pivots: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
) -> list[Tensor]:
    """Through torch's own gradients."""
    if torch.compiler.is_compiling():
        return grouped_linear_reference(x, right, left, pivots, bias)
    try:
        return grouped_linear_reference(x, right, left, pivots, bias)
    except (IndexError, RuntimeError):  # torch names an index; name the layer and the pivot instead
        _check(x, right, left, pivots, bias)
        _check_values(right, left, pivots)
        raise


def _fallback(
    x: Tensor, right: list[Tensor], left: list[Tensor], pivots: list[Tensor | None], bias: list[Tensor | None]
) -> list[Tensor]:
    _check(x, right, left, pivots, bias)
    _check_values(right, left, pivots)
    return grouped_linear_reference(x, right, left, pivots, bias)


def _fake(
    x: Tensor, right: list[Tensor], left: list[Tensor], pivots: list[Tensor | None], bias: list[Tensor | None]
) -> list[Tensor]:
    _check(x, right, left, pivots, bias)
    widths = [_out_features(*layer) for layer in zip(right, left, pivots, strict=True)]
    return [x.new_empty((*x.shape[:-1], width)) for width in widths]


def _autograd(
    keys: torch._C.DispatchKeySet,
    x: Tensor,
    right: list[Tensor],
    left: list[Tensor],
    pivots: list[Tensor | None],
    bias: list[Tensor | None],
) -> Any:
    # Not torch.library.register_autograd: of a list that mixes tensors and None it sees no tensor at all, so a bias
    # beside a missing bias would lose its gradient without a word (torch 2.13, _library/autograd.py).
    if needs_derivative(x, *right, *left, *bias):
        return _composed(x, right, left, pivots, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator.redispatch(keys & torch._C._after_autograd_keyset, x, right, left, pivots, bias)


define_operator("grouped_linear", _fallback)
_operator: Any = torch.ops.eigenprune.grouped_linear.default
register_autocast("grouped_linear", _operator)
torch.library.register_fake(_OP, _fake)
implement("grouped_linear", _autograd, "Autograd", with_keyset=True)
