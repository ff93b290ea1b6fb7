# SPDX-License-Identifier: Apache-2.0
"""Answers are scored like one token at a time, whatever the lengths beside them in a batch."""

import math

import pytest
import torch
from torch import Tensor, nn

from eigenprune.errors import CalibrationError
from eigenprune.evaluate import accuracy, answer_losses, right_answers
from eigenprune.evaluate.token_example import TokenExample
from tests.helpers.tiny_models import VOCABULARY, tiny_model

FEW_ROUNDINGS = 64 * 2.0**-24  # of a loss of some nats, in float32 sums of some dozen terms


def examples(count: int = 9, choices: int = 0) -> list[TokenExample]:
    """Prompts of 1 to `count` tokens with answers of 1 to 3."""
    generator = torch.Generator().manual_seed(3)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (size,), generator=generator).tolist())

    found = []
    for n in range(count):
        offered = tuple(draw(1 + (n + k) % 3) for k in range(choices))
        found.append(TokenExample(draw(1 + n), offered[n % choices] if choices else draw(1 + n % 3), offered))
    return found


def literal_loss(model: nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[float, bool]:
    """Token by token, one sequence at a time, without mask or padding, in float64."""
    loss, greedy, ids = 0.0, True, list(prompt)
    for token in answer:
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        loss -= float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return loss, greedy


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_losses_equal_a_literal_loop_at_any_batch(kind: str, batch: int) -> None:
    model = tiny_model(kind).train()
    found = answer_losses(model, examples(), batch)
    model.eval()
    wanted = torch.tensor([literal_loss(model, e.prompt, e.answer)[0] for e in examples()])
    assert torch.allclose(found, wanted, rtol=FEW_ROUNDINGS, atol=0)


def test_mode_of_the_model_is_as_before() -> None:
    model = tiny_model("llama").train()
    answer_losses(model, examples())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_with_choices_the_likeliest_counts() -> None:
    model = tiny_model("llama")
    asked = examples(40, choices=3)
    wanted = []
    for example in asked:
        losses = [literal_loss(model, example.prompt, choice)[0] for choice in example.choices]
        wanted.append(example.choices[losses.index(min(losses))] == example.answer)
    assert right_answers(model, asked, 7).tolist() == wanted
    assert 0 < sum(wanted) < len(wanted)
    assert accuracy(model, asked) == sum(wanted) / len(wanted)


def test_without_choices_every_token_must_be_the_first_choice() -> None:
    model = tiny_model("llama")
    asked = []
    for example in examples(12):
        ids = list(example.prompt)
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        said = tuple(ids[len(example.prompt) :])
        wrong = (said[0], said[1], (said[2] + 1) % VOCABULARY)
        asked += [TokenExample(example.prompt, said), TokenExample(example.prompt, wrong)]
    assert right_answers(model, asked, 5).tolist() == [True, False] * 12


def test_nothing_to_score_and_what_cannot_be_scored() -> None:
    model = tiny_model("llama")
    assert answer_losses(model, []).shape == (0,)
    with pytest.raises(CalibrationError, match="no examples"):
        accuracy(model, [])
    with pytest.raises(CalibrationError, match="vocabulary of 128"):
        answer_losses(model, [TokenExample((1, 2), (VOCABULARY,))])
    with pytest.raises(CalibrationError, match="no causal language model"):
        answer_losses(tiny_model("bert"), examples())
    with pytest.raises(CalibrationError, match="batch of 0"):
        answer_losses(model, examples(), 0)


def test_a_model_that_knows_nothing_loses_log_vocabulary_a_token() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(0)
    found = answer_losses(model, examples(3))
    tokens = torch.tensor([len(e.answer) for e in examples(3)])
    assert torch.allclose(found, tokens * math.log(VOCABULARY), rtol=FEW_ROUNDINGS)
