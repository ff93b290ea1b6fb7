# SPDX-License-Identifier: Apache-2.0
"""How well a model answers: the loss of right answers, and accuracy, over examples of any lengths."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from eigenprune.calibrate import Passage, passage_batches, passage_losses
from eigenprune.errors import CalibrationError
from eigenprune.evaluate._mode import evaluation
from eigenprune.evaluate.token_example import TokenExample

BATCH = 16


def passage_of(example: TokenExample) -> Passage:
    """The prompt with its right answer, the answer predicted."""
    return Passage(example.prompt + example.answer, len(example.prompt))


def score_passages(model: nn.Module, passages: Sequence[Passage], batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """(Loss in nats summed over the predicted tokens, whether greedy decoding says them), each [n], on the CPU.

    Evaluation mode, no gradients; the model's mode is as before afterwards. Empty for no passages.

    Raises:
        CalibrationError: the model is no causal language model, `batch` is below 1, or a token id is unknown to it.
    """
    losses = torch.zeros(len(passages))
    greedy = torch.zeros(len(passages), dtype=torch.bool)
    with evaluation(model):
        for rows in passage_batches(passages, batch):
            found = passage_losses(model, [passages[row] for row in rows])
            losses[rows], greedy[rows] = found[0].cpu(), found[1].cpu()
    return losses, greedy


def answer_losses(model: nn.Module, examples: Sequence[TokenExample], batch: int = BATCH) -> Tensor:
    """Minus the log-likelihood of each right answer, [n] float32 nats, summed over its tokens; padding counts nothing.

    Raises:
        CalibrationError: as for `score_passages`.
    """
    return score_passages(model, [passage_of(example) for example in examples], batch)[0]


def right_answers(model: nn.Module, examples: Sequence[TokenExample], batch: int = BATCH) -> Tensor:
    """Whether each example is answered rightly, [n] bool.

    With choices: the right one has the highest log-likelihood summed over its tokens, the first of equal ones taken.
    Without: every token of the answer is the model's first choice, so greedy decoding gives just this answer.

    Raises:
        CalibrationError: as for `score_passages`.
    """
    passages = [
        Passage(example.prompt + text, len(example.prompt))
        for example in examples
        for text in example.choices or (example.answer,)
    ]
    losses, greedy = score_passages(model, passages, batch)
    counts = [len(example.choices) or 1 for example in examples]
    right = torch.zeros(len(examples), dtype=torch.bool)
    for row, (example, end) in enumerate(zip(examples, accumulate(counts), strict=True)):
        first = end - counts[row]
        if example.choices:
            right[row] = example.choices[int(losses[first:end].argmin())] == example.answer
        else:
            right[row] = greedy[first]
    return right


def accuracy(model: nn.Module, examples: Sequence[TokenExample], batch: int = BATCH) -> float:
    """The share of examples answered rightly, in 0..1; see `right_answers`.

    Raises:
        CalibrationError: there are no examples, or as for `score_passages`.
    """
    if not examples:
        raise CalibrationError("no examples: there is no accuracy of none")
    return float(right_answers(model, examples, batch).double().mean())
