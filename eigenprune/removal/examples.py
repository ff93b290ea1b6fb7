# SPDX-License-Identifier: Apache-2.0
"""The three sets of examples that a removal is judged on, each with one job."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eigenprune.calibrate import (
    Passage,
    PassageBatch,
    PassageGradients,
    batch_gradients,
    collate,
    passage_batches,
)
from eigenprune.errors import CalibrationError
from eigenprune.evaluate.answers import passage_of, right_answers
from eigenprune.evaluate.token_example import TokenExample
from eigenprune.removal.objective import Score, answer_score, choice_score, loss_score

HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Measured:
    """Of one forward pass over a set.

    Attributes:
        objective: what the search lowers, see `removal.objective`: mean over examples, or over tokens of plain text.
        loss: of the right answers, summed over predicted tokens, mean over passages, in nats.
        token_loss: mean over predicted tokens, in nats.
    """

    objective: float
    loss: float
    token_loss: float


class ExampleSet:
    """Passages in batches made once, so that a forward check costs the forward pass alone.

    Args:
        examples: with answers; [n, window] int64 token windows stand for plain text, of which every token is predicted.
        batch: passages in one run.
        objective: of OBJECTIVES; plain text is always judged by its loss.
    """

    def __init__(self, examples: Sequence[TokenExample] | Tensor, batch: int, objective: str = "loss") -> None:
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
        margin = objective == "margin" and bool(self.examples)
        self._parts = list(scored_examples(self.examples, batch) if margin else scored_passages(self.passages, batch))
        self.weight = 1.0 if self.examples else len(self) / self.tokens
        """From the objective's mean over passages to what `Measured.objective` says."""

    def __len__(self) -> int:
        return len(self.passages)

    @torch.no_grad()
    def measured(self, model: nn.Module) -> Measured:
        """All figures; the model is in evaluation mode."""
        objective = loss = 0.0
        for batch, score in self._parts:
            found = score(model, batch)
            objective += float(found[0].double().sum())
            loss += float(found[1].double().sum())
        return Measured(self.weight * objective / len(self), loss / len(self), loss / self.tokens)

    def gradients(self, model: nn.Module, layers: Mapping[str, nn.Module], autocast: bool = False) -> PassageGradients:
        """Of the mean of the objective over passages, before `weight`; `autocast` as for `batch_gradients`."""
        parts = ((batch, lambda model, batch, score=score: score(model, batch)[0]) for batch, score in self._parts)
        return batch_gradients(model, parts, layers, count=len(self), autocast=autocast)

    def accuracy(self, model: nn.Module) -> float | None:
        """Share answered rightly; None for plain text."""
        if not self.examples:
            return None
        return float(right_answers(model, self.examples, self.batch).double().mean())


def scored_passages(passages: Sequence[Passage], batch: int) -> Iterator[tuple[PassageBatch, Score]]:
    """Batches to be judged by their loss."""
    for rows in passage_batches(passages, batch):
        yield collate([passages[row] for row in rows]), loss_score


def scored_examples(examples: Sequence[TokenExample], batch: int) -> Iterator[tuple[PassageBatch, Score]]:
    """Batches to be judged by their shortfall; the choices of an example stand in one batch, however many they are."""
    free = [example for example in examples if len(example.choices) < 2]
    choosing = [example for example in examples if len(example.choices) > 1]
    for batched, _ in scored_passages([passage_of(example) for example in free], batch):
        yield batched, answer_score
    width = max((len(example.choices) for example in choosing), default=1)
    for rows in passage_batches([passage_of(example) for example in choosing], max(1, batch // width)):
        group = [choosing[row] for row in rows]
        passages = [
            Passage(example.prompt + choice, len(example.prompt)) for example in group for choice in example.choices
        ]
        right = [example.choices.index(example.answer) for example in group]
        yield collate(passages), choice_score([len(example.choices) for example in group], right)


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
    objective: str = "loss",
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
    return Judges(*(ExampleSet(part, batch, objective) for part in (chosen, held_out, retention)))
