# SPDX-License-Identifier: Apache-2.0
"""In which mode and precision a model runs while loss is recovered."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from eigenprune.calibrate.collect import has_fast_bfloat16


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), and bfloat16 products for a float32 model where the machine has them.

    Each module has its own mode back afterwards.
    """
    training = {module: module.training for module in model.modules()}
    device = device_of(model)
    fast = dtype_of(model) == torch.float32 and has_fast_bfloat16(device)
    try:
        model.eval()
        # No cache: autocast would go on using the rounded weights of before an optimizer step.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if fast else nullcontext():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def device_of(model: nn.Module) -> torch.device:
    """Where token ids belong."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the first weight."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
