# SPDX-License-Identifier: Apache-2.0
"""Shortfalls are those of the literal formula, for answers of any length and for choices, values and gradients."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eigenprune.errors import ConfigError
from eigenprune.evaluate.token_example import TokenExample
from eigenprune.removal.examples import ExampleSet
from eigenprune.removal.objective import MARGIN, SHARPNESS, check_objective, hinge
from eigenprune.spectral import layer_views
from tests.helpers.tiny_models import VOCABULARY, tiny_model, token_windows
from tests.removal.test_remove import examples

ROUNDING = 1e-5  # relative: float32 logits of some hundred products, and a hinge of slope at most 1 on them


def choosing(count: int) -> list[TokenExample]:
    """Prompts with two to four choices of one to three tokens."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for n in range(count):
        prompt = torch.randint(3, VOCABULARY, (2 + n % 3,), generator=generator).tolist()
        choices = [
            tuple(torch.randint(3, VOCABULARY, (1 + (n + c) % 3,), generator=generator).tolist())
            for c in range(2 + n % 3)
        ]
        found.append(TokenExample(tuple(prompt), choices[n % len(choices)], tuple(choices)))
    return found


def answer_logits(model: nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """[answer, vocabulary], one example alone."""
    logits: Tensor = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1]


def literal_hinge(own: Tensor, rivals: Tensor) -> Tensor:
    best = (2 * SHARPNESS * rivals).exp().sum().log() / (2 * SHARPNESS)
    return (1 + (SHARPNESS * (MARGIN - own + best)).exp()).log() / SHARPNESS


def literal_shortfall(model: nn.Module, example: TokenExample) -> Tensor:
    if example.choices:
        likelihoods = torch.stack(
            [
                answer_logits(model, example.prompt, choice).log_softmax(-1)[range(len(choice)), list(choice)].sum()
                for choice in example.choices
            ]
        )
        others = torch.arange(len(example.choices)) != example.choices.index(example.answer)
        return literal_hinge(likelihoods[~others][0], likelihoods[others])
    rows = answer_logits(model, example.prompt, example.answer)
    shortfalls = []
    for row, token in zip(rows, example.answer, strict=True):
        others = torch.arange(len(row)) != token
        shortfalls.append(literal_hinge(row[token], row[others]))
    return torch.stack(shortfalls).sum()


@pytest.mark.parametrize("batch", [1, 3, 50])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_shortfalls_and_their_gradient_are_those_of_the_formula(kind: str, batch: int) -> None:
    model = tiny_model(kind)
    chosen = [*examples(7, answer=3), *choosing(6)]
    found = ExampleSet(chosen, batch, "margin")
    literal = torch.stack([literal_shortfall(model, example) for example in chosen]).mean()
    measured = found.measured(model)
    assert measured.objective == pytest.approx(float(literal.detach()), rel=ROUNDING)
    plain = ExampleSet(chosen, batch).measured(model)
    assert measured.loss == pytest.approx(plain.loss, rel=ROUNDING)
    assert plain.objective == plain.loss

    layers = {name: model.get_submodule(name) for name in layer_views(model)}
    gradients = found.gradients(model, layers)
    slopes = torch.autograd.grad(literal, [layer.weight for layer in layers.values()])
    for (name, layer), slope in zip(layers.items(), slopes, strict=True):
        slope = slope.T if isinstance(layer, Conv1D) else slope
        assert torch.allclose(gradients.weight[name], slope, atol=1e-4 * float(slope.abs().max()) + 1e-9)


def test_text_is_judged_by_its_loss_a_token_whatever_the_objective() -> None:
    model, text = tiny_model("gpt2"), token_windows(3, 9)
    found = ExampleSet(text, 2, "margin").measured(model)
    logits = model(input_ids=text).logits[:, :-1].double().log_softmax(-1)
    literal = -logits.gather(-1, text[:, 1:].unsqueeze(-1)).mean()
    assert found.objective == pytest.approx(float(literal), rel=ROUNDING)
    assert found.token_loss == pytest.approx(float(literal), rel=ROUNDING)


def test_the_hinge_is_never_below_the_hard_one_and_close_to_it() -> None:
    lead = torch.linspace(-9, 9, 181, dtype=torch.float64)
    excess = hinge(lead) - (MARGIN - lead).clamp_min(0)
    assert float(excess.min()) >= 0
    assert float(excess.max()) <= math.log(2) / SHARPNESS + 1e-12


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="margin, loss"):
        check_objective("accuracy")
