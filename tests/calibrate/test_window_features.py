# SPDX-License-Identifier: Apache-2.0
"""Features of windows against their definitions written out, with whole gradients and whole predictions."""

import pytest
import torch
from torch import Tensor

from eigenprune import EigenpruneConfig, prune_
from eigenprune.calibrate import window_features
from eigenprune.errors import CalibrationError
from eigenprune.layers import select_layers
from tests.helpers.tiny_models import tiny_model, token_windows

COUNT, WINDOW = 3, 32
FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions are compared in float32 on every machine."""
    monkeypatch.setattr("eigenprune.calibrate.collect.has_fast_bfloat16", lambda _device: False)


def mean_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:])


def test_embedding_and_error_length_are_those_of_the_definition() -> None:
    model, windows = tiny_model("llama"), token_windows(COUNT, WINDOW)
    found = window_features(model, windows, ["embedding", "el2n"], progress=False)
    for index, ids in enumerate(windows.split(1)):
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        hidden = output.hidden_states[-1][0].double().mean(0)
        torch.testing.assert_close(found["embedding"][index].double(), hidden, rtol=0, atol=WINDOW * FLOAT32)
        errors = []
        for row, token in zip(output.logits[0, :-1].double(), ids[0, 1:], strict=True):
            target = torch.zeros_like(row)
            target[token] = 1
            errors.append((row.softmax(-1) - target).norm())
        expected = torch.stack(errors).mean()
        torch.testing.assert_close(found["el2n"][index].double(), expected, rtol=64 * FLOAT32, atol=0)
    assert found["index"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_length_is_that_of_whole_gradients(kind: str) -> None:
    model, windows = tiny_model(kind), token_windows(COUNT, WINDOW)
    layers = select_layers(model).chosen
    found = window_features(model, windows, ["grand"], layers=layers, progress=False)["grand"]
    for index, ids in enumerate(windows.split(1)):
        model.zero_grad()
        mean_loss(model, ids).backward()
        squares = sum(layer.weight.grad.double().square().sum() for layer in layers.values())
        # Two orders of summing as many products as a window has tokens.
        torch.testing.assert_close(found[index].double(), squares.sqrt(), rtol=WINDOW * 8 * FLOAT32, atol=0)
    assert found.std() > 0.01 * found.mean()  # else any number would do


def test_damage_is_the_divergence_of_whole_predictions_and_none_between_equals() -> None:
    model, windows = tiny_model("llama"), token_windows(COUNT, WINDOW)
    pruned = tiny_model("llama")
    prune_(pruned, EigenpruneConfig(keep=0.5), windows=windows, progress=False)
    found = window_features(model, windows, ["damage"], pruned=pruned, progress=False)["damage"]
    for index, ids in enumerate(windows.split(1)):
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0].double().softmax(-1) for m in (model, pruned))
        middle = (p + q) / 2
        each = 0.5 * (p * (p / middle).log()).sum(1) + 0.5 * (q * (q / middle).log()).sum(1)
        # A divergence is a sum of terms of both signs that are each as large as a probability times a logarithm.
        torch.testing.assert_close(found[index].double(), each.mean(), rtol=0, atol=16 * FLOAT32)
    assert found.min() > 1e-4
    same = window_features(model, windows, ["damage"], pruned=tiny_model("llama"), progress=False)["damage"]
    assert same.abs().max() <= 16 * FLOAT32


def test_model_is_left_as_it_was() -> None:
    model, windows = tiny_model("llama").train(), token_windows(2, WINDOW)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    window_features(model, windows, ["embedding", "grand"], layers=select_layers(model).chosen, progress=False)
    assert model.training
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][1]
        assert torch.equal(parameter, before[name][0])


def test_what_is_missing_is_named() -> None:
    model, windows = tiny_model("llama"), token_windows(2, WINDOW)
    with pytest.raises(CalibrationError, match="unknown features"):
        window_features(model, windows, ["loss"], progress=False)
    with pytest.raises(CalibrationError, match="pruned model"):
        window_features(model, windows, ["damage"], progress=False)
    with pytest.raises(CalibrationError, match="predicts no next token"):
        window_features(tiny_model("bert"), windows, ["el2n"], progress=False)
    with pytest.raises(CalibrationError, match="layers"):
        window_features(model, windows, ["grand"], progress=False)
