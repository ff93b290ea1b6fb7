# SPDX-License-Identifier: Apache-2.0
"""Two formulas that the gradients of every linear operator share."""

from __future__ import annotations

from torch import Tensor


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient [out, in] of the weight of y = x @ weight.T, from grad [..., out] and x [..., in]."""
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def sum_to_bias(grad: Tensor) -> Tensor:
    """The gradient [out] of the bias, from grad [..., out]."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)
