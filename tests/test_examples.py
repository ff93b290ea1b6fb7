# SPDX-License-Identifier: Apache-2.0
"""The examples, run whole on a tiny model."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM

from eigenprune.layers import low_rank_layers
from tests.helpers.tiny_models import saved_dense

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MOST_LINES = 60


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES, path.name


def test_lora_on_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setenv("EIGENPRUNE_CACHE", str(tmp_path / "cache"))
    saved_dense("llama", tmp_path / "dense")
    rows = [{"question": f"What is {i} and {i + 3}?", "answer": f"It is {2 * i + 3}, since we add."} for i in range(90)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    example("lora_on_pruned").main(str(tmp_path / "dense"), tmp_path / "train.jsonl", tmp_path / "out")
    pruned, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / part) for part in ("pruned", "merged"))
    before, after = ({name: layer.rank for name, layer in low_rank_layers(m).items()} for m in (pruned, merged))
    grown = {name.rpartition(".")[2] for name in after if after[name] != before.get(name)}
    assert grown <= {"q_proj", "v_proj", "down_proj"}
    assert "q_proj" in grown
    assert "Question" in capsys.readouterr().out.replace(" ", "")
