# SPDX-License-Identifier: Apache-2.0
"""`eigenprune task` and `eigenprune apply` as a user runs them: real folders and files."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from eigenprune.cli.main import app
from eigenprune.hub import read_adapter
from tests.helpers.tiny_models import logits, saved_dense

SMALL = ["--train", "24", "--held-out", "16", "--test", "20", "--remove", "0.05", "--checks", "12"]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without biases, so that some are created."""
    return saved_dense("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture(scope="module")
def done(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("done")
    words = ("--model", base, "--task", "int-mult", "--retention", text, *SMALL, "--json", "--quiet")
    result = run("task", *words, "--adapter", folder / "a.safetensors", "--out", folder / "model")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)  # one object and nothing else, or this raises


def test_report_says_both_sides_and_the_guard(done: tuple[Path, dict]) -> None:
    _, report = done
    test = report["test"]
    assert test["total"] == 20
    assert test["after"] == test["before"] + test["gained"] - test["lost"]
    assert test["after_interval"][0] <= test["after"] / 20 <= test["after_interval"][1]
    rounds, chosen = report["removal"]["rounds"], report["removal"]["chosen"]
    assert rounds[chosen]["held_out_objective"] < rounds[0]["held_out_objective"]
    assert rounds[chosen]["retention_loss"] <= rounds[0]["retention_loss"] + 0.05
    assert 0 < report["removed"] <= 0.05
    assert sum(cell["removed"] for cell in report["views"]["by_layer_and_kind"]) == len(report["views"]["removed"])
    assert str(Path.home()) not in json.dumps(report["settings"])
    assert report["settings"]["model"] == "base"


def test_model_loads_plainly_and_is_base_with_adapter_bit_for_bit(
    done: tuple[Path, dict], base: Path, tmp_path: Path
) -> None:
    folder, report = done
    adapter = read_adapter(folder / "a.safetensors")
    assert adapter.removal.count == len(report["views"]["removed"])
    assert adapter.removal.bias_deltas
    result = run("apply", folder / "a.safetensors", "--model", base, "--out", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.output
    one, other = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    dense = AutoModelForCausalLM.from_pretrained(base)
    name = next(iter(adapter.removal.bias_deltas))
    assert loaded.get_submodule(name).bias is not None
    assert dense.get_submodule(name).bias is None
    assert not torch.equal(logits(loaded), logits(dense))
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")))


def test_adapter_is_refused_on_another_base_and_nothing_is_written(done: tuple[Path, dict], tmp_path: Path) -> None:
    saved_dense("qwen2", tmp_path / "other")
    result = run("apply", done[0] / "a.safetensors", "--model", tmp_path / "other", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "other weights" in result.output
    assert not (tmp_path / "out").exists()


def test_tables_are_for_people(base: Path, text: Path) -> None:
    words = ("--model", base, "--task", "int-mult", "--retention", text, *SMALL, "--worth", "smallest-sigma")
    result = run("task", *words)
    assert result.exit_code == 0, result.output
    for word in ("before", "after", "of 20", "95 % interval", "McNemar", "retention", "bound +0.05", "components"):
        assert word in result.output, word


def test_list_names_the_tasks() -> None:
    result = run("task", "--list")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("int-sum", "int-mult", "cb", "copa", "rte", "basic-arithmetic"))


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        ([], "--model and --task", 2),
        (["--task", "int-multiply"], "there are: int-sum", 1),
        (["--task", "cb"], "--data", 1),
        (["--task", "nowhere.jsonl"], "no text file at", 1),
        (["--task", "int-mult", "--train", "0"], "train=0", 1),
        (["--task", "int-mult", "--remove", "0"], "(0, 1]", 1),
        (["--task", "int-mult", "--worth", "magic"], "exact", 1),
        (["--task", "int-mult", "--kinds", "z"], "kinds", 1),
        (["--task", "int-mult", "--adapter", "a.bin"], "NAME.safetensors", 1),
        (["--task", "int-mult", "--retention", "missing.txt"], "missing.txt", 1),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str, code: int, base: Path, text: Path) -> None:
    named = ["--model", str(base)] if words else []
    guard = [] if "--retention" in words else ["--retention", str(text)]
    small = [] if "--remove" in words else ["--remove", "0.05"]
    result = run("task", *named, *words, *guard, *small)
    assert result.exit_code == code, result.output
    assert says in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_existing_results_are_kept_unless_told_otherwise(done: tuple[Path, dict], base: Path, text: Path) -> None:
    folder, _ = done
    before = (folder / "a.safetensors").read_bytes()
    for option, path in (("--adapter", folder / "a.safetensors"), ("--out", folder / "model")):
        result = run("task", "--model", base, "--task", "int-mult", "--retention", text, option, path)
        assert result.exit_code == 1
        assert "--overwrite" in result.output
    result = run("apply", folder / "a.safetensors", "--model", base, "--out", folder / "model")
    assert "--overwrite" in result.output
    assert (folder / "a.safetensors").read_bytes() == before


def _has_checked(errors: Path, least: int) -> bool:
    """Whether the bar has come so far; it does not show every count."""
    return any(int(count) >= least for count in re.findall(r"(\d+)/100000", errors.read_text()))


def test_interrupted_search_keeps_what_it_has_found(base: Path, text: Path, tmp_path: Path) -> None:
    """Ctrl-C once there are gains: the adapter is written, fits the base, and the exit code says what happened."""
    command = [sys.executable, "-m", "eigenprune.cli", "task", "--model", str(base), "--task", "int-mult"]
    command += ["--retention", str(text), "--train", "24", "--held-out", "16", "--test", "20", "--remove", "0.2"]
    command += ["--checks", "100000", "--adapter", str(tmp_path / "a.safetensors")]
    errors = tmp_path / "messages"
    with errors.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not _has_checked(errors, 30) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    messages = errors.read_text()
    assert process.returncode == 130, messages
    assert "was kept" in messages
    assert "removed" in output
    assert read_adapter(tmp_path / "a.safetensors").removal.count
    result = run("apply", tmp_path / "a.safetensors", "--model", base, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
