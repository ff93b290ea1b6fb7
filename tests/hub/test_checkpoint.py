# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that lies or is damaged is refused, and what is wrong is named; random weights never run (row G6)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, prune_
from eigenprune.errors import CheckpointError, ConfigError, EigenpruneError
from eigenprune.layers import low_rank_layers
from tests.helpers.tiny_models import tiny_model, token_windows

LAYER = "model.layers.1.mlp.down_proj"
BIASED = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("qwen2")
    config = EigenpruneConfig(keep=0.5, layout="pivot", allocation="uniform")
    prune_(model, config, windows=token_windows(), progress=False)
    assert {LAYER, BIASED} <= low_rank_layers(model).keys()
    folder = tmp_path_factory.mktemp("honest") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def _change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def _change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_honest_checkpoint_loads(folder: Path) -> None:
    _change_config(folder, lambda config: None)
    _change_tensors(folder, lambda tensors: None)
    assert LAYER in low_rank_layers(_load(folder))


CONFIG_LIES: dict[str, tuple[type[EigenpruneError], str, Callable[[dict[str, Any]], Any]]] = {
    "rank 0": (ConfigError, "rank", lambda c: c["modules"].update({LAYER: ["pivot", 0]})),
    "rank -1": (ConfigError, "rank", lambda c: c["modules"].update({LAYER: ["pivot", -1]})),
    "rank above both sides": (CheckpointError, LAYER, lambda c: c["modules"].update({LAYER: ["pivot", 65]})),
    "rank 2**24": (CheckpointError, LAYER, lambda c: c["modules"].update({LAYER: ["pivot", 2**24]})),
    "rank 2**31": (ConfigError, "rank", lambda c: c["modules"].update({LAYER: ["pivot", 2**31]})),
    "rank 2**63": (ConfigError, "rank", lambda c: c["modules"].update({LAYER: ["pivot", 2**63]})),
    "rank NaN": (ConfigError, "rank", lambda c: c["modules"].update({LAYER: ["pivot", float("nan")]})),
    "rank in words": (ConfigError, "rank", lambda c: c["modules"].update({LAYER: ["pivot", "eight"]})),
    "rank 8 of another": (CheckpointError, LAYER, lambda c: c["modules"].update({LAYER: ["pivot", 64]})),
    "other layout": (CheckpointError, LAYER, lambda c: c["modules"][LAYER].__setitem__(0, "pair")),
    "unknown layout": (ConfigError, "layout", lambda c: c["modules"].update({LAYER: ["dense", 8]})),
    "entry of length 3": (ConfigError, LAYER, lambda c: c["modules"][LAYER].append(8)),
    "entry of length 1": (ConfigError, LAYER, lambda c: c["modules"][LAYER].pop()),
    "modules a list": (ConfigError, "modules", lambda c: c.update(modules=[LAYER])),
    "no such layer": (
        CheckpointError,
        "no such layer",
        lambda c: c["modules"].update({"model.layers.9.x": ["pair", 8]}),
    ),
    "no such head": (CheckpointError, "no such layer", lambda c: c["modules"].update({"head.x": ["pair", 8]})),
    "layer is a norm": (CheckpointError, "RMSNorm", lambda c: c["modules"].update({"model.norm": ["pair", 8]})),
    "layer is an embedding": (
        CheckpointError,
        "Embedding",
        lambda c: c["modules"].update({"model.embed_tokens": ["pair", 8]}),
    ),
    "layer is a block": (CheckpointError, "Qwen2", lambda c: c["modules"].update({"model.layers.0": ["pair", 8]})),
    "dense layer said to be factored": (
        CheckpointError,
        "missing",
        lambda c: c["modules"].update({"lm_head": ["pair", 8]}),
    ),
    "layer inside a factored layer": (
        CheckpointError,
        "missing",
        lambda c: c["modules"].update({f"{LAYER}.left": ["pair", 8]}),
    ),
    "factored layer left out": (CheckpointError, LAYER, lambda c: c["modules"].pop(LAYER)),
    "no modules": (CheckpointError, "factor", lambda c: c.pop("modules")),
    "newer version": (ConfigError, "pip install", lambda c: c.update(format_version=99)),
    "unknown field": (ConfigError, "field", lambda c: c.update(backdoor=True)),
    "version in words": (ConfigError, "format_version", lambda c: c.update(format_version="one")),
    "layer name empty": (ConfigError, "name", lambda c: c["modules"].update({"": ["pair", 8]})),
    "rank infinite": (ConfigError, "rank", lambda c: c["modules"].update({LAYER: ["pivot", float("inf")]})),
    "rank true": (ConfigError, "rank", lambda c: c["modules"].update({LAYER: ["pivot", True]})),
    "keep above one": (ConfigError, "keep", lambda c: c.update(keep=1.5)),
    "path for a name": (ConfigError, "name", lambda c: c["modules"].update({"../../x": ["pair", 8]})),
}


@pytest.mark.parametrize("lie", CONFIG_LIES)
def test_lying_config_is_refused_with_a_typed_error(lie: str, folder: Path) -> None:
    error, words, change = CONFIG_LIES[lie]
    _change_config(folder, change)
    with pytest.raises(error, match=words):
        _load(folder)


def _pivots(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.pivots"] = change(tensors[f"{LAYER}.pivots"])

    return apply


def _part(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{part}"] = change(tensors[f"{LAYER}.{part}"])

    return apply


TENSOR_LIES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "left is missing": lambda t: t.pop(f"{LAYER}.left.weight"),
    "right is missing": lambda t: t.pop(f"{LAYER}.right.weight"),
    "pivots are missing": lambda t: t.pop(f"{LAYER}.pivots"),
    "bias is missing": lambda t: t.pop(f"{BIASED}.bias"),
    "left has a row less": _part("left.weight", lambda x: x[1:].clone()),
    "right has a row more": _part("right.weight", lambda x: torch.cat([x, x[:1]])),
    "right is transposed": _part("right.weight", lambda x: x.t().contiguous()),
    "right is empty": _part("right.weight", lambda x: x[:0].clone()),
    "left is int64": _part("left.weight", lambda x: x.long()),
    "left is bool": _part("left.weight", lambda x: x > 0),
    "left is float8": _part("left.weight", lambda x: x.to(torch.float8_e4m3fn)),
    "pivots repeat": _pivots(lambda p: torch.cat([p[:-1], p[:1]])),
    "pivots are out of range": _pivots(lambda p: torch.cat([p[:-1], p.new_tensor([10**6])])),
    "pivots are just out of range": _pivots(lambda p: torch.cat([p[:-1], p.new_tensor([64])])),
    "pivots are negative": _pivots(lambda p: torch.cat([p.new_tensor([-1]), p[1:]])),
    "pivots are int64": _pivots(lambda p: p.long()),
    "pivots are float32": _pivots(lambda p: p.float()),
    "pivots are a matrix": _pivots(lambda p: p.reshape(1, -1)),
    "pivots are too few": _pivots(lambda p: p[:-1].clone()),
}


@pytest.mark.parametrize("lie", TENSOR_LIES)
def test_lying_tensors_are_refused_with_the_layer_named(lie: str, folder: Path) -> None:
    _change_tensors(folder, TENSOR_LIES[lie])
    with pytest.raises(CheckpointError, match="bias" if "bias" in lie else LAYER):
        _load(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.7, 0.999])
def test_truncated_file_is_refused(share: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _load(folder)


def test_file_without_its_last_byte_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        _load(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors only"):
        _load(folder)


def test_missing_shard_is_refused(honest: Path, tmp_path: Path) -> None:
    model = _load(honest)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        _load(tmp_path / "sharded")


def test_truncated_shard_is_refused(honest: Path, tmp_path: Path) -> None:
    _load(honest).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=shard.name):
        _load(tmp_path / "sharded")
