# SPDX-License-Identifier: Apache-2.0
"""G10: a change of a single bit is found before a model is used, at both doors: the commands and a push."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from eigenprune.cli.loading import load_model
from eigenprune.errors import CheckpointError
from eigenprune.hub.digests import check_digests
from eigenprune.hub.outgoing import collect
from tests.hub.shared import pruned_folder

FLIPS = 60


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_folder(tmp_path_factory.mktemp("saved"), "model")[0]


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_g10_an_untouched_folder_passes_every_door(folder: Path) -> None:
    check_digests(folder)
    collect(folder)
    load_model(str(folder), quiet=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_g10_one_bit_is_found(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    bits = [0, len(whole) * 8 - 1, *random.Random(name).sample(range(len(whole) * 8), FLIPS)]
    for bit in bits:
        flip(path, bit)
        with pytest.raises(CheckpointError, match=f"{name} is not the file that SHA256SUMS names"):
            check_digests(folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("door", [collect, lambda folder: load_model(str(folder), quiet=True)], ids=["push", "load"])
def test_g10_every_door_looks(folder: Path, door) -> None:
    path = folder / "model.safetensors"
    flip(path, (path.stat().st_size - 4) * 8)  # the last number's lowest bit: no parser could notice
    with pytest.raises(CheckpointError, match="save it with save_model or remove SHA256SUMS"):
        door(folder)
    flip(path, (path.stat().st_size - 4) * 8)
    (folder / "SHA256SUMS").unlink()
    door(folder)


def test_g10_weights_without_a_sum_and_sums_without_a_file_are_found(folder: Path) -> None:
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"more\.safetensors is not in SHA256SUMS"):
        check_digests(folder)
    (folder / "more.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is in SHA256SUMS and cannot be read"):
        check_digests(folder)


@pytest.mark.parametrize(
    "content", ["\0", "abc  model.safetensors\n", "a" * 64 + "  ../x\n", "a" * 64 + "\n", "ä", "a" * (1 << 21)]
)
def test_g10_damaged_sums_are_an_error_of_this_package(folder: Path, content: str) -> None:
    (folder / "SHA256SUMS").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        check_digests(folder)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_g10_the_form_is_that_of_sha256sum(folder: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == ["config.json: OK", "model.safetensors: OK"]
