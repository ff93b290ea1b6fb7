# SPDX-License-Identifier: Apache-2.0
"""The last step of the demo, on a tiny model."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM

from eigenprune.calibrate.cache import model_fingerprint
from tests.hub.shared import pruned_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("hub_round_trip", BENCHMARKS / "hub_round_trip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hub_round_trip", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_pushed_and_pulled_model_is_the_same_and_is_told_of(script: ModuleType, tmp_path: Path) -> None:
    folder, _ = pruned_folder(tmp_path, "small", keep=0.7)
    found = script.round_trip(folder, "the quick")
    assert found.fingerprint == model_fingerprint(AutoModelForCausalLM.from_pretrained(folder))
    assert found.text.replace(" ", "").startswith("thequick")
    assert {"README.md", "config.json", "model.safetensors"} <= found.files.keys()
    assert found.requests > 10
    assert found.commit[:12] in script.told(found)
