# SPDX-License-Identifier: Apache-2.0
"""`python -m eigenprune`: true, complete, quiet, light, and useful without an extension."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from eigenprune.ops import extension_status
from eigenprune.ops._library import SCHEMAS
from tests.ops.helpers import ROOT, run_python

JSON = "import sys; from eigenprune.ops.environment import main; main(['--json'])"


@functools.cache
def facts(**environment: str) -> dict:
    result = run_python(JSON, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_report_is_printed_and_nothing_else():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "eigenprune"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert re.match(r"versions +python 3\.\d+\.\d+, eigenprune \d", lines[0])
    assert extension_status().reason in lines[1]
    operators = lines[lines.index(next(line for line in lines if line.startswith("operator "))) + 1 :]
    assert [line.split()[0] for line in operators[: len(SCHEMAS)]] == list(SCHEMAS)


def test_json_says_what_the_extension_says():
    found, status = facts(), extension_status()
    assert found["extension"]["loaded"] == status.loaded
    assert found["cpu"]["kernels"] == status.build.get("cpu_kernels")
    assert set(found["linear_paths"]) >= {"float32", "bfloat16", "float16", "float64"}
    on_cpu = "compiled" if status.loaded else "torch"
    assert {backends["CPU"] for name, backends in found["operators"].items() if name.endswith("linear")} == {on_cpu}


def test_ranges_of_rows_leave_no_gap():
    for ranges in facts()["linear_paths"].values():
        assert ranges[0]["rows"][0] == 1
        assert ranges[-1]["rows"][1] is None
        for before, after in itertools.pairwise(ranges):
            assert before["rows"][1] + 1 == after["rows"][0]
            assert before["path"] != after["path"]


@pytest.mark.skipif(not extension_status().loaded, reason="the extension is not loaded")
def test_fewer_instructions_give_other_paths():
    """The table follows the kernels in use: it is asked for, not remembered."""
    ways = {
        kernels: {
            dtype: [entry["path"] for entry in ranges]
            for dtype, ranges in facts(EIGENPRUNE_CPU_KERNELS=kernels)["linear_paths"].items()
        }
        for kernels in ("plain", "avx2")
    }
    assert set(map(tuple, ways["plain"].values())) == {("torch",)}
    if extension_status().build["cpu_kernels"] != "plain":
        assert ways["avx2"]["float32"] == ["dots", "torch"]
    assert ways["avx2"]["float64"] == ["torch"]


def test_without_an_extension_it_says_so_and_everything_is_torch():
    found = facts(EIGENPRUNE_NO_EXTENSION="1")
    assert not found["extension"]["loaded"]
    assert "EIGENPRUNE_NO_EXTENSION is set" in found["extension"]["reason"]
    assert {way for backends in found["operators"].values() for way in backends.values()} == {"torch"}
    assert {entry["path"] for ranges in found["linear_paths"].values() for entry in ranges} == {"torch"}


def test_nothing_heavier_than_torch_is_imported():
    heavy = {"transformers", "huggingface_hub", "peft", "rich", "typer", "safetensors", "datasets"}
    result = run_python(JSON + f"; sys.stderr.write(','.join({heavy!r} & set(sys.modules)))")
    assert (result.returncode, result.stderr) == (0, "")


def test_an_unknown_option_is_refused():
    result = run_python("from eigenprune.ops.environment import main; main(['--yaml'])")
    assert result.returncode == 2
    assert "--yaml" in result.stderr
