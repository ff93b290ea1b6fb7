# SPDX-License-Identifier: Apache-2.0
"""`prune_` with a task: removal, then compression; what it made saves and loads again to the same logits."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, PruneReport, prune_
from eigenprune.errors import CheckpointError, ConfigError
from eigenprune.layers import low_rank_layers
from eigenprune.removal import TaskExamples
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, tiny_model, token_windows
from tests.removal.test_remove import examples

choose = importlib.import_module("eigenprune.prune.choose")
TASK = TaskExamples(
    examples(12), examples(4, 1), settings={"checks": 6, "retention_bound": 9.0, "retention_weight": 0.0}
)


def prune(model: nn.Module, task: TaskExamples | None = TASK, **settings: Any) -> PruneReport:
    config = EigenpruneConfig(**{"method": "eigenprune", "remove": 0.05} | settings)
    return prune_(model, config, windows=token_windows(), task=task, progress=False)


@pytest.mark.parametrize("keep", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_and_loaded_again_it_gives_the_same_logits(kind: str, keep: float, tmp_path: Path) -> None:
    model = tiny_model(kind)
    before = logits(model)
    report = prune(model, keep=keep)
    assert report.removal.after.removed > 0
    assert report.removal.after.held_out_objective < report.removal.before.held_out_objective
    wanted = logits(model)
    assert not torch.equal(wanted, before)
    assert bool(low_rank_layers(model)) == (keep < 1)
    assert report.keep <= keep
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), wanted)
    assert state_hashes(loaded) == state_hashes(model)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert bool(saved["biases"]) == (kind == "llama")  # a Conv1D has a bias as it comes
    assert (saved["keep"], saved["method"], saved["remove"]) == (keep, "eigenprune", 0.05)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), wanted)


def test_a_checkpoint_without_a_bias_it_names_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prune(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["biases"][0]
    del tensors[f"{name}.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks .*bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_keep_is_one_for_a_task_unless_it_is_asked_for() -> None:
    assert EigenpruneConfig(method="eigenprune", task="int-mult").keep == 1
    assert EigenpruneConfig(method="eigenprune", task="int-mult", keep=0.7).keep == 0.7
    assert EigenpruneConfig().keep == 0.8


def test_without_a_task_or_with_one_that_fits_no_method_it_is_a_typed_error() -> None:
    model = tiny_model("gpt2")
    before = state_hashes(model)
    with pytest.raises(ConfigError, match="needs a task"):
        prune(model, task=None)
    with pytest.raises(ConfigError, match="takes no task"):
        prune_(model, EigenpruneConfig(), windows=token_windows(), task=TASK, progress=False)
    with pytest.raises(ConfigError, match="removes nothing for a task"):
        EigenpruneConfig(task="int-mult")
    with pytest.raises(ConfigError, match="remove="):
        EigenpruneConfig(method="eigenprune", remove=0)
    with pytest.raises(ConfigError, match="biases"):
        EigenpruneConfig(biases=["../x"])
    assert state_hashes(model) == before


def test_failure_while_compressing_gives_the_removed_components_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = state_hashes(model)

    def interrupted(*_args: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(choose, "solve_allocation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(model, keep=0.6)
    assert state_hashes(model) == before
    assert low_rank_layers(model) == {}
