# SPDX-License-Identifier: Apache-2.0
"""Statistics on disk: passes, reuse, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from eigenprune.calibrate import Statistics, cache, collect_statistics, default_cache_dir
from tests.calibrate import tiny
from tests.calibrate.tiny import linears

ALL = ("input_gram", "output_gram", "weight_gradient")
ROOT = Path(__file__).parents[2]
COUNT = 6


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigenprune.calibrate.collect.has_fast_bfloat16", lambda device: False)


def collect(
    folder: Path | None, model: nn.Module | None = None, ids: torch.Tensor | None = None, **settings
) -> Statistics:
    model = tiny.llama() if model is None else model
    ids = tiny.windows(COUNT) if ids is None else ids
    settings = {"kinds": ALL, "progress": False} | settings
    return collect_statistics(model, ids, linears(model), cache_dir=folder, **settings)


def assert_bit_equal(got: Statistics, wanted: Statistics) -> None:
    assert set(got.tensors) == set(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
    assert got.input_group == wanted.input_group
    assert got.facts == wanted.facts


def forwards(model: nn.Module, run: Callable[[], object]) -> int:
    """How often `run` calls the model, the call that finds the groups included."""
    calls = 0

    def count(*_args: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_pre_hook(count)
    run()
    handle.remove()
    return calls


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("memory_bytes", [1, 60_000, 8 << 30])
def test_any_number_of_passes_gives_the_bits_of_one_pass_in_memory(tmp_path: Path, memory_bytes: int) -> None:
    model = tiny.llama()
    wanted = collect(None, model)
    got = collect(tmp_path, model, memory_bytes=memory_bytes)
    assert_bit_equal(got, wanted)
    passes = {1: 14, 8 << 30: 1}.get(memory_bytes)
    assert len(files(tmp_path)) == passes if passes else 1 < len(files(tmp_path)) < 14


def test_no_pass_holds_more_than_the_bound_beyond_its_largest_layer(tmp_path: Path) -> None:
    collect(tmp_path, memory_bytes=60_000)
    for file in files(tmp_path):
        sums = load_file(file)
        size = sum(4 * tensor.numel() for name, tensor in sums.items() if "mean" not in name)
        assert size <= 60_000


def test_a_second_call_reads_the_cache_and_runs_the_model_once(tmp_path: Path) -> None:
    model = tiny.llama()
    first = collect(tmp_path, model)
    assert forwards(model, lambda: assert_bit_equal(collect(tmp_path, model), first)) == 1  # to find the groups
    twin = tiny.llama().train()
    assert forwards(twin, lambda: collect(tmp_path, twin)) == 1


@pytest.mark.parametrize("what", ["text", "order", "weight", "seed", "kinds", "layers", "dtype"])
def test_another_text_model_or_setting_is_measured_anew(tmp_path: Path, what: str) -> None:
    model, ids, settings = tiny.llama(), tiny.windows(COUNT), {}
    collect(tmp_path, model, ids)
    if what == "text":
        ids[5, 20] ^= 1
    elif what == "order":
        ids = ids.flip(0)
    elif what == "weight":
        with torch.no_grad():
            model.model.norm.weight[3] += 2.0**-20
    elif what == "seed":
        settings["seed"] = 1
    elif what == "kinds":
        settings["kinds"] = ("input_gram", "output_gram")
    elif what == "layers":
        model.model.layers[0].mlp.gate_proj.requires_grad_(False)
        model.model.layers[0].mlp.up_proj = nn.Linear(tiny.WIDTH, 48)  # with a bias
    else:
        model.bfloat16()
    assert forwards(model, lambda: collect(tmp_path, model, ids, **settings)) == 1 + len(ids)


def test_windows_of_another_shape_are_another_text() -> None:
    ids = tiny.windows(4, 6)
    assert cache.windows_hash(ids) != cache.windows_hash(ids.view(6, 4))
    assert cache.windows_hash(ids) == cache.windows_hash(ids.int())


KILLED = """
import os, signal, sys
from pathlib import Path
import eigenprune.calibrate.cache as cache
import eigenprune.calibrate.collect as collect
from tests.calibrate import tiny

cache.SECONDS_BETWEEN_SAVES = 0
collect.has_fast_bfloat16 = lambda device: False
calls = 0


def die_at_the_fourth(own):
    def call(*args):
        global calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args)

    return call


if sys.argv[2] == "measuring":
    collect.Accumulator.check_finite = die_at_the_fourth(collect.Accumulator.check_finite)
else:
    os.fsync = die_at_the_fourth(os.fsync)
model = tiny.llama()
collect.collect_statistics(
    model, tiny.windows(6), tiny.linears(model), kinds=("input_gram", "output_gram", "weight_gradient"),
    cache_dir=Path(sys.argv[1]), progress=False,
)
"""


@pytest.mark.parametrize("moment", ["measuring", "saving"])
def test_a_killed_run_goes_on_where_it_last_saved_with_the_same_bits(tmp_path: Path, moment: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=200,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (partial,) = tmp_path.rglob("*.partial.safetensors")
    with safe_open(partial, framework="pt") as opened:
        assert json.loads(opened.metadata()["progress"])["windows"] == 3
    model = tiny.llama()
    resumed = []
    assert forwards(model, lambda: resumed.append(collect(tmp_path, model))) == 1 + 3  # of the 6 windows
    assert_bit_equal(resumed[0], collect(None, model))
    assert not list(tmp_path.rglob("*.partial.safetensors"))


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The half-finished file of a run that was stopped at its fifth window."""
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_SAVES", 0)
    model, calls = tiny.llama(), []

    def stop(*_args: object) -> None:
        calls.append(1)
        if len(calls) == 1 + 5:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        collect(folder, model)
    (partial,) = folder.rglob("*.partial.safetensors")
    return partial


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "noise": lambda raw: bytes(range(256)) * 8,
    "header": lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:],
}


@pytest.mark.parametrize("damage", [*DAMAGES, "no progress", "empty progress", "other shapes", "too far"])
def test_a_damaged_half_finished_file_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    partial = interrupted(tmp_path, monkeypatch)
    if damage in DAMAGES:
        partial.write_bytes(DAMAGES[damage](partial.read_bytes()))
    else:
        tensors = load_file(partial)
        with safe_open(partial, framework="pt") as opened:
            progress = json.loads(opened.metadata()["progress"])
        if damage == "other shapes":
            tensors = {name: tensor.flatten() for name, tensor in tensors.items()}
        if damage == "too far":
            progress["windows"] = 99
        if damage == "empty progress":
            progress = {}
        save_file(tensors, partial, None if damage == "no progress" else {"progress": json.dumps(progress)})
    model, got = tiny.llama(), []
    assert forwards(model, lambda: got.append(collect(tmp_path, model))) == 1 + COUNT
    assert_bit_equal(got[0], collect(None, model))


def test_an_undamaged_half_finished_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch)
    model, got = tiny.llama(), []
    assert forwards(model, lambda: got.append(collect(tmp_path, model))) == 1 + COUNT - 4
    assert_bit_equal(got[0], collect(None, model))


def test_a_damaged_finished_file_is_measured_again(tmp_path: Path) -> None:
    model = tiny.llama()
    names = set(collect(tmp_path, model).tensors)
    (finished,) = files(tmp_path)
    finished.write_bytes(finished.read_bytes()[:1000])
    again = collect(tmp_path, model)
    assert dict(again.tensors).keys() == names
    assert_bit_equal(again, collect(None, model))


def test_a_failed_save_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        collect(tmp_path)
    assert files(tmp_path) == []


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EIGENPRUNE_CACHE", "/named")
    assert default_cache_dir() == Path("/named")
    monkeypatch.delenv("EIGENPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/user-cache")
    assert default_cache_dir() == Path("/user-cache/eigenprune")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path.home() / ".cache" / "eigenprune"
