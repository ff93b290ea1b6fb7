# SPDX-License-Identifier: Apache-2.0
"""Delta files from strangers: cut short, mutated, lying (rows G3 to G6, G11), and writers that die (row G35)."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenprune.errors import CheckpointError, EigenpruneError
from eigenprune.hub.delta_decode import DeltaFile
from eigenprune.hub.delta_encode import write_delta
from eigenprune.hub.delta_folder import DELTA_NAME
from eigenprune.hub.delta_manifest import MANIFEST
from tests.helpers.compare import file_hashes
from tests.helpers.delta_folders import base_and_delta, delta_folder
from tests.helpers.deltas import pair, written
from tests.reliability.tiny_checkpoint import ROUNDS

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / DELTA_NAME
    written(path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some kilobytes, with every form in it."""
    base, tuned, masks = pair()
    wide = torch.zeros(40, 40)
    base, tuned = ({n: t for n, t in m.items() if t.numel() < 1000} for m in (base, tuned))
    base["few"], tuned["few"] = wide, wide + 1
    masks["few"] = torch.arange(1600).view(40, 40) % 100 == 0
    path = tmp_path_factory.mktemp("small") / DELTA_NAME
    write_delta(path, base, tuned, masks.get, base_model="org/base", rule="random", keep=0.5)
    return path


def read_all(path: Path, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with DeltaFile(path) as delta:
        return {name: delta.merged(name, base.get(name)) for name in delta.manifest.tensors}


def small_base() -> dict[str, torch.Tensor]:
    return {name: t for name, t in pair()[0].items() if t.numel() < 1000} | {"few": torch.zeros(40, 40)}


def test_g4_every_cut_is_refused(small: Path, tmp_path: Path) -> None:
    content, base = small.read_bytes(), small_base()
    choose = random.Random(4)
    cuts = {*range(64), *range(len(content) - 64, len(content))}
    cuts |= {choose.randrange(len(content)) for _ in range(200 * ROUNDS)}
    for cut in sorted(cuts):
        (tmp_path / DELTA_NAME).write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            read_all(tmp_path / DELTA_NAME, base)


def test_g5_mutated_files_are_read_or_refused_with_an_error_of_ours(small: Path, tmp_path: Path) -> None:
    content, base = small.read_bytes(), small_base()
    choose = random.Random(5)
    refused = 0
    for _ in range(300 * ROUNDS):
        changed = bytearray(content)
        for _ in range(choose.randint(1, 4)):
            place = choose.randrange(len(changed))
            kind = choose.choice(["flip", "insert", "delete", "splice"])
            if kind == "flip":
                changed[place] ^= 1 << choose.randrange(8)
            elif kind == "insert":
                changed[place:place] = bytes([choose.randrange(256)])
            elif kind == "delete":
                del changed[place]
            else:
                changed[place : place + 16] = content[choose.randrange(len(content)) :][:16]
        (tmp_path / DELTA_NAME).write_bytes(changed)
        try:
            read_all(tmp_path / DELTA_NAME, base)
        except EigenpruneError:
            refused += 1
    assert refused > 100 * ROUNDS  # most; a changed value alone is found by the digests beside the file


def lying(good: Path, path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """`good` with a change in its manifest or its tensors."""
    tensors = load_file(good)
    manifest = json.loads(tensors[MANIFEST].numpy().tobytes())
    change(manifest, tensors)
    raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    tensors[MANIFEST] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    return path


def _entry(name: str, index: int, value: object) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda manifest, _tensors: manifest["tensors"][name].__setitem__(index, value)


def _field(name: str, value: object) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda manifest, _tensors: manifest.__setitem__(name, value)


def _tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, dict[str, torch.Tensor]], None]:
    return lambda _manifest, tensors: tensors.__setitem__(name, make(tensors[name]))


def _named(name: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda manifest, _tensors: manifest["tensors"].__setitem__(name, ["F32", [1], "base", 0])


LIES = {
    "count of a mask too large": _entry("one.weight", 3, 400),
    "count of a mask too small": _entry("one.weight", 3, 3),
    "count below zero": _entry("one.weight", 3, -1),
    "count a bool": _entry("one.weight", 3, True),
    "count a text": _entry("one.weight", 3, "9"),
    "count beyond 64 bits": _entry("one.weight", 3, 1 << 70),
    "shape of a tebibyte": _entry("two.weight", 1, [1 << 30, 1 << 30]),
    "shape of 16 TiB of a base tensor": _entry("equal.weight", 1, [1 << 21, 1 << 21]),
    "shape below zero": _entry("one.weight", 1, [-13, -37]),
    "shape of fractions": _entry("one.weight", 1, [13.0, 37]),
    "shape of nine sides": _entry("one.weight", 1, [1] * 9),
    "transposed shape": _entry("two.weight", 1, [400, 300]),
    "unknown type": _entry("one.weight", 0, "F8_E4M3"),
    "type a list": _entry("one.weight", 0, ["F32"]),
    "other type": _entry("one.weight", 0, "F64"),
    "unknown form": _entry("one.weight", 2, "zip"),
    "other form": _entry("one.weight", 2, "positions"),
    "form a list": _entry("one.weight", 2, ["mask"]),
    "whole without values": _entry("equal.weight", 2, "whole"),
    "base with a count": _entry("equal.weight", 3, 1),
    "entry of three": lambda manifest, _t: manifest["tensors"]["one.weight"].pop(),
    "entry a number": lambda manifest, _t: manifest["tensors"].__setitem__("one.weight", 1),
    "tensor not listed": lambda manifest, _t: manifest["tensors"].pop("one.weight"),
    "tensor listed and missing": lambda _m, tensors: tensors.pop("one.weight.delta_mask"),
    "tensor that nobody asked for": lambda _m, tensors: tensors.__setitem__("extra", torch.ones(1)),
    "no tensors": _field("tensors", {}),
    "tensors a list": _field("tensors", []),
    "base tensors a list": _field("base_tensors", []),
    "base tensor without digest": _field("base_tensors", {"one.weight": 1}),
    "base that lacks a tensor": lambda manifest, _t: manifest["base_tensors"].pop("one.weight"),
    "newer version": _field("format_version", 2),
    "version a text": _field("format_version", "1"),
    "unknown field": _field("path", "x"),
    "missing field": lambda manifest, _t: manifest.pop("rule"),
    "base a path": _field("base_model", "../../base"),
    "base an absolute path": _field("base_model", "/base"),
    "base a URL": _field("base_model", "https://example.org/x"),
    "revision an option": _field("base_revision", "--upload-pack"),
    "keep not a number": _field("keep", "NaN"),
    "unknown precision": _field("precision", "exec"),
    "precision that the file has not": _field("precision", "float16"),
    "manifest of another type": _tensor(MANIFEST, lambda _t: torch.ones(3)),
    "mask too long": _tensor("one.weight.delta_mask", lambda t: torch.cat([t, t])),
    "mask with one entry more or less": _tensor("one.weight.delta_mask", lambda t: torch.cat([t[:1] ^ 1, t[1:]])),
    "mask full": _tensor("one.weight.delta_mask", lambda t: torch.full_like(t, 255)),
    "values too few": _tensor("one.weight.delta_values", lambda t: t[:-1]),
    "values of another type": _tensor("one.weight.delta_values", lambda t: t.double()),
    "positions repeated": _tensor("two.weight.delta_positions", lambda t: t.int().fill_(7).to(torch.uint16)),
    "positions out of range": _tensor("long.weight.delta_positions", lambda t: t.int().fill_(65_535).to(torch.uint16)),
    "counts of another block": _tensor("long.weight.delta_counts", lambda t: t.flip(0)),
    "counts beyond 32 bits together": _tensor("long.weight.delta_counts", lambda t: torch.full_like(t, 2**31 - 1)),
    "counts below zero": _tensor("long.weight.delta_counts", lambda t: -t),
    **{
        f"tensor called {name!r:.40}": _named(name)
        for name in ("", "../x", "/x", "a\nb", "a b", "a\x00b", "x" * 600, "a.delta_mask", MANIFEST, "\u202ea", "é")
    },
}


@pytest.mark.parametrize("lie", LIES, ids=lambda name: name[:40])
def test_g6_lies_are_refused(lie: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / DELTA_NAME
    if lie == "manifest of another type":
        tensors = load_file(good)
        LIES[lie](None, tensors)
        save_file(tensors, path)
    else:
        lying(good, path, LIES[lie])
    with pytest.raises(CheckpointError):
        read_all(path, pair()[0])


def test_g3_manifest_bombs_are_refused_before_they_are_parsed(good: Path, tmp_path: Path) -> None:
    path = tmp_path / DELTA_NAME
    for bomb in (b"[" * 1_000_000, b'{"a":' * 100_000, b"[" + b"[]," * 2_000_000 + b"[]]", b"\xff", b"", b"3", b"[]"):
        tensors = load_file(good)
        tensors[MANIFEST] = torch.frombuffer(bytearray(bomb or b" "), dtype=torch.uint8)
        save_file(tensors, path, {"format": "pt"})
        began = time.process_time()
        with pytest.raises(CheckpointError):
            DeltaFile(path)
        assert time.process_time() - began < 1


def test_an_ordinary_model_and_no_file_are_no_delta(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / DELTA_NAME)
    with pytest.raises(CheckpointError, match="no sparse delta"):
        DeltaFile(tmp_path / DELTA_NAME)
    with pytest.raises(CheckpointError):
        DeltaFile(tmp_path / "missing.safetensors")


# A forked child for every line, since a start of Python costs seconds; see tests/helpers/save_and_die.py.
WRITER = """
import os, sys
from pathlib import Path
from tests.helpers.delta_folders import delta_folder
base, tuned, out = map(Path, sys.argv[1:4])
print("ready", flush=True)
for _ in sys.stdin:
    child = os.fork()
    while child == 0:
        for rule in ("first", "second"):
            delta_folder(base, tuned, out, rule=rule, overwrite=True)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_g35_killed_writer_leaves_a_whole_old_or_new_delta(tmp_path: Path) -> None:
    base, tuned, out = base_and_delta(tmp_path)
    wanted = []
    for rule in ("first", "second"):
        delta_folder(base, tuned, out, rule=rule, overwrite=True)
        wanted.append(file_hashes(out))
    choose = random.Random(35)
    command = [sys.executable, "-c", WRITER, str(base), str(tuned), str(out)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(12):
            process.stdin.write("go\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(choose.uniform(0.01, 0.3))
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            assert file_hashes(out) in wanted
    delta_folder(base, tuned, out, rule="first", overwrite=True)  # sweeps what the killed ones left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "tuned"]


def test_full_disk_leaves_the_old_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, out = base_and_delta(tmp_path)
    before = file_hashes(tmp_path)
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "w" in mode and self.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        return real(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match="No space left"):
        delta_folder(base, tuned, out, overwrite=True)
    monkeypatch.undo()
    assert file_hashes(tmp_path) == before
    shutil.rmtree(out)
