# SPDX-License-Identifier: Apache-2.0
"""The three sets of examples that a removal is judged on, each with one job."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eigenprune.calibrate import Passage, PassageBatch, batch_losses, collate, passage_batches
from eigenprune.errors import CalibrationError
from eigenprune.evaluate.answers import passage_of, right_answers
from eigenprune.evaluate.token_example import TokenExample

HELD_OUT_SHARE = 0.25


class ExampleSet:
    """Passages in batches made once, so that a forward check costs the forward pass alone.

    Args:
        examples: with answers; [n, window] int64 token windows stand for plain text, of which every token is predicted.
        batch: passages in one run.
    """

    def __init__(self, examples: Sequence[TokenExample] | Tensor, batch: int) -> None:
        self.examples: tuple[TokenExample, ...] = ()
        if isinstance(examples, Tensor):
            if examples.ndim != 2 or examples.shape[1] < 2:
                raise CalibrationError(f"text of shape {list(examples.shape)}: [windows, window] token ids are needed")
            self.passages = [Passage(tuple(row)) for row in examples.tolist()]
        else:
            self.examples = tuple(examples)
            self.passages = [passage_of(example) for example in examples]
        self.batch = batch
        self.tokens = sum(len(passage.ids) - passage.start for passage in self.passages)
        self._batches: list[PassageBatch] = [
            collate([self.passages[row] for row in rows]) for rows in passage_batches(self.passages, batch)
        ]

    def __len__(self) -> int:
        return len(self.passages)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Summed over predicted tokens, mean over passages, in nats; the model is in evaluation mode."""
        return sum(float(batch_losses(model, batch)[0].double().sum()) for batch in self._batches) / len(self)

    @torch.no_grad()
    def token_loss(self, model: nn.Module) -> float:
        """Mean over predicted tokens, in nats."""
        return self.loss(model) * len(self) / self.tokens

    def accuracy(self, model: nn.Module) -> float | None:
        """Share answered rightly; None for plain text."""
        if not self.examples:
            return None
        return float(right_answers(model, self.examples, self.batch).double().mean())


@dataclass(frozen=True)
class Judges:
    """Who decides what: worth is measured on `search`, groups and the stop on `held_out`, the guard on `retention`."""

    search: ExampleSet
    held_out: ExampleSet
    retention: ExampleSet


def judges_of(
    examples: Sequence[TokenExample],
    held_out: Sequence[TokenExample] | None,
    retention: Sequence[TokenExample] | Tensor,
    batch: int,
    seed: int,
) -> Judges:
    """The three sets; without `held_out`, a quarter of the examples, drawn by `seed`, is set aside for it.

    Raises:
        CalibrationError: too few examples, or none to retain.
    """
    chosen = list(examples)
    if held_out is None:
        if len(chosen) < 2:
            raise CalibrationError(
                f"{len(chosen)} examples: at least two are needed, one to measure worth on and one to hold out"
            )
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
        apart = set(order[: max(1, round(HELD_OUT_SHARE * len(chosen)))])
        held_out = [example for i, example in enumerate(chosen) if i in apart]
        chosen = [example for i, example in enumerate(chosen) if i not in apart]
    if not chosen or not held_out:
        raise CalibrationError("a task needs at least one example to measure worth on and one to hold out")
    if len(retention) == 0:
        raise CalibrationError("retention is empty: give examples or text of what the model must not lose")
    return Judges(ExampleSet(chosen, batch), ExampleSet(held_out, batch), ExampleSet(retention, batch))
