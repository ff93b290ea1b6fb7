# SPDX-License-Identifier: Apache-2.0
"""`Passage`: tokens of which only the later ones are predicted; its loss, in batches of unequal lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenprune.calibrate.objective import is_causal
from eigenprune.errors import CalibrationError

UNSCORED = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True)
class Passage:
    """A text, and from where on its tokens are predicted: a prompt with its answer, or, from 1 on, plain text.

    Attributes:
        ids: token ids, at least two.
        start: the first token that is predicted, in 1..len(ids) - 1.

    Raises:
        CalibrationError: nothing stands before, or nothing from `start` on.
    """

    ids: tuple[int, ...]
    start: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.ids):
            raise CalibrationError(f"a passage of {len(self.ids)} tokens predicts none from position {self.start} on")


@dataclass(frozen=True)
class PassageBatch:
    """Passages of unequal lengths as tensors, filled up on the right.

    Attributes:
        ids: [n, width] int64, the last token of each passage left out: nothing reads it.
        mask: [n, width] int64, 1 where a token stands and 0 in the filling.
        labels: [n, width] int64, the next token where it is predicted, UNSCORED elsewhere.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


def collate(passages: Sequence[Passage]) -> PassageBatch:
    """One batch of at least one passage."""
    width = max(len(passage.ids) for passage in passages) - 1
    ids = torch.zeros(len(passages), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, UNSCORED)
    for row, passage in enumerate(passages):
        tokens, end = torch.tensor(passage.ids), len(passage.ids) - 1
        ids[row, :end], mask[row, :end] = tokens[:-1], 1
        labels[row, passage.start - 1 : end] = tokens[passage.start :]
    return PassageBatch(ids, mask, labels)


def batch_logits(model: nn.Module, batch: PassageBatch) -> tuple[Tensor, Tensor]:
    """One batch through a causal language model: what it says where any of the passages predicts.

    Causal attention reaches no filling from a token that counts, and the filling is masked too. The logits carry a
    gradient where gradients are on.

    Returns:
        ([n, scored, vocabulary] logits, [n, scored] int64 labels, UNSCORED where a passage predicts nothing), on the
        model's device.

    Raises:
        CalibrationError: the model is no causal language model, or a token id is outside its vocabulary.
    """
    if not is_causal(model):
        raise CalibrationError(f"{type(model).__name__} is no causal language model: answers cannot be scored")
    _check_vocabulary(model, batch)
    device = next(model.parameters()).device
    scored = (batch.labels != UNSCORED).any(0).nonzero().flatten()  # the head runs at these positions only
    inputs = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device), "use_cache": False}
    if "logits_to_keep" in signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=scored.to(device)).logits
    else:
        logits = model(**inputs).logits[:, scored]
    return logits, batch.labels[:, scored].to(logits.device)


def logit_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of `batch_logits`: [n] float32 nats, summed over the predicted tokens."""
    return F.cross_entropy(logits.float().mT, wanted, ignore_index=UNSCORED, reduction="none").sum(1)


def batch_losses(model: nn.Module, batch: PassageBatch) -> tuple[Tensor, Tensor]:
    """`logit_losses` of one batch, and whether greedy decoding would say just what each passage does.

    Returns:
        ([n] float32 nats, [n] bool), on the model's device; see `batch_logits`.
    """
    logits, wanted = batch_logits(model, batch)
    greedy = (logits.argmax(-1) == wanted) | (wanted == UNSCORED)
    return logit_losses(logits, wanted), greedy.all(1)


def passage_losses(model: nn.Module, passages: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """`batch_losses` of these passages as one batch."""
    return batch_losses(model, collate(passages))


def passage_batches(passages: Sequence[Passage], batch: int) -> Iterator[list[int]]:
    """The positions of all passages in groups of at most `batch`, those of one length together.

    Raises:
        CalibrationError: `batch` is below 1.
    """
    if batch < 1:
        raise CalibrationError(f"a batch of {batch} passages is none")
    order = sorted(range(len(passages)), key=lambda i: (len(passages[i].ids), i))
    for first in range(0, len(order), batch):
        yield order[first : first + batch]


def _check_vocabulary(model: nn.Module, batch: PassageBatch) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    highest = max(int(batch.ids.max()), int(batch.labels.max()))
    lowest = min(int(batch.ids.min()), int(batch.labels[batch.labels != UNSCORED].min()))
    if lowest < 0 or highest >= vocabulary:
        raise CalibrationError(
            f"token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of {vocabulary}: "
            "is this its tokenizer?"
        )
