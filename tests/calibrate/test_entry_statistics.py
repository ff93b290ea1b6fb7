# SPDX-License-Identifier: Apache-2.0
"""Statistics of single entries against a loop over examples and tokens; the model is as before afterwards."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from eigenprune.calibrate import collect_entry_statistics
from eigenprune.errors import CalibrationError, WeightError
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import tiny_model


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertForSequenceClassification(config)


def examples(labels: bool = True) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for padded in (0, 2, 3):
        ids = torch.randint(1, 40, (1, 8), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, 8 - padded :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
        if labels:
            found[-1]["labels"] = torch.randint(0, 3, (1,), generator=generator)
    return found


def test_gradients_and_inputs_equal_a_loop() -> None:
    model = classifier()
    statistics = collect_entry_statistics(model, examples(), input_grams=True)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    seen: list[torch.Tensor] = []
    handle = model.bert.encoder.layer[0].intermediate.dense.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    gradients = []
    for example in examples():
        model.zero_grad()
        logits = model(input_ids=example["input_ids"], attention_mask=example["attention_mask"]).logits
        nn.functional.cross_entropy(logits, example["labels"]).backward()
        gradients.append({n: p.grad.double() for n, p in model.named_parameters()})
    handle.remove()
    for parameter in (
        "bert.embeddings.word_embeddings.weight",
        name,
        "bert.embeddings.LayerNorm.bias",
        "classifier.bias",
    ):
        mean = sum(g[parameter] for g in gradients) / 3
        square = sum(g[parameter].square() for g in gradients) / 3
        # float32 against float64: a few hundred roundings of 6e-8 of the single gradients, whose mean may cancel.
        bound = 1e-5 * float(square.max())
        torch.testing.assert_close(
            statistics.gradient[parameter].double(), mean, rtol=0, atol=1e-5 * float(square.max()) ** 0.5
        )
        torch.testing.assert_close(statistics.squared_gradient[parameter].double(), square, rtol=0, atol=bound)
    rows = torch.cat([x[0][example["attention_mask"][0] == 1] for x, example in zip(seen, examples(), strict=True)])
    assert rows.shape == (8 + 6 + 5, weight.shape[1])
    gram = rows.double().t() @ rows.double() / len(rows)
    torch.testing.assert_close(statistics.input_gram[name].double(), gram, rtol=0, atol=1e-5 * float(gram.max()))
    torch.testing.assert_close(statistics.input_square[name], statistics.input_gram[name].diagonal())
    assert statistics.examples == 3


def test_the_model_is_as_before() -> None:
    model = classifier().train()
    model.classifier.bias.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before, hooks = state_hashes(model), sum(len(m._forward_pre_hooks) for m in model.modules())
    state = torch.get_rng_state()
    collect_entry_statistics(model, examples(labels=False))
    assert state_hashes(model) == before
    assert model.training
    assert not model.classifier.bias.requires_grad
    assert torch.equal(model.classifier.weight.grad, torch.ones(3, 16))
    assert model.bert.pooler.dense.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_drawn_labels_follow_the_seed_and_inputs_alone_need_no_gradient() -> None:
    model = classifier()
    runs = [collect_entry_statistics(model, examples(labels=False), seed=seed) for seed in (0, 0, 5)]
    name = "classifier.weight"
    assert torch.equal(runs[0].gradient[name], runs[1].gradient[name])
    assert not torch.equal(runs[0].gradient[name], runs[2].gradient[name])
    only = collect_entry_statistics(model, examples(labels=False), gradients=False)
    assert not only.gradient
    assert torch.equal(only.input_square[name], runs[0].input_square[name])


def test_a_gpt2_is_measured_as_it_is_stored_and_counts_next_tokens() -> None:
    model = tiny_model("gpt2")
    ids = torch.arange(1, 9)[None]
    labels = ids.clone()
    labels[:, :5] = -100
    statistics = collect_entry_statistics(model, [{"input_ids": ids, "labels": labels}])
    name = "transformer.h.0.mlp.c_fc.weight"
    assert name in statistics.transposed
    assert statistics.input_square[name].shape == (model.transformer.h[0].mlp.c_fc.weight.shape[0],)
    logits = model.eval()(input_ids=ids).logits[0, 4:7]  # they predict tokens 5, 6, 7, the ones with labels
    model.zero_grad()
    nn.functional.cross_entropy(logits, ids[0, 5:], reduction="sum").backward()
    expected = model.transformer.h[0].mlp.c_fc.weight.grad
    torch.testing.assert_close(statistics.gradient[name], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_no_examples_and_no_numbers_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no calibration examples"):
        collect_entry_statistics(classifier(), [])
    model = classifier()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match="NaN or infinity"):
        collect_entry_statistics(model, examples())
