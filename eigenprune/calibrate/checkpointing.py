# SPDX-License-Identifier: Apache-2.0
"""Backward through a deep model with the activations of one block in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """While inside, every block of `model` drops its activations in forward and computes them again in backward.

    Blocks are the items of the outermost `ModuleList`s. transformers' own gradient checkpointing is not used because it
    asks for training mode, and dropout has no place in a measurement.
    """
    wrapped: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    for block in blocks_of(model):
        own = block.__dict__.get("forward")  # set by accelerate's hooks
        wrapped.append((block, own))
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, own in wrapped:
            if own is None:
                del block.__dict__["forward"]
            else:
                block.forward = own


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The items of the outermost `ModuleList`s: the layers of a transformer."""
    blocks: list[nn.Module] = []
    pending = [model]
    while pending:
        for child in pending.pop().children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(child)
            else:
                pending.append(child)
    return blocks
