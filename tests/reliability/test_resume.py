# SPDX-License-Identifier: Apache-2.0
"""Interrupted work goes on, and ends with the bits of an unbroken run (row G38)."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from eigenprune import EigenpruneConfig, PruneReport, prune_
from eigenprune.calibrate import Statistics, cache, collect_statistics
from eigenprune.calibrate.accumulate import Accumulator
from eigenprune.layers import select_layers
from tests.helpers.compare import state_hashes, tensor_hash
from tests.helpers.killed import killed_after
from tests.helpers.tiny_models import tiny_model, token_windows

factor = importlib.import_module("eigenprune.prune.factor")
WINDOWS = token_windows(6)
LAYERS = len(select_layers(tiny_model("llama")).chosen)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def _prune(model: nn.Module, folder: Path) -> PruneReport:
    return prune_(model, EigenpruneConfig(keep=0.6), windows=WINDOWS, cache_dir=folder, progress=False)


def _collect(folder: Path | None, memory_bytes: int) -> Statistics:
    model = tiny_model("llama")
    layers = select_layers(model).chosen
    return collect_statistics(model, WINDOWS, layers, cache_dir=folder, memory_bytes=memory_bytes, progress=False)


def _hashes(statistics: Statistics) -> dict[str, str]:
    return {name: tensor_hash(tensor) for name, tensor in statistics.tensors.items()}


@pytest.mark.parametrize("memory_bytes", [8 << 30, 150_000], ids=["one pass", "some passes"])
def test_g38_statistics_killed_after_any_window_of_any_pass_end_with_the_same_bits(
    memory_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_SAVES", 0)
    wanted = _hashes(_collect(None, memory_bytes))
    step, last = 0, []
    stride = 1 if memory_bytes > 1 << 20 else 5  # no common factor with the 6 windows of a pass: the place moves on
    while killed_after(
        step, Accumulator, "check_finite", lambda folder=tmp_path / str(step): _collect(folder, memory_bytes)
    ):
        resumed = _collect(tmp_path / str(step), memory_bytes)
        assert _hashes(resumed) == wanted, step
        last.append(step)
        step += stride
    assert len(last) >= (len(WINDOWS) if stride == 1 else 3)


def test_g38_one_run_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_SAVES", 0)
    kills = 0
    # At its second window each time, the first being repeated: every start gets one window further.
    while killed_after(1, Accumulator, "check_finite", lambda: _collect(tmp_path, 8 << 30)):
        kills += 1
        assert kills <= len(WINDOWS)
    assert kills == len(WINDOWS) - 1
    assert _hashes(_collect(tmp_path, 8 << 30)) == _hashes(_collect(None, 8 << 30))


def test_g38_pruning_killed_at_any_layer_ends_with_the_same_bits_and_measures_nothing_again(tmp_path: Path) -> None:
    wanted_model = tiny_model("llama")
    wanted = _prune(wanted_model, tmp_path / "unbroken")
    factored = [layer.name for layer in wanted.layers if layer.layout != "dense"]
    assert len(factored) >= 12
    for step in range(len(factored)):
        folder = tmp_path / str(step)
        assert killed_after(step, factor, "replace_module_", lambda folder=folder: _prune(tiny_model("llama"), folder))
        model = tiny_model("llama")
        runs: list[int] = []
        handle = model.register_forward_pre_hook(lambda *_args, runs=runs: runs.append(1))  # type: ignore[misc]
        report = _prune(model, folder)
        handle.remove()
        assert len(runs) == 1  # to find which layers share an input
        assert state_hashes(model) == state_hashes(wanted_model), step
        assert report.to_dict() | {"seconds": 0} == wanted.to_dict() | {"seconds": 0}


def test_g38_pruning_interrupted_at_any_layer_can_be_called_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, model = tiny_model("llama"), tiny_model("llama")
    _prune(wanted, tmp_path)
    real = factor.layer_of_factors
    for step in range(LAYERS):
        left = [step]

        def interrupted(*args: Any, left: list[int] = left, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(factor, "layer_of_factors", interrupted)
            try:
                _prune(model, tmp_path)
                break  # fewer layers than that are factored
            except KeyboardInterrupt:
                pass
    else:
        _prune(model, tmp_path)
    assert state_hashes(model) == state_hashes(wanted)
