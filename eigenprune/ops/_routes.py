# SPDX-License-Identifier: Apache-2.0
"""Which way a wrapper goes: through the operator, or through torch's own differentiable functions.

The Python autograd kernel that torch.library.register_autograd installs costs more than a small layer's products,
even when no gradient is wanted. These two functions spare it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Result = TypeVar("Result")

# torch.autograd.Function asks this itself; should it ever go, training steps are slower and nothing else changes.
_has_functional_transform: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
# torch.library uses this guard itself; should it ever go, calls are slower and nothing else changes.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def needs_derivative(*tensors: Tensor | None) -> bool:
    """True when a gradient may be asked for through any of these tensors, or in forward differentiation."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def needs_torch_gradients(tensor: Tensor) -> bool:
    """True where torch's own differentiable functions serve better than a short Python gradient: in a traced graph,
    under functional transforms and forward differentiation, and off the CPU, whose gathers alone are slow."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _has_functional_transform()
        or tensor.device.type != "cpu"
    )


def call_without_autograd(operator: Callable[..., Result], *arguments: Any) -> Result:
    """Call an operator whose result needs no derivative, past its autograd kernel; traceable."""
    # A traced graph wants the plain call; inference mode has no autograd kernel to spare.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return operator(*arguments)
    with _below_autograd():
        return operator(*arguments)
