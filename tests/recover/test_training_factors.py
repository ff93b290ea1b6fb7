# SPDX-License-Identifier: Apache-2.0
"""Training the factors of a pruned model: with Trainer, with gradient checkpointing, compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from eigenprune.layers import LAYOUTS, LowRankLinear, low_rank_layers
from tests.helpers.adapters import pruned_model
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import token_windows

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
IN, OUT, RANK = 24, 40, 8


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@both_layouts
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trainer_trains_both_factors_and_resumes_bit_for_bit(kind: str, layout: str, tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in token_windows(8, 24)]
    settings: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=3,
        logging_steps=1,
        **settings,
    )
    states, start = [], pruned_model(kind, layout)
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = pruned_model(kind, layout)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        states.append(state_hashes(model))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert states[0] == states[1]
    before = state_hashes(start)
    for name in low_rank_layers(model):
        assert all(states[0][f"{name}.{part}.weight"] != before[f"{name}.{part}.weight"] for part in ("right", "left"))
    trainer.save_model(str(tmp_path / "saved"))
    assert state_hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == states[0]


@both_layouts
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(layout: str, reentrant: bool) -> None:
    ids = token_windows(2, 16)
    model = pruned_model("llama", layout).train()
    wanted = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    got = gradients(model, ids)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_training_step_of_the_layer_is_one_graph_and_the_same(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(IN, OUT, RANK, layout=layout, dtype=dtype)
    x, goal = torch.randn(5, IN, dtype=dtype), torch.randn(5, OUT, dtype=dtype)

    def step(x: Tensor, goal: Tensor) -> Tensor:
        return nn.functional.mse_loss(layer(x), goal)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        layer.zero_grad()
        start = x.clone().requires_grad_()
        loss = run(start, goal)
        loss.backward()
        results.append([loss.detach(), start.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    assert len(results[0]) == 5
    assert all(torch.equal(got, wanted) for got, wanted in zip(results[1], results[0], strict=True))


@both_layouts
def test_a_compiled_training_step_of_a_model_is_one_graph_and_near_the_plain_one(layout: str) -> None:
    ids = token_windows(2, 16)
    model = pruned_model("llama", layout).train()
    wanted = gradients(model, ids)
    model.compile(fullgraph=True, backend="aot_eager")
    got = gradients(model, ids)
    largest = max(float(tensor.abs().max()) for tensor in wanted.values())
    # The compiler may order sums in the norms and the attention differently: float32, some hundred terms each.
    assert all(float((got[name] - wanted[name]).abs().max()) <= 1e-5 * largest for name in wanted)


@both_layouts
def test_one_factor_alone_can_be_trained_and_the_other_stays(layout: str) -> None:
    """Alternating training: freeze one part, then the other."""
    model = pruned_model("llama", layout).train()
    for frozen, trained in (("left", "right"), ("right", "left")):
        for layer in low_rank_layers(model).values():
            layer.get_submodule(frozen).requires_grad_(False)
            layer.get_submodule(trained).requires_grad_(True)
        before = state_hashes(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = token_windows(2, 12)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        after = state_hashes(model)
        for name in low_rank_layers(model):
            assert after[f"{name}.{frozen}.weight"] == before[f"{name}.{frozen}.weight"]
            assert after[f"{name}.{trained}.weight"] != before[f"{name}.{trained}.weight"]
