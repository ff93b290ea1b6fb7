# SPDX-License-Identifier: Apache-2.0
"""The command line as a user runs it: real processes, real folders."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import saved_dense

WORDS = "the of and a singular value matrix rank token window prune keep loss model text".split(" ")  # noqa: SIM905


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eigenprune.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def prose(words: int, seed: int) -> str:
    choose = random.Random(seed)
    return " ".join(choose.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_dense("llama", tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same kind of text three times: plain, JSON lines, gzipped JSON lines."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(prose(300, 1))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": prose(60, i)}) + "\n" for i in range(5)))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    return [folder / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]


@pytest.fixture(scope="module")
def pruned(dense: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "pruned"
    named = [argument for path in texts for argument in ("--texts", path)]
    done = run("prune", dense, "--out", out, "--keep", "0.7", *named, "--window", "32", "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)  # one object and nothing else, or this raises


def test_prune_json_reports_what_is_in_the_folder(pruned: tuple[Path, dict]) -> None:
    out, result = pruned
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    kept = sum(
        tensors[f"{name}.{part}.weight"].numel() for name in config["modules"] for part in ("left", "right")
    ) + sum(
        layer["parameters"] for layer in result["layers"] if layer["loss"] is not None and layer["layout"] == "dense"
    )
    budget = 0.7 * sum(a * b for a, b in (layer["shape"] for layer in result["layers"] if layer["loss"] is not None))
    assert kept <= budget
    assert kept == pytest.approx(result["keep"] * budget / 0.7)
    assert result["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert result["calibration"]["source"] == "a.txt, b.jsonl, c.jsonl.gz"


def test_saved_config_and_report_name_no_local_path(pruned: tuple[Path, dict], dense: Path) -> None:
    out, _ = pruned
    for path in out.glob("*.json"):
        assert str(dense.parent) not in path.read_text(), path.name


def test_eval_predicts_every_token_once(pruned: tuple[Path, dict], texts: list[Path]) -> None:
    done = run("eval", pruned[0], "--texts", texts[0], "--window", "32", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens"] == len(texts[0].read_text()) - 1  # the tiny tokenizer has one token a character
    assert result["perplexity"] > 1
    assert (result["other_domain"]["text"], result["other_domain"]["tokens"]) == ("python-docs", 8 * 31)
    done = run("eval", pruned[0], "--texts", texts[0], "--window", "32", "--no-other-domain", "--json")
    assert "other_domain" not in json.loads(done.stdout)


def test_eval_of_non_finite_logits_is_an_error(dense: Path, texts: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in dense.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    done = run("eval", broken, "--texts", texts[0], "--window", "32", "--quiet")
    assert done.returncode == 1
    assert "NaN or infinite" in done.stderr
    assert not done.stdout


def test_inspect_lists_every_linear_layer_with_reasons(pruned: tuple[Path, dict], dense: Path) -> None:
    done = run("inspect", pruned[0], "--json")
    assert done.returncode == 0, done.stderr
    layers = {layer["name"]: layer for layer in json.loads(done.stdout)["layers"]}
    reported = {layer["name"]: layer for layer in pruned[1]["layers"]}
    assert layers.keys() == reported.keys()
    assert layers["lm_head"]["reason"].startswith("tied")
    for name, layer in layers.items():
        assert (layer["rank"], layer["parameters"]) == (reported[name]["rank"], reported[name]["parameters"]), name
        assert layer["loss"] == reported[name]["loss"], name
    assert run("inspect", dense).returncode == 0


def test_method_svd_warns_that_it_is_no_default(dense: Path, tmp_path: Path) -> None:
    done = run("prune", dense, "--out", tmp_path / "svd", "--keep", "0.8", "--method", "svd")
    assert done.returncode == 0, done.stderr
    assert "no usable default" in " ".join(done.stderr.split())
    assert "method='kfac'" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--keep", "1.5"], "(0, 1]"),
        (["--keep", "0.8", "--method", "magic"], "svd-llm"),
        (["--keep", "0.8", "--layout", "magic"], "pivot"),
        (["--keep", "0.8", "--skip", "nothing_like_it"], "matches no layer"),
        (["--keep", "0.8", "--texts", "missing.txt"], "missing.txt"),
        (["--keep", "0.8", "--window", "4096"], "less than one window"),
        (["--keep", "0.01", "--method", "svd"], "keep at least"),
    ],
)
def test_bad_input_says_what_to_do_and_writes_nothing(
    options: list[str], says: str, dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    if "--window" in options:
        (tmp_path / "short.txt").write_text("short")
        options = [*options, "--texts", str(tmp_path / "short.txt")]
    done = run("prune", dense, "--out", tmp_path / "out", *options)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_kept_unless_told_otherwise(dense: Path, pruned: tuple[Path, dict]) -> None:
    before = (pruned[0] / "model.safetensors").read_bytes()
    done = run("prune", dense, "--out", pruned[0], "--keep", "0.5", "--method", "svd", "--quiet")
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    assert (pruned[0] / "model.safetensors").read_bytes() == before


def test_missing_model_and_wrong_usage_have_their_exit_codes(tmp_path: Path, texts: list[Path]) -> None:
    missing = run("eval", tmp_path / "nowhere", "--texts", texts[0])
    assert (missing.returncode, "Traceback" in missing.stderr) == (1, False)
    assert run("prune").returncode == 2
    assert run("--version").stdout.startswith("eigenprune ")
    for command in ("prune", "eval", "inspect", "extract-lora", "task", "apply", "card", "push"):
        assert "xample" in run(command, "--help").stdout, command


@pytest.mark.slow
def test_interrupted_prune_leaves_nothing_and_goes_on_where_it_stopped(dense: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the statistics; the second run starts from the saved sums and gives the same bytes."""
    environment = os.environ | {"EIGENPRUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    # The clock of saves cannot be set from the command line: a short program sets it and runs the same command.
    program = (
        "import eigenprune.calibrate.cache as cache; cache.SECONDS_BETWEEN_SAVES = 0;"
        "from eigenprune.cli import main; main()"
    )

    def start(out: Path, cache: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, "prune", str(dense), "--out", str(out), "--keep", "0.7"]
        command += ["--window", "32", "--windows", "400"]
        return subprocess.Popen(
            command,
            env=environment | {"EIGENPRUNE_CACHE": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    cache = tmp_path / "cache"
    first = start(tmp_path / "out", str(cache))
    deadline = time.monotonic() + 120
    while not list(cache.glob("*/*.partial.safetensors")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, messages = first.communicate(timeout=60)
    assert first.returncode == 130, messages
    assert "goes on from there" in messages
    assert not (tmp_path / "out").exists()
    assert list(cache.glob("*/*.partial.safetensors"))
    for out, where in (("out", cache), ("unbroken", tmp_path / "other-cache")):
        process = start(tmp_path / out, str(where))
        _, messages = process.communicate(timeout=200)
        assert process.returncode == 0, messages
    resumed, unbroken = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "unbroken"))
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in resumed)
