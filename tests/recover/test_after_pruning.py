# SPDX-License-Identifier: Apache-2.0
"""Recovery as a step of `prune_` and of the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, PruneReport, prune_
from eigenprune.cli.main import with_bare_recover
from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.hub import build_card
from eigenprune.layers import low_rank_layers
from eigenprune.recover import after_pruning, recover_, teacher_targets, training
from tests.cli.test_cli import prose, run
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import saved_dense, tiny_model, token_windows

WINDOWS = token_windows(24, 24)


def pruned(model: nn.Module, **options: Any) -> PruneReport:
    return prune_(model, EigenpruneConfig(keep=0.6), windows=WINDOWS, progress=False, **options)


@pytest.mark.parametrize("method", ["distil", "closed"])
def test_prune_with_recovery_is_pruning_and_then_recovery(method: str) -> None:
    wanted, dense = tiny_model("llama"), tiny_model("llama")
    pruned(wanted)
    report = recover_(wanted, dense, WINDOWS, method=method, progress=False)
    model = tiny_model("llama")
    found = pruned(model, recover=method).recovery
    assert state_hashes(model) == state_hashes(wanted)
    assert found | {"seconds": 0} == report.to_dict() | {"seconds": 0}
    recorded = model.config.quantization_config.provenance.get("recovery")
    assert recorded == (found if found["kept"] else None)


def test_without_recovery_nothing_is_said_of_it() -> None:
    model = tiny_model("llama")
    assert pruned(model).recovery == {}
    assert "recovery" not in model.config.quantization_config.provenance


@pytest.mark.parametrize("step", [0, 3])
def test_failing_recovery_leaves_the_dense_model_and_goes_on_later(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tiny_model("llama")
    pruned(wanted, recover="distil")
    model = tiny_model("llama")
    hashes = state_hashes(model)
    real, left = training._step, [step]

    def failing(*args: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", failing)
        with pytest.raises(KeyboardInterrupt):
            pruned(model, recover="distil", cache_dir=tmp_path)
    assert state_hashes(model) == hashes
    assert not low_rank_layers(model)
    steps: list[int] = []

    def counted(*args: Any) -> float:
        steps.append(1)
        return real(*args)

    monkeypatch.setattr(training, "_step", counted)
    report = pruned(model, recover="distil", cache_dir=tmp_path)
    assert state_hashes(model) == state_hashes(wanted)
    assert len(steps) == report.recovery["steps"] - step


def test_wrong_wishes_are_refused_before_the_dense_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(after_pruning, "teacher_targets", teacher_targets)
    model = tiny_model("llama")
    hashes = state_hashes(model)
    with pytest.raises(ConfigError, match="unknown"):
        pruned(model, recover="magic")
    with pytest.raises(ConfigError, match="no bound in minutes"):
        pruned(model, recover="closed", recover_minutes=1)
    with pytest.raises(CalibrationError, match="1 windows"):
        prune_(model, EigenpruneConfig(keep=0.6), windows=WINDOWS[:1], recover="distil", progress=False)
    assert state_hashes(model) == hashes


def test_bare_recover_gets_a_method() -> None:
    assert with_bare_recover([]) == []
    assert with_bare_recover(["prune", "m", "--recover"]) == ["prune", "m", "--recover", "distil"]
    assert with_bare_recover(["--recover", "--json"]) == ["--recover", "distil", "--json"]
    assert with_bare_recover(["--recover", "perp", "--json"]) == ["--recover", "perp", "--json"]


def test_command_line_recovers_and_the_card_says_so(tmp_path: Path) -> None:
    dense = saved_dense("llama", tmp_path / "dense")
    text = tmp_path / "a.txt"
    text.write_text(prose(2400, 1))
    common = ("prune", dense, "--keep", "0.6", "--texts", text, "--window", "32", "--json")
    done = run(*common, "--out", tmp_path / "out", "--recover", "--recover-minutes", "5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["recovery"]
    assert found["method"] == "distil"
    assert found["settings"]["minutes"] == 5
    assert found["after"] < found["before"]
    assert found["kept"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.quantization_config.provenance["recovery"] == found
    card = build_card(tmp_path / "out", "me/out")
    assert f"| recovery after pruning | `distil` on {found['tokens']:,} tokens, {found['steps']} steps:" in card
    assert "no command rebuilds it" in card
    assert "eigenprune prune" not in card

    for wrong, words in (
        (("--recover", "magic"), "recovery 'magic' is unknown; there are: distil, block, closed, perp"),
        (("--recover-minutes", "5"), "say --recover too"),
    ):
        done = run(*common, "--out", tmp_path / "no", *wrong)
        assert done.returncode == 1
        assert words in done.stderr
        assert not (tmp_path / "no").exists()
