# SPDX-License-Identifier: Apache-2.0
"""Delta folders through plain `from_pretrained`, over a base that is found, named, wrong, or nowhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from eigenprune import EigenpruneConfig
from eigenprune.errors import CheckpointError, ConfigError
from eigenprune.hub import apply_delta, load_delta
from tests.helpers.compare import file_hashes, state_hashes, tensor_hash, tied_groups
from tests.helpers.delta_folders import base_and_delta, merged_state
from tests.helpers.reload import reload_in_new_process
from tests.helpers.tiny_models import logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return base_and_delta(tmp_path_factory.mktemp("delta"))


def copied(folders: tuple[Path, Path, Path], place: Path) -> Path:
    """The delta alone, without its base beside it."""
    return Path(shutil.copytree(folders[2], place / "delta"))


def matches(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    state = state_hashes(model)
    return all(state[name] == tensor_hash(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "auto"), [("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)])
def test_plain_from_pretrained_gives_the_merged_model(
    kind: str, auto: type, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, tuned, delta = base_and_delta(tmp_path, kind, dtype)
    before = file_hashes(tmp_path)
    model, info = auto.from_pretrained(delta, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert matches(model, merged_state(base, tuned))
    assert tied_groups(model) == tied_groups(auto.from_pretrained(tuned))
    trunk = AutoModel.from_pretrained(delta)
    assert (
        state_hashes(trunk).items()
        <= {
            name.removeprefix(f"{model.base_model_prefix}."): value for name, value in state_hashes(model).items()
        }.items()
        or kind == "bert"
    )  # whose trunk has a pooler that the masked model has not
    assert file_hashes(tmp_path) == before


def test_what_came_out_is_an_ordinary_model(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, delta = folders
    model = AutoModelForCausalLM.from_pretrained(delta)
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")
    assert not getattr(model.config, "_is_quantized", False)
    model.half().float()
    AutoModelForCausalLM.from_pretrained(delta).save_pretrained(tmp_path / "whole")
    written = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert not [field for field in written if "quant" in field]
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert {name: tensor_hash(tensor) for name, tensor in saved.items()} == {
        name: tensor_hash(tensor) for name, tensor in merged_state(base, tuned).items()
    }


def test_applied_delta_is_a_stock_checkpoint_that_loads_without_this_package(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, tuned, delta = folders
    apply_delta(base, delta, tmp_path / "whole")
    expected = merged_state(base, tuned)
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert {n: tensor_hash(t) for n, t in saved.items()} == {n: tensor_hash(t) for n, t in expected.items()}
    plan = [
        {"folder": str(tmp_path / "whole"), "auto": "AutoModelForCausalLM"},
        {"folder": str(delta), "auto": "AutoModelForCausalLM"},
    ]
    whole, without = reload_in_new_process(plan, tmp_path, plugin=False)
    assert whole["logits"] == tensor_hash(logits(AutoModelForCausalLM.from_pretrained(delta)))
    assert "error" in without, "a delta without the plug-in must not load"
    assert "size" in without["message"]
    assert reload_in_new_process(plan[1:], tmp_path)[0]["logits"] == whole["logits"]


def test_base_is_taken_from_the_variable_and_from_the_argument(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, _ = folders
    delta = copied(folders, tmp_path)
    with pytest.raises(CheckpointError, match=r"EIGENPRUNE_BASE.*load_delta.*delta apply BASE delta"):
        AutoModelForCausalLM.from_pretrained(delta)
    named = load_delta(base, delta)
    assert matches(named, merged_state(base, tuned))
    assert named.config.name_or_path == str(delta)
    assert load_delta(base, delta, dtype=torch.bfloat16).dtype == torch.bfloat16
    monkeypatch.setenv("EIGENPRUNE_BASE", str(base))
    assert matches(AutoModelForCausalLM.from_pretrained(delta), merged_state(base, tuned))
    for wrong in (tuned, tmp_path / "nowhere"):
        monkeypatch.setenv("EIGENPRUNE_BASE", str(wrong))
        with pytest.raises(CheckpointError, match=r"not the base|names no folder"):
            AutoModelForCausalLM.from_pretrained(delta)


def test_wrong_base_is_refused_at_every_door(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, _ = folders
    delta = copied(folders, tmp_path)
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    doors = (
        AutoModelForCausalLM.from_pretrained,
        lambda folder: load_delta(tmp_path / "base", folder),
        lambda folder: apply_delta(tmp_path / "base", folder, tmp_path / "out"),
    )
    for door in doors:
        with pytest.raises(CheckpointError, match=r"not the base.*model[.]norm[.]weight differs"):
            door(delta)
    assert not (tmp_path / "out").exists()


def test_config_that_contradicts_the_file_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    delta = copied(folders, tmp_path)
    shutil.copytree(folders[0], tmp_path / "base")
    config = json.loads((delta / "config.json").read_text())
    config["quantization_config"]["delta"]["keep"] = 0.25
    (delta / "config.json").write_text(json.dumps(config))
    (delta / "SHA256SUMS").unlink()
    for door in (AutoModelForCausalLM.from_pretrained, lambda folder: apply_delta(folders[0], folder, tmp_path / "o")):
        with pytest.raises(CheckpointError, match="contradict"):
            door(delta)


def test_base_in_shards_and_digests_of_a_damaged_delta(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, _ = folders
    delta = copied(folders, tmp_path)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert matches(AutoModelForCausalLM.from_pretrained(delta), merged_state(base, tuned))
    content = bytearray((delta / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1  # a value: nothing but its digest tells
    (delta / "model.safetensors").write_bytes(content)
    for door in (lambda: load_delta(base, delta), lambda: apply_delta(base, delta, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="SHA256SUMS"):
            door()


def test_temporary_file_is_gone_after_loading_and_after_a_failure(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, _ = folders
    delta = copied(folders, tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("EIGENPRUNE_BASE", str(base))
    model = AutoModelForCausalLM.from_pretrained(delta)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert torch.isfinite(logits(model)).all()  # the mapped pages are still there
    load_delta(base, delta)
    monkeypatch.setenv("EIGENPRUNE_BASE", str(folders[1]))
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(delta)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_model_that_would_stay_in_part_on_disk_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    with pytest.raises(CheckpointError, match="delta apply BASE DIR"):
        AutoModelForCausalLM.from_pretrained(
            folders[2], device_map=places | {"model.layers": "disk"}, offload_folder=tmp_path
        )
    model = AutoModelForCausalLM.from_pretrained(folders[2], device_map="auto")
    assert matches(model, merged_state(*folders[:2]))


def test_config_of_a_delta_is_a_closed_set(folders: tuple[Path, Path, Path]) -> None:
    settings = AutoConfig.from_pretrained(folders[2]).quantization_config
    assert set(settings) == {"quant_method", "delta", "provenance", "format_version"}
    config = EigenpruneConfig.from_dict(settings)
    assert config.to_dict() == settings
    assert "delta" not in EigenpruneConfig().to_dict()  # older readers know no such field
    header = settings["delta"]
    for wrong in (
        header | {"path": "x"},
        header | {"keep": 2},
        header | {"keep": True},
        header | {"base_model": "../base"},
        header | {"base_model": "a/b/c"},
        header | {"base_revision": "main"},
        header | {"base_sha256": "0"},
        header | {"precision": "int4"},
        header | {"format_version": 2},
        header | {"format_version": "1"},
        {key: value for key, value in header.items() if key != "rule"},
        [header],
        "x",
    ):
        with pytest.raises(ConfigError):
            EigenpruneConfig.from_dict(settings | {"delta": wrong})
    with pytest.raises(ConfigError, match="exclude"):
        EigenpruneConfig.from_dict(settings | {"modules": {"a": ["pair", 1]}})
