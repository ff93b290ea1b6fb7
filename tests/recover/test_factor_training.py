# SPDX-License-Identifier: Apache-2.0
"""Training factors in turns and with orthonormal rows, inside a real Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from eigenprune.errors import ConfigError
from eigenprune.layers import LAYOUTS, LowRankLinear, low_rank_layers
from eigenprune.recover import FactorTraining, orthonormalise_
from tests.helpers.adapters import pruned_model
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, token_windows

OUT, IN, RANK = 30, 22, 9
EXACT = 1e-10  # float64, values below 100, one small factorisation


class Watch(TrainerCallback):
    """Hashes of all weights after each step, and how far the rows of `right` are from orthonormal."""

    def __init__(self) -> None:
        self.states, self.distances = list[dict[str, str]](), list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        self.states.append(state_hashes(model))
        self.distances.append(max(distance(layer) for layer in low_rank_layers(model).values()))


def distance(layer: LowRankLinear) -> float:
    rows = layer.right.weight.detach().double()
    return float((rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype)).abs().max())


def train(
    model: nn.Module, folder: Path, callback: TrainerCallback, resume: str | None = None, **settings: Any
) -> Watch:
    rows = [{"input_ids": ids, "labels": ids} for ids in token_windows(16, 24)]
    values: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    arguments = TrainingArguments(str(folder), **values | settings)
    watch = Watch()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback, watch])
    trainer.train(resume_from_checkpoint=resume)
    return watch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_learn_in_turns(layout: str, tmp_path: Path) -> None:
    model = pruned_model("llama", layout)
    before = state_hashes(model)
    watch = train(model, tmp_path, FactorTraining(alternate=2), gradient_accumulation_steps=2)
    assert len(watch.states) == 8
    names = list(low_rank_layers(model))
    for step, (old, new) in enumerate(zip([before, *watch.states], watch.states, strict=False)):
        learns, rests = (("left", "right"), ("right", "left"))[step // 2 % 2]
        assert all(old[f"{name}.{rests}.weight"] == new[f"{name}.{rests}.weight"] for name in names)
        assert all(old[f"{name}.{learns}.weight"] != new[f"{name}.{learns}.weight"] for name in names)


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    states = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = pruned_model("llama", "pair")
        callback = FactorTraining(alternate=2, orthonormal=2)
        train(model, tmp_path, callback, resume, save_strategy="steps", save_steps=3)
        states.append(state_hashes(model))
    assert states[0] == states[1]


def test_rows_are_orthonormal_when_they_should_be(tmp_path: Path) -> None:
    model = pruned_model("llama", "pair")
    watch = train(model, tmp_path, FactorTraining(orthonormal=3))
    rounding = 4 * torch.finfo(torch.float32).eps  # float64 rounded to float32, sums of squares of one
    for step, far in enumerate(watch.distances, 1):
        assert (far <= rounding) == (step in (3, 6, 8)), (step, far)


def pair_layer() -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((OUT, RANK), (RANK, IN)))
    return nn.Sequential(LowRankLinear.from_factors(left, right))


def test_the_weight_stays_and_so_does_what_the_model_says() -> None:
    model = pair_layer()
    weight = model[0].weight.detach().clone()
    assert orthonormalise_(model) is model
    assert distance(model[0]) <= EXACT
    assert float((model[0].weight.detach() - weight).abs().max()) <= EXACT
    tiny = pruned_model("llama", "pair")
    wanted = logits(tiny)
    got = logits(orthonormalise_(tiny))
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_momentum_is_that_of_the_new_factors() -> None:
    """At a learning rate of zero the factors stay, and the momentum is a sum of gradients in them."""
    dense = [torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    moments = []
    for early in (False, True):
        model = pair_layer()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        if early:
            orthonormalise_(model)
        for gradient in dense:
            optimizer.zero_grad()
            (model[0].weight * gradient).sum().backward()
            optimizer.step()
        if not early:
            orthonormalise_(model, optimizer=optimizer)
        moments.append([optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()])
    for late, wanted in zip(*moments, strict=True):
        assert float((late - wanted).abs().max()) <= EXACT * float(wanted.abs().max())


def test_rows_that_depend_on_others_are_left_alone() -> None:
    layer = pair_layer()[0]
    with torch.no_grad():
        layer.right.weight[1] = layer.right.weight[0]
    before = layer.right.weight.clone()
    orthonormalise_(nn.Sequential(layer))
    assert torch.equal(layer.right.weight, before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({}, "train together"), ({"alternate": 0}, "alternate=0"), ({"orthonormal": -1}, "orthonormal=-1")],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FactorTraining(**settings)


def test_models_without_a_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout pivot"):
        train(pruned_model("llama", "pivot"), tmp_path, FactorTraining(orthonormal=1))
    with pytest.raises(ConfigError, match="no factored layer"):
        FactorTraining(alternate=1).on_train_begin(None, None, None, model=nn.Linear(3, 3))
