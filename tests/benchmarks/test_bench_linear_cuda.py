# SPDX-License-Identifier: Apache-2.0
"""What bench_linear_cuda.py does without a GPU: it says so; and its arithmetic, by hand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_linear_cuda.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # it imports its neighbour, environment.py
    spec = importlib.util.spec_from_file_location("bench_linear_cuda", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_fails():
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 1
    assert "torch sees no CUDA device here" in result.stderr
    assert "Traceback" not in result.stderr


def test_rank_is_the_largest_that_fits(script):
    for out, features in script.SHAPES:
        for keep in script.KEEPS:
            for layout in script.LAYOUTS:
                rank = script.rank_for(keep, out, features, layout)
                sizes = [script.kept_parameters(r, out, features, layout) for r in (rank, rank + 8)]
                assert rank % 8 == 0
                assert sizes[0] <= keep * out * features < sizes[1]


def test_kept_parameters_by_hand(script):
    assert script.kept_parameters(2, 5, 7, "pair") == 2 * (5 + 7)
    assert script.kept_parameters(2, 5, 7, "pivot") == 2 * 7 + (5 - 2) * 2


def test_ratio_is_taken_turn_by_turn(script):
    samples = {"dense": [4.0, 40.0, 4.0], "two": [2.0, 20.0, 2.0], "ours": [2.0, 20.0, 1.0]}
    row = script.summarise(samples)
    assert row["against_dense"]["median"] == 2.0
    assert row["against_two"] == {"median": 1.0, "p20": 1.0, "p80": 1.6}


def test_rules_stop_before_the_first_loss(script):
    def row(dtype, batch, ratio):
        return {"dtype": dtype, "batch": batch, "against_two": {"median": ratio}}

    rows = [row("float32", 1, 1.2), row("float32", 4, 1.1), row("float32", 4, 0.9), row("float32", 16, 1.5)]
    rows += [row("float16", 1, 0.8), row("bfloat16", 1, 1.0), row("bfloat16", 16, 1.0), row("bfloat16", 64, 0.1)]
    assert script.rules(rows) == {"float32": 1, "float16": 0, "bfloat16": 16}
