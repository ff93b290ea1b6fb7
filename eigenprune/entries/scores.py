# SPDX-License-Identifier: Apache-2.0
"""What an entry is worth, by rule: scores [rows, m] of a block of rows, float32 or float64, finite, never negative.

`w` is the fine-tuned value of an entry, `w0` what it would go back to (the base model's value, or zero), `d = w - w0`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.calibrate import EntryStatistics
from eigenprune.entries.blocks import Block, rows_of
from eigenprune.errors import CalibrationError

GENERAL = 1.0  # weight of the general set beside the domain's


@dataclass(frozen=True)
class Context:
    """What a rule may look at beside a block.

    Attributes:
        keep: the share that is wanted.
        seed: of random choices.
        statistics: of the calibration examples.
        general: of a second set, where a rule weighs two.
    """

    keep: float = 1.0
    seed: int = 0
    statistics: EntryStatistics | None = None
    general: EntryStatistics | None = None


def random_worth(block: Block, context: Context) -> Tensor:
    """Uniform in [0, 1), by seed, tensor name and place: the control of every other rule."""
    digest = hashlib.sha256(f"{context.seed}/{block.name}/{block.start}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(block.tuned.shape, generator=generator)


def magnitude(block: Block, context: Context) -> Tensor:
    """`|w|`."""
    return block.tuned.abs()


def delta(block: Block, context: Context) -> Tensor:
    """`|d|`."""
    return (block.tuned - block.base).abs_()


def delta_fisher(block: Block, context: Context) -> Tensor:
    """`d^2 E[g^2]`: twice the rise of the loss, in nats, if the entry alone goes back, at a minimum of the loss."""
    squared = _rows(block, _needed(context.statistics).squared_gradient, "squared gradient")
    return (block.tuned - block.base).square_().mul_(squared)


def wanda(block: Block, context: Context) -> Tensor:
    """`|w| ||x_j||`, x_j the j-th input of the linear layer; for tensors that are no linear's weight `|w|` alone."""
    square = _needed(context.statistics).input_square.get(block.name)
    return block.tuned.abs() if square is None else block.tuned.abs() * square.cpu().sqrt()


def d_pruner(block: Block, context: Context) -> Tensor:
    """`I_domain + I_general`, each `|g d| + E[g^2] d^2 / 2`, the rise of the loss on one of two calibration sets.

    D-Pruner adds `sum I_general (w' - w)^2` to the loss on the domain's texts, trains a few steps of it and measures
    the importance there. Here that term counts by its value where the entry is gone, in its own unit, so that both
    parts are nats.
    """
    change = block.tuned - block.base
    return _taylor(block, change, _needed(context.statistics)) + GENERAL * _taylor(
        block, change, _needed(context.general, "a second set of statistics, `general`")
    )


def _taylor(block: Block, change: Tensor, statistics: EntryStatistics) -> Tensor:
    first = (_rows(block, statistics.gradient, "gradient") * change).abs_()
    return first + _rows(block, statistics.squared_gradient, "squared gradient") * change.square() / 2


def _needed(statistics: EntryStatistics | None, what: str = "statistics") -> EntryStatistics:
    if statistics is None:
        raise CalibrationError(f"this rule needs {what}: see `eigenprune.calibrate.collect_entry_statistics`")
    return statistics


def _rows(block: Block, tensors: Mapping[str, Tensor], what: str) -> Tensor:
    if block.name not in tensors:
        raise CalibrationError(
            f"the statistics hold no {what} of {block.name}: collect them on the fine-tuned model, with gradients, or "
            "name the tensor in keep_whole"
        )
    tensor = tensors[block.name]
    return tensor.reshape(rows_of(tensor.shape))[block.rows].cpu()
