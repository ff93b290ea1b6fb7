# SPDX-License-Identifier: Apache-2.0
"""`eigenprune extract-lora` as a user runs it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from eigenprune.cli.main import app
from tests.helpers.adapters import difference
from tests.helpers.tiny_models import logits, saved_dense, tiny_model

peft = pytest.importorskip("peft")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["extract-lora", *map(str, words)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    scratch = tmp_path_factory.mktemp("models")
    saved_dense("llama", scratch / "base")
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.q_proj.weight
            weight += 0.5 * torch.outer(torch.linspace(-1, 1, weight.shape[0]), torch.linspace(0, 1, weight.shape[1]))
            layer.input_layernorm.weight += 0.1
    model.save_pretrained(scratch / "tuned")
    return [scratch / "base", scratch / "tuned"]


def test_json_is_one_object_and_the_folder_loads(folders: list[Path], tmp_path: Path) -> None:
    done = run(*folders, "--energy", "0.99", "--out", tmp_path / "adapter", "--save-others", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {layer["rank"] for layer in result["layers"]} == {1}
    assert [other["saved"] for other in result["others"]] == ["modules_to_save"] * 2
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[0]), tmp_path / "adapter")
    tuned = AutoModelForCausalLM.from_pretrained(folders[1])
    assert difference(logits(model.eval()), logits(tuned)) <= 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders[0])


def test_report_alone_writes_nothing_and_names_what_else_differs(folders: list[Path], tmp_path: Path) -> None:
    done = run(*folders, "--rank", "2", "--quiet")
    assert (done.exit_code, done.stdout) == (0, "")
    done = run(*folders, "--rank", "2")
    assert "model.layers.1.input_layernorm.weight" in done.stdout
    assert "--save-others" in done.stdout
    assert not list(tmp_path.iterdir())


def test_metric_is_measured_on_the_base(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EIGENPRUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    settings = (
        "--rank",
        "1",
        "--method",
        "kfac",
        "--texts",
        tmp_path / "text.txt",
        "--window",
        "32",
        "--json",
        "--quiet",
    )
    done = run(*folders, *settings)
    assert done.exit_code == 0, done.output
    assert all(layer["error"] < 1e-5 for layer in json.loads(done.stdout)["layers"])  # of rank one, in any metric


@pytest.mark.parametrize(
    ("words", "says"),
    [((), "say the rank"), (("--rank", "1", "--dtype", "int8"), "int8"), (("--energy", "2"), "(0, 1]")],
)
def test_bad_settings_are_one_line(words: tuple[str, ...], says: str, folders: list[Path]) -> None:
    done = run(*folders, *words)
    assert done.exit_code == 1
    assert says in done.output
    assert "Traceback" not in done.output


def test_missing_model_is_one_line(folders: list[Path], tmp_path: Path) -> None:
    done = run(folders[0], tmp_path / "nowhere", "--rank", "1")
    assert done.exit_code == 1
    assert "no such folder" in done.output
