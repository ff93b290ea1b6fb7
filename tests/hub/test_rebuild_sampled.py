# SPDX-License-Identifier: Apache-2.0
"""A model calibrated on its own text: its card says how it was sampled, and the base rebuilds it bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, prune_, save_model
from eigenprune.calibrate import BUILTIN, SAMPLED
from eigenprune.cli.check import check_rebuild
from eigenprune.errors import CheckpointError
from eigenprune.hub import build_card, rebuild_command
from eigenprune.hub.facts import read_facts
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import saved_dense

CONFIG: dict[str, Any] = {"keep": 0.7, "windows": 4, "window": 32, "seed": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_dense("llama", tmp_path_factory.mktemp("sampled") / "tiny-base")


@pytest.fixture(params=[SAMPLED, BUILTIN])
def pruned(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> tuple[Path, str]:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = EigenpruneConfig(calibration=None if request.param == SAMPLED else BUILTIN, **CONFIG)
    report = prune_(model, config, cache_dir=tmp_path / "cache", progress=False)
    return save_model(model, tmp_path / "pruned", report=report), request.param


def edited(folder: Path, **calibration: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["provenance"]["calibration"] |= calibration
    path.write_text(json.dumps(config))
    return folder


def test_the_command_names_the_source_and_the_check_rebuilds_it(
    pruned: tuple[Path, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = pruned
    command = rebuild_command(read_facts(folder), "org/base")
    assert f"--calibration {source}" in command
    assert "--windows 4 --window 32" in command
    assert "--seed 6" in command
    monkeypatch.setenv("EIGENPRUNE_CACHE", str(tmp_path / "another"))  # nothing is taken from the first run
    result = check_rebuild(folder, str(base), [], quiet=True)
    assert result["same"], result


def test_budget_least_keep_prior_and_choice_are_part_of_the_command_and_of_the_rebuild(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    settings: dict[str, Any] = {"budget": "bytes", "min_keep": 0.25, "prior": 0.5, "allocation": "zero-sum"}
    settings["choose_windows"] = "coverage"
    config = EigenpruneConfig(calibration="random-tokens", rank_multiple=4, **settings, **CONFIG)
    report = prune_(model, config, cache_dir=tmp_path / "cache", progress=False)
    folder = save_model(model, tmp_path / "pruned", report=report)
    command = rebuild_command(read_facts(folder), "org/base")
    assert "--budget bytes --min-keep 0.25 --prior 0.5 --choose-windows coverage" in command
    assert "--allocation zero-sum" in command
    assert "--calibration random-tokens" in command
    monkeypatch.setenv("EIGENPRUNE_CACHE", str(tmp_path / "another"))
    result = check_rebuild(folder, str(base), [], quiet=True)
    assert result["same"], result


def test_numbers_of_tokens_that_must_not_be_slower_are_part_of_the_command(pruned: tuple[Path, str]) -> None:
    folder = edited(pruned[0])
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert "faster_at" not in config["quantization_config"]
    config["quantization_config"]["faster_at"] = [1, 512]
    path.write_text(json.dumps(config), encoding="utf-8")
    lines = [line.strip(" \\") for line in rebuild_command(read_facts(folder), "org/base").splitlines()]
    assert lines.count("--faster-at 1") == lines.count("--faster-at 512") == 1


def test_the_card_says_how_the_text_was_sampled(pruned: tuple[Path, str]) -> None:
    folder, source = pruned
    said = "written by the base itself: temperature 1, documents of 32 tokens" in build_card(folder, "org/pruned")
    assert said == (source == SAMPLED)


def test_hostile_sampling_facts_stay_out_of_the_card(pruned: tuple[Path, str]) -> None:
    folder = pruned[0]
    for value in ("x", ["x"], {"temperature": "**x**", "document": 1}, {"temperature": True, "document": 8}):
        assert "written by the base" not in build_card(edited(folder, sampling=value), "org/pruned")


def test_a_base_that_writes_another_text_is_told_apart(pruned: tuple[Path, str], base: Path) -> None:
    folder, source = pruned
    words = "writes another calibration text" if source == SAMPLED else "calibration texts"
    with pytest.raises(CheckpointError, match=words):
        check_rebuild(edited(folder, texts_hash="0" * 64), str(base), [], quiet=True)


def test_prune_on_load_samples_the_same_text(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EIGENPRUNE_CACHE", str(tmp_path / "one"))
    on_load = AutoModelForCausalLM.from_pretrained(base, quantization_config=EigenpruneConfig(**CONFIG))
    after = AutoModelForCausalLM.from_pretrained(base)
    report = prune_(after, EigenpruneConfig(**CONFIG), cache_dir=tmp_path / "two", progress=False)
    assert on_load.config.quantization_config.provenance["calibration"] == report.calibration
    assert report.calibration["source"] == SAMPLED
    assert state_hashes(on_load) == state_hashes(after)
    assert all(torch.isfinite(parameter).all() for parameter in on_load.parameters())
