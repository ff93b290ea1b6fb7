# SPDX-License-Identifier: Apache-2.0
"""Gradual magnitude pruning inside a real Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from eigenprune.entries.gradual import GradualMagnitude
from eigenprune.errors import ConfigError
from eigenprune.layers import select_layers
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import tiny_model, token_windows


class Watch(TrainerCallback):
    """The share of the linear weights that is not zero, after each step."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        self.shares.append(share(model))


def share(model: nn.Module) -> float:
    weights = [module.weight for module in select_layers(model).chosen.values()]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def train(model: nn.Module, folder: Path, *callbacks: TrainerCallback, resume: bool = False, **settings: Any) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in token_windows(32, 24)]
    values: dict[str, Any] = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "seed": 1}
    values |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(folder), **values | settings)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)).train(
        resume_from_checkpoint=resume
    )


def test_weights_fall_along_the_cubic_curve_and_pruned_ones_stay_zero(tmp_path: Path) -> None:
    model, watch = tiny_model("llama"), Watch()
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, tmp_path, GradualMagnitude(0.3, every=2, begin=0.1, end=0.7), watch)
    expected = [1.0]
    for step in (2, 4, 6, 8, 10):
        part = min(1.0, (step / 10 - 0.1) / 0.6)
        expected += [0.3 + 0.7 * (1 - part) ** 3] * 2
    assert watch.shares == pytest.approx(expected[:10], abs=1e-3)  # half an entry of each layer, of thousands
    assert share(model) == pytest.approx(0.3, abs=1e-3)
    assert model.lm_head.weight.count_nonzero() >= other["lm_head.weight"].count_nonzero(), "heads are left alone"
    assert not torch.equal(model.model.norm.weight, other["model.norm.weight"]), "the rest trains on"


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    whole = tiny_model("llama")
    train(whole, tmp_path, GradualMagnitude(0.4, every=3), save_strategy="steps", save_steps=5)
    again = tiny_model("llama")
    last = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    assert last.name == "checkpoint-5"
    train(again, tmp_path, GradualMagnitude(0.4, every=3), resume=str(last))
    assert state_hashes(again) == state_hashes(whole)


def test_settings_out_of_range_and_a_model_without_linears_are_refused(tmp_path: Path) -> None:
    for settings, words in (
        ({"keep": 1.2}, "keep=1.2"),
        ({"keep": 0.5, "every": 0}, "every=0"),
        ({"keep": 0.5, "begin": 0.8}, "begin=0.8"),
        ({"keep": 0.5, "scope": "model"}, "'model' is unknown"),
        ({"keep": 0.5, "least": 0.1}, "needs scope='global'"),
    ):
        with pytest.raises(ConfigError, match=words):
            GradualMagnitude(**settings)
    with pytest.raises(ConfigError, match="no linear layer"):
        GradualMagnitude(0.5).on_train_begin(None, None, None, model=nn.Sequential(nn.ReLU()))
