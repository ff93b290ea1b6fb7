# SPDX-License-Identifier: Apache-2.0
"""What an entry is worth, by rule: scores [rows, m] of a block of rows, float32 or float64, finite, never negative."""

import hashlib

import torch
from torch import Tensor

from eigenprune.entries.blocks import Block


def random_worth(block: Block, seed: int) -> Tensor:
    """Uniform in [0, 1), by seed, tensor name and place: the control of every other rule."""
    digest = hashlib.sha256(f"{seed}/{block.name}/{block.start}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(block.tuned.shape, generator=generator)


def magnitude(block: Block) -> Tensor:
    """`|w|` of the fine-tuned value."""
    return block.tuned.abs()


def change(block: Block) -> Tensor:
    """`|w - w0|`, `w0` the value that the entry would go back to."""
    return (block.tuned - block.base).abs_()
