# SPDX-License-Identifier: Apache-2.0
"""Trained Rank Pruning inside a real Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from eigenprune import collect_statistics, save_model
from eigenprune.errors import ConfigError
from eigenprune.layers import LowRankLinear, dense_weight, factored_parameters, low_rank_layers, select_layers
from eigenprune.recover import TrainedRankPruning
from eigenprune.recover.rank_pruning import low_rank_factors
from eigenprune.spectral import Metric
from tests.helpers.adapters import difference, pruned_model
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, tiny_model, token_windows

SAME = 1e-5  # factors instead of their product, in float32: the bound of a merge


def trainer_of(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in token_windows(32, 24)]
    values: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    arguments = TrainingArguments(str(folder), **values | settings)
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


class Watch(TrainerCallback):
    """Ranks of one weight after each step."""

    def __init__(self, name: str) -> None:
        self.name, self.ranks = name, list[int]()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        values = torch.linalg.svdvals(dense_weight(model.get_submodule(self.name)).detach().double())
        # Rounded to float32, a weight of lower rank has other singular values of at most that size.
        self.ranks.append(int((values > 1e-6 * values[0] * len(values) ** 0.5).sum()))


def kept(model: nn.Module, dense: nn.Module) -> float:
    shapes = {name: dense_weight(module).shape for name, module in select_layers(dense).chosen.items()}
    factored = low_rank_layers(model)
    stored = [
        factored_parameters(factored[name].rank, *shape, factored[name].layout) if name in factored else shape.numel()
        for name, shape in shapes.items()
    ]
    return sum(stored) / sum(shape.numel() for shape in shapes.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_training_ends_in_a_factored_checkpoint_that_loads_plainly(kind: str, layout: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    callback = TrainedRankPruning(keep=0.6, every=4, layout=layout)
    trainer = trainer_of(model, tmp_path, callback)
    trainer.train()
    assert 0.5 <= kept(model, tiny_model(kind)) <= 0.6
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == callback.ranks
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert isinstance(again, type(model))
    assert state_hashes(again) == state_hashes(model)
    save_model(model, tmp_path / "checked")
    settings = again.config.quantization_config
    assert settings.provenance["keep"] == pytest.approx(kept(model, tiny_model(kind)))


def test_weights_have_their_rank_after_each_truncation_and_not_in_between(tmp_path: Path) -> None:
    watch = Watch("model.layers.0.mlp.down_proj")
    callback = TrainedRankPruning(keep=0.5, every=3, ramp=0.0)
    trainer_of(tiny_model("llama"), tmp_path, callback, watch).train()
    rank = callback.ranks[watch.name]
    assert watch.ranks == [64, 64, rank] * 4
    assert rank < 64


def test_budget_falls_to_its_target_over_the_ramp(tmp_path: Path) -> None:
    watch = Watch("model.layers.0.mlp.down_proj")
    callback = TrainedRankPruning(keep=0.4, every=2, ramp=0.5)
    trainer_of(tiny_model("llama"), tmp_path, callback, watch).train()
    ranks = watch.ranks[1::2]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[1] > ranks[2] == ranks[3] == ranks[-1]
    assert [callback.keep_at(step, 12) for step in (0, 3, 6, 12)] == pytest.approx([1.0, 0.7, 0.4, 0.4])


def test_factoring_at_the_end_changes_nothing_that_the_last_truncation_left(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
            seen.append(logits(model.eval()))

    look, model = Look(), tiny_model("llama")
    trainer_of(model, tmp_path, look, TrainedRankPruning(keep=0.6, every=4), Look()).train()
    assert isinstance(model.model.layers[0].mlp.up_proj, LowRankLinear)
    assert difference(seen[1], seen[0]) <= SAME


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    """The break is between two truncations, and the nuclear norm is on."""
    states = []
    for folder, resume in (("whole", None), ("whole", tmp_path / "whole" / "checkpoint-7")):
        model = tiny_model("llama")
        callback = TrainedRankPruning(keep=0.6, every=3, nuclear=0.5)
        trainer = trainer_of(model, tmp_path / folder, callback, save_strategy="steps", save_steps=7)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        states.append(state_hashes(model))
    assert states[0] == states[1]


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    outputs = []
    for batch, accumulated in ((4, 1), (2, 2)):
        model, watch = tiny_model("llama"), Watch("model.layers.0.mlp.down_proj")
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "optim": "sgd"}
        callback = TrainedRankPruning(keep=0.6, every=4, ramp=0.0)
        trainer_of(model, tmp_path, callback, watch, **settings).train()
        outputs.append((watch.ranks, logits(model.eval())))
    assert outputs[0][0] == outputs[1][0]
    # Twelve steps on gradients that are the same sums in another order.
    assert difference(outputs[0][1], outputs[1][1]) <= 1e-4


def test_nuclear_norm_is_pulled_down(tmp_path: Path) -> None:
    norms = []
    for nuclear in (0.0, 20.0):
        model = tiny_model("llama")
        trainer_of(model, tmp_path, TrainedRankPruning(keep=0.6, every=4, nuclear=nuclear)).train()
        weights = [layer.weight.detach() for layer in low_rank_layers(model).values()]
        norms.append(sum(float(torch.linalg.matrix_norm(weight, "nuc")) for weight in weights))
    assert norms[1] < 0.9 * norms[0]


def test_at_equal_rank_it_loses_less_than_truncating_a_normally_trained_model(tmp_path: Path) -> None:
    """Random rows learned by heart leave no rank unused, so truncation hurts; benchmarks/trp.py has the figures."""
    settings = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    callback = TrainedRankPruning(keep=0.3, every=5)
    trained, normal = tiny_model("llama"), tiny_model("llama")
    trainer_of(trained, tmp_path, callback, **settings).train()
    trainer_of(normal, tmp_path, **settings).train()
    for name, rank in callback.ranks.items():
        layer = normal.get_submodule(name)
        left, right = low_rank_factors(layer.weight.detach(), Metric(), rank)
        layer.weight.data = (left @ right).float()
    ids = token_windows(32, 24)
    with torch.no_grad():
        losses = [float(model.eval()(input_ids=ids, labels=ids).loss) for model in (trained, normal)]
    assert losses[0] < losses[1] - 0.2


def test_energy_target_gives_each_layer_its_own_rank(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.copy_(torch.outer(weight[:, 0], weight[0]))
    callback = TrainedRankPruning(energy=0.8, every=4)
    trainer_of(model, tmp_path, callback, learning_rate=1e-4).train()
    assert callback.ranks["model.layers.0.self_attn.q_proj"] == 8
    assert max(callback.ranks.values()) > 16


def test_truncation_in_the_metric_of_statistics(tmp_path: Path) -> None:
    model = tiny_model("llama")
    layers = select_layers(model).chosen
    statistics = collect_statistics(model, token_windows(8, 24), layers, progress=False)
    callback = TrainedRankPruning(keep=0.6, every=6, method="kfac", statistics=statistics)
    trainer_of(model, tmp_path, callback).train()
    assert len(set(callback.ranks.values())) > 2  # a global choice
    assert kept(model, tiny_model("llama")) <= 0.6


def frozen() -> PreTrainedModel:
    model = tiny_model("llama")
    for module in select_layers(model).chosen.values():
        module.requires_grad_(False)
    return model


def test_models_that_it_cannot_train_are_refused_before_the_first_step(tmp_path: Path) -> None:
    for model, says in ((pruned_model(), "factored already"), (frozen(), "no trainable linear layer")):
        before = state_hashes(model)
        with pytest.raises(ConfigError, match=says):
            trainer_of(model, tmp_path, TrainedRankPruning(keep=0.6)).train()
        assert state_hashes(model) == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"every": 0}, "every=0"),
        ({"ramp": 1.5}, "ramp=1.5"),
        ({"nuclear": -1.0}, "nuclear"),
        ({"method": "kfac"}, "statistics"),
        ({"method": "magic"}, "unknown"),
        ({"energy": 0.9}, "not both"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainedRankPruning(keep=0.6, **settings)
