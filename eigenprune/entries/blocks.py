# SPDX-License-Identifier: Apache-2.0
"""A tensor of a pair of models, seen as rows and read a block of rows at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.errors import WeightError

ENTRIES = 1 << 18  # of a block: 1 MB in float32, so that the temporary copies of a rule stay small beside any model


@dataclass(frozen=True)
class Block:
    """Some rows of one tensor: `tuned` and `base` [rows, m], float32 (float64 where the tensor is), not to be changed.

    Attributes:
        name: of the tensor.
        start: number of the first row.
        tuned: values of the fine-tuned model.
        base: values that entries which are not kept go back to: those of the base model, or zeros.
    """

    name: str
    start: int
    tuned: Tensor
    base: Tensor

    @property
    def rows(self) -> slice:
        """Which rows of the tensor these are."""
        return slice(self.start, self.start + self.tuned.shape[0])


@dataclass(frozen=True)
class Entries:
    """One tensor of the pair as rows along its first axis; a vector is one row, as KEN has it.

    Attributes:
        name: of the tensor.
        tuned: the tensor of the fine-tuned model, any rank and floating dtype.
        base: the base model's, of the same shape; None for zeros.
        transposed: whether both are turned on their side, beside what the models hold.
    """

    name: str
    tuned: Tensor
    base: Tensor | None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, entries of a row)."""
        return rows_of(self.tuned.shape)

    def shaped(self, mask: Tensor) -> Tensor:
        """A flat or [rows, m] mask in the shape that the model holds the tensor in."""
        mask = mask.reshape(self.tuned.shape)
        return mask.t() if self.transposed else mask

    def blocks(self) -> Iterator[Block]:
        """The rows from first to last, `ENTRIES` entries or at least one row at a time.

        Raises:
            WeightError: NaN or infinity, in either model.
        """
        count, width = self.shape
        step = max(1, ENTRIES // max(1, width))
        for start in range(0, count, step):
            tuned = self._rows(self.tuned, start, step, "fine-tuned")
            base = torch.zeros_like(tuned) if self.base is None else self._rows(self.base, start, step, "base")
            yield Block(self.name, start, tuned, base.to(tuned.dtype))

    def _rows(self, tensor: Tensor, start: int, step: int, whose: str) -> Tensor:
        rows = tensor.detach().reshape(self.shape)[start : start + step].cpu()
        rows = rows if rows.dtype == torch.float64 else rows.float()
        # A sum is NaN or infinite if an entry is, and costs no memory.
        if not torch.isfinite(rows.sum(dtype=torch.float64)):
            self._raise(rows, tensor.shape, start, whose)
        return rows

    def _raise(self, rows: Tensor, shape: torch.Size, start: int, whose: str) -> None:
        bad = (~torch.isfinite(rows)).reshape(-1).nonzero()
        if len(bad):
            place = int(bad[0]) + start * rows.shape[1]
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), shape))
            index = index[::-1] if self.transposed else index
            value = float(rows.reshape(-1)[bad[0]])
            raise WeightError(f"{self.name}: {value} at index {index} of the {whose} model; entries cannot be ranked")


def rows_of(shape: torch.Size) -> tuple[int, int]:
    """(rows, entries of a row) of a tensor: the first axis counts rows; a vector or a scalar is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
