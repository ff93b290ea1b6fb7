# SPDX-License-Identifier: Apache-2.0
"""The factored layer that stands for a dense one."""

from torch import Tensor, nn

from eigenprune.layers import LowRankLinear, dense_weight, is_conv1d
from eigenprune.spectral.pivot import pivot_factors


def layer_of_factors(module: nn.Module, left: Tensor, right: Tensor, layout: str) -> LowRankLinear:
    """A layer of weight `left [out, rank] @ right [rank, in]` (float64) in `layout`.

    Dtype, gradient flag and bias, the same object, are those of the dense `module`.
    """
    pivots = None
    if layout == "pivot":
        left, right, pivots = pivot_factors(left, right)
    return layer_of_parts(module, left, right, pivots)


def layer_of_parts(module: nn.Module, left: Tensor, right: Tensor, pivots: Tensor | None) -> LowRankLinear:
    """As `layer_of_factors`, of what `LowRankLinear.from_factors` takes."""
    dtype = dense_weight(module).dtype
    new = LowRankLinear.from_factors(
        left.to(dtype),
        right.to(dtype),
        pivots=pivots,
        bias=module.bias,  # type: ignore[arg-type]
        conv1d=is_conv1d(module),
    )
    for factor in (new.left.weight, new.right.weight):
        factor.requires_grad_(dense_weight(module).requires_grad)
    return new
