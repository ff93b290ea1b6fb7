# SPDX-License-Identifier: Apache-2.0
"""`eigenprune delta make | apply | inspect` as a user runs them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from eigenprune.cli.main import app
from eigenprune.entries import HEADS, merge_entries, select_entries
from tests.helpers.compare import file_hashes, state_hashes, tensor_hash
from tests.helpers.delta_folders import saved_tuned
from tests.helpers.tiny_models import saved_dense


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["delta", *map(str, words)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    scratch = tmp_path_factory.mktemp("models")
    return saved_dense("qwen2", scratch / "base"), saved_tuned("qwen2", scratch / "tuned")


def merged(folders: tuple[Path, Path], rule: str, keep: float) -> dict[str, str]:
    base, tuned = (load_file(folder / "model.safetensors") for folder in folders)
    masks = select_entries(base, tuned, rule, keep, keep_whole=HEADS)
    return {name: tensor_hash(tensor) for name, tensor in merge_entries(base, tuned, masks)}


def test_make_inspect_apply_and_load_agree_with_the_selection(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    before = file_hashes(base.parent)
    delta = base.parent / "delta"  # beside the base, where from_pretrained finds it
    done = run("make", base, tuned, "--rule", "delta", "--keep", "0.1", "--out", delta, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["base_model"] == "base"
    assert (made["rule"], made["keep"], made["scope"]) == ("delta", 0.1, "global")
    assert made["delta_bytes"] == sum(path.stat().st_size for path in delta.glob("*.safetensors"))
    done = run("inspect", delta, "--json")
    inspected = json.loads(done.stdout)
    assert inspected["stored"] == made["stored"] == sum(t["stored"] for t in inspected["tensors"].values())
    assert 0.08 * inspected["entries"] < inspected["stored"] <= 0.11 * inspected["entries"]
    done = run("apply", base, delta, "--out", tmp_path / "whole", "--quiet")
    assert (done.exit_code, done.stdout) == (0, "")
    expected = merged(folders, "delta", 0.1)
    applied = load_file(tmp_path / "whole" / "model.safetensors")
    assert {name: tensor_hash(tensor) for name, tensor in applied.items()} == expected
    assert expected.items() <= state_hashes(AutoModelForCausalLM.from_pretrained(delta)).items()
    assert (tmp_path / "whole" / "tokenizer.json").is_file()
    assert before.items() <= file_hashes(base.parent).items()


def test_tables_say_what_it_saves_and_that_nothing_gets_faster(folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(
        "make", *folders, "--rule", "random", "--keep", "0.5", "--precision", "bfloat16", "--out", tmp_path / "d"
    )
    assert done.exit_code == 0, done.output
    assert "as fast as before" in done.stdout
    assert "bfloat16" in done.stdout
    done = run("inspect", tmp_path / "d")
    assert "model.embed_tokens.weight" in done.stdout
    assert "as fast as before" in done.stdout


def test_help_has_examples() -> None:
    for command in ("make", "apply", "inspect"):
        done = run(command, "--help")
        assert done.exit_code == 0
        assert f"eigenprune delta {command}" in done.stdout


def test_what_is_there_is_not_overwritten_unless_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["make", *folders, "--rule", "random", "--keep", "0.5", "--quiet", "--out", tmp_path / "d"]
    assert run(*words).exit_code == 0
    before = file_hashes(tmp_path)
    for again in (words, ["apply", folders[0], tmp_path / "d", "--out", tmp_path / "d"]):
        done = run(*again)
        assert done.exit_code == 1
        assert "--overwrite" in done.stderr
    assert file_hashes(tmp_path) == before
    assert run(*words, "--overwrite").exit_code == 0
    assert file_hashes(tmp_path) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    done = run(*words[:-1], tmp_path / "other", "--overwrite")
    assert (done.exit_code, "other than a model" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "nothing"], "nothing"),
        (["--rule", "random", "--keep", "1.5"], "keep=1.5"),
        (["--rule", "random", "--precision", "int4"], "precision"),
        (["--rule", "random", "--base-id", "no id"], "repository id"),
        (["--rule", "random", "--only", "("], "("),
    ],
)
def test_wrong_settings_are_told_in_one_line(
    words: list[str], message: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    done = run("make", *folders, "--out", tmp_path / "d", "--quiet", *words)
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_wrong_base_and_no_delta_are_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    assert run("make", base, tuned, "--rule", "random", "--out", tmp_path / "d", "--quiet").exit_code == 0
    for words, message in (
        (["apply", tuned, tmp_path / "d", "--out", tmp_path / "o"], "not the base"),
        (["apply", base, tuned, "--out", tmp_path / "o"], "no sparse delta"),
        (["inspect", base], "no sparse delta"),
        (["make", base, tmp_path / "d", "--rule", "random", "--out", tmp_path / "o"], "delta itself"),
    ):
        done = run(*words)
        assert (done.exit_code, message in done.stderr) == (1, True), done.output
    assert not (tmp_path / "o").exists()


def test_half_precision_values_halve_the_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sizes = {}
    for precision in ("exact", "bfloat16"):
        done = run(
            *("make", *folders, "--rule", "random", "--keep", "0.5", "--precision", precision, "--json", "--quiet"),
            *("--out", tmp_path / precision),
        )
        sizes[precision] = json.loads(done.stdout)["delta_bytes"]
    # Half of each float32 value; masks and manifest stay. This model has 0.5 entries stored of each 1/8 byte of mask.
    assert 0.5 < sizes["bfloat16"] / sizes["exact"] < 0.62
    assert torch.isfinite(
        load_file(tmp_path / "bfloat16" / "model.safetensors")["model.norm.weight.delta_values"]
    ).all()
