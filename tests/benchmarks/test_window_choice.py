# SPDX-License-Identifier: Apache-2.0
"""The scripts of the calibration curve and of the choice of windows, on a tiny model and made-up text."""

import gzip
import json
import random
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import saved_dense

FOLDER = Path(__file__).parents[2] / "benchmarks"
WORDS = ["matrix", "rank", "token", "window", "keep", "loss", "the", "of", "and"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the scripts read of the shared folder: 70 rows to calibrate on, and a text to measure on."""
    root = tmp_path_factory.mktemp("shared")
    texts = root / "data" / "wikitext2"
    texts.mkdir(parents=True)
    choose = random.Random(1)
    rows = [" ".join(choose.choices(WORDS, weights=[1 + (i + j) % 7 for j in range(9)], k=300)) for i in range(70)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (texts / "train_samples.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (texts / "test_raw.txt.gz").write_bytes(gzip.compress("\n".join(rows[:20]).encode()))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_dense("llama", tmp_path_factory.mktemp("dense"))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / name))


@pytest.mark.parametrize("rule", ["damage", "grand"])
def test_a_rule_is_measured_on_the_windows_that_it_chooses(
    rule: str, folder: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = script("window_choice.py", monkeypatch)
    bench = found["ChoiceBench"](folder, shared)
    row = bench.measure(found["Row"](f"{rule}#0", "kfac", "pivot", "global", 0.8))
    assert row["perplexity"] > 1
    assert row["kept"] <= 0.8
    assert len(set(bench.chosen)) == 16
    assert max(bench.chosen) < 64
    assert bench.feature_seconds(rule) > 0
    full = row | {"rule": rule, "seed": 0, "dense": 100.0, "feature_cpu_seconds": 1.0}
    assert f"| `{rule}` | {row['perplexity'] / 100:.3f} | 1 |" in found["table"]([full])


def test_the_curve_grows_its_statistics_and_prunes_as_if_it_did_not(
    folder: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = script("calibration.py", monkeypatch)
    grown, direct = (found["CurveBench"](folder, shared) for _ in range(2))
    row = found["Row"]("wikitext2@2", "kfac", "pivot", "global", 0.8)
    grown.measure(found["replace"](row, calibration="wikitext2@1"))
    first, second = grown.measure(row), direct.measure(row)
    assert grown.grown[2].facts == direct.grown[2].facts
    # Statistics differ by their roundings only: by that of bfloat16, where the machine calibrates in it.
    assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-2)
    assert first["token_hash"] == second["token_hash"]
