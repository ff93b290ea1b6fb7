# SPDX-License-Identifier: Apache-2.0
"""The script of the headline, whose model cannot be had here: the same path on a tiny one, and its verdict."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from eigenprune.hub import read_adapter
from tests.helpers.tiny_models import saved_dense

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "phi2_int_mult.py"


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_whole_path_runs_on_any_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a model with a first token that its tokenizer does not add by itself, as Phi's."""
    folder = saved_dense("llama", tmp_path / "tiny")
    words = ["--model", str(folder), "--train", "24", "--held-out", "16", "--test", "10", "--checks", "8"]
    words += ["--remove", "0.05", "--guard-window", "32", "--adapter", str(tmp_path / "a.safetensors")]
    call(monkeypatch, *words, "--json")
    row = json.loads(capsys.readouterr().out)
    assert (row["model"], row["task"], row["test"]["total"]) == ("tiny", "int-mult", 10)
    assert read_adapter(tmp_path / "a.safetensors").removal.count == row["removal"]["rounds"][-1]["removed"]


def test_verdict_is_by_the_intervals_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    verdict = runpy.run_path(str(SCRIPT))["verdict"]
    assert verdict(11, 80, "before").endswith("interval 7.9 to 23.0 %: inside")
    assert verdict(78, 80, "after").endswith("interval 91.3 to 99.3 %: inside")
    assert verdict(60, 80, "after").endswith("OUTSIDE")
