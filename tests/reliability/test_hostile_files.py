# SPDX-License-Identifier: Apache-2.0
"""Files from strangers: pickles, bombs, files cut short, code beside the weights (rows G2, G3, G4, G9)."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, prune_
from eigenprune.cli.loading import load_model
from eigenprune.errors import CheckpointError, EigenpruneError
from eigenprune.hub.checkpoint import check_factor_files
from eigenprune.hub.facts import read_facts
from eigenprune.hub.limits import LARGEST_CONFIG, LARGEST_HEADER, LARGEST_INDEX
from tests.helpers.tiny_models import tiny_model, tiny_tokenizer, token_windows
from tests.reliability.tiny_checkpoint import LAYER, ROUNDS, layer, settings, write

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl")
MOST_SECONDS = 1.0  # of this process: a machine that does something else at the time counts for nothing
MOST_BYTES = 64 << 20


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model that loads, in shards."""
    model = tiny_model("llama")
    prune_(model, EigenpruneConfig(keep=0.6), windows=token_windows(), progress=False)
    folder = tmp_path_factory.mktemp("real") / "model"
    model.save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PICKLES)
def test_g2_folder_with_pickled_weights_only_is_refused_with_advice(name: str, real: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(real, tmp_path / "model", ignore=shutil.ignore_patterns("*safetensors*")))
    torch.save({"x": torch.ones(2)}, folder / name)
    for door in (read_facts, lambda folder: load_model(str(folder))):
        with pytest.raises(CheckpointError, match=r"safetensors"):
            door(folder)
    # transformers knows one of these names, and says itself that it finds nothing where it knows none.
    with pytest.raises(CheckpointError if name == "pytorch_model.bin" else OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", PICKLES)
def test_g2_index_that_names_a_pickle_is_refused(name: str, real: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(real, tmp_path / "model"))
    torch.save({"x": torch.ones(2)}, folder / name)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][sorted(content["weight_map"])[0]] = name
    index.write_text(json.dumps(content))
    for door in (read_facts, lambda folder: load_model(str(folder)), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=name.replace(".", "[.]")):
            door(folder)


def _header(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(8, "little") + content


def _tensors(count: int) -> bytes:
    return b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(count)) + b"}"


def _json(value: object, **more: object) -> bytes:
    return json.dumps(settings() | {"x": value} | more).encode()


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


# Name -> (file, its content); made when needed, since some take 30 MB.
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "config a million levels deep": ("config.json", lambda: b"[" * (LARGEST_CONFIG - 10)),
    "config 20 levels deep": ("config.json", lambda: _json(_deep(20))),
    "config 8 MiB long": ("config.json", lambda: _json("x" * LARGEST_CONFIG)),
    "config of a million empty lists": ("config.json", lambda: b"[" + b"[]," * 300_000 + b"[]]"),
    "index 17 MiB long": ("model.safetensors.index.json", lambda: _json("x" * (17 << 20))),
    "index of five million lists": (
        "model.safetensors.index.json",
        lambda: b'{"weight_map":[' + b"[]," * (LARGEST_INDEX // 3 - 20) + b"[]]}",
    ),
    "index a million levels deep": ("model.safetensors.index.json", lambda: b'{"a":' * (1 << 20)),
    "index of a million tensors": (
        "model.safetensors.index.json",
        lambda: b'{"weight_map":{' + b",".join(b'"%d":"m"' % i for i in range(1_000_000)) + b"}}",
    ),
    "header of 2**63 bytes": ("model.safetensors", lambda: _header(b"{}", 1 << 63)),
    "header longer than the file": ("model.safetensors", lambda: _header(b"{}", 1 << 20)),
    "header of 17 MiB": ("model.safetensors", lambda: _header(b"{" + b" " * (17 << 20) + b"}")),
    "header of 300,000 tensors": ("model.safetensors", lambda: _header(_tensors(300_000))),
    "tensor of five million dimensions": (
        "model.safetensors",
        lambda: _header(b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"0," * 5_000_000 + b"0]}}"),
    ),
    "header a million levels deep": ("model.safetensors", lambda: _header(b'{"a":' * (1 << 20))),
}


def _resident(field: str) -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[field].split()[0]) * 1024


def _refused(door: Callable[[], object]) -> tuple[EigenpruneError, float, int]:
    """The error, and the seconds and bytes that it took."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = _resident("VmRSS"), time.process_time()
    with pytest.raises(EigenpruneError) as caught:
        door()
    return caught.value, time.process_time() - start, _resident("VmHWM") - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_g3_bomb_is_refused_in_a_second_and_64_mib(bomb: str, tmp_path: Path) -> None:
    name, content = BOMBS[bomb]
    folder = write(tmp_path / "model", index=name.endswith("index.json"))
    (folder / name).write_bytes(content())
    doors: list[Callable[[], object]] = [lambda: read_facts(folder), lambda: load_model(str(folder))]
    if name.endswith(".safetensors"):
        doors.append(lambda: check_factor_files([folder / name], {LAYER: layer()}))
    for door in doors:
        error, seconds, extra = _refused(door)
        assert isinstance(error, CheckpointError)
        assert name in str(error)
        assert seconds <= MOST_SECONDS
        assert extra <= MOST_BYTES


def test_g3_from_pretrained_refuses_a_header_bomb_too(real: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(real, tmp_path / "model"))
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(_header(b"{" + b" " * LARGEST_HEADER + b"}"))
    with pytest.raises(CheckpointError, match=f"{shard.name} has a header of more than"):
        AutoModelForCausalLM.from_pretrained(folder)


def _refuse_all(folder: Path, made: Any) -> None:
    path = folder / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        check_factor_files([path], {LAYER: made})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_facts(folder)


def test_g4_every_prefix_of_a_small_file_is_refused(tmp_path: Path) -> None:
    made = layer()
    folder = write(tmp_path / "model", made)
    path = folder / "model.safetensors"
    assert check_factor_files([path], {LAYER: made}) == set()
    assert read_facts(folder).layers[0].rank == made.rank
    size = path.stat().st_size
    assert size > 1000
    for length in range(size - 1, -1, -1):
        os.truncate(path, length)
        _refuse_all(folder, made)


def test_g4_random_cuts_of_a_large_file_are_refused(tmp_path: Path) -> None:
    made = layer(1024, 1024, 160)
    folder = write(tmp_path / "model", made)
    path = folder / "model.safetensors"
    size = path.stat().st_size
    assert size > 1 << 20
    generator = random.Random(0)
    for length in sorted((generator.randrange(size) for _ in range(512 * ROUNDS)), reverse=True):
        os.truncate(path, length)
        _refuse_all(folder, made)


HOSTILE_CODE = (
    "import pathlib\npathlib.Path({!r}).write_text('owned')\nfrom transformers import LlamaForCausalLM as X\n"
)
LOADS_NOTHING_NEW = """
import sys
from eigenprune.cli.loading import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(folder):
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    load_model(folder)

load(sys.argv[1])
before = set(sys.modules)
load(sys.argv[2])
print(sorted(set(sys.modules) - before))
"""


def test_g9_loading_runs_no_code_of_the_checkpoint_and_imports_nothing_new(real: Path, tmp_path: Path) -> None:
    folder, marker = Path(shutil.copytree(real, tmp_path / "hostile")), tmp_path / "marker"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py", "eigenprune.py"):
        (folder / name).write_text(HOSTILE_CODE.format(str(marker)))
    for name, change in {
        "config.json": {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.X"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}},
    }.items():
        content = json.loads((folder / name).read_text()) | change | {"trust_remote_code": True}
        (folder / name).write_text(json.dumps(content))
    command = [sys.executable, "-c", LOADS_NOTHING_NEW, str(real), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
    assert not marker.exists()
