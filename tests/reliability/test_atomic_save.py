# SPDX-License-Identifier: Apache-2.0
"""A save that is killed, or that the disk refuses, at each of its steps (rows G35, G36)."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, PruneReport, prune_, save_model
from eigenprune.errors import CheckpointError
from eigenprune.hub import rename
from tests.helpers.compare import file_hashes, state_hashes
from tests.helpers.tiny_models import saved_dense, tiny_tokenizer, token_windows

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the process that saves")
SHARD = "60KB"
# Python reports these as it comes to them; the shards themselves are written by safetensors, between two of them.
STEPS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.chmod",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "tempfile.mkdtemp",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, PruneReport]:
    dense = saved_dense("llama", tmp_path_factory.mktemp("dense") / "llama")
    old, new = (AutoModelForCausalLM.from_pretrained(dense) for _ in range(2))
    prune_(old, EigenpruneConfig(keep=0.8), windows=token_windows(), progress=False)
    return old, new, prune_(new, EigenpruneConfig(keep=0.5), windows=token_windows(), progress=False)


@pytest.fixture
def folder(models: tuple[Any, Any, PruneReport], tmp_path: Path) -> Path:
    """The old model, saved."""
    return save_model(models[0], tmp_path / "parent" / "model", max_shard_size=SHARD)


def _save(models: tuple[Any, Any, PruneReport], folder: Path) -> None:
    save_model(models[1], folder, tokenizer=tiny_tokenizer(), report=models[2], overwrite=True, max_shard_size=SHARD)


@pytest.fixture(scope="module")
def whole(models: tuple[Any, Any, PruneReport], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What the folder holds when the old, or the new, model is there whole."""
    scratch = tmp_path_factory.mktemp("whole")
    save_model(models[0], scratch / "old", max_shard_size=SHARD)
    _save(models, scratch / "new")
    return file_hashes(scratch / "old"), file_hashes(scratch / "new")


def _in_child(body: Callable[[], None]) -> int:
    """How a forked process ended that ran `body`: 0, 1 where it raised, or minus a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(step: int, parent: Path) -> None:
    """From now on, die as the `step`th thing is done to a path under `parent`."""
    left = [step]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STEPS and arguments and str(parent) in os.fsdecode(arguments[0] or b""):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, arguments: hook(event, arguments) if _is_path(arguments) else None)


def _is_path(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments) and isinstance(arguments[0], str | bytes | os.PathLike)


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_g35_killed_at_each_step_leaves_the_old_or_the_new_model_and_the_next_save_sweeps_up(
    exchanges: bool,
    models: tuple[Any, Any, PruneReport],
    whole: tuple[Any, Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not exchanges:
        monkeypatch.setattr(rename, "exchange", lambda *_: False)
    parent, step, seen, litter = folder.parent, 0, [], 0

    def body() -> None:
        _kill_at(step, parent)
        _save(models, folder)

    while _in_child(body) == -signal.SIGKILL:
        if folder.exists() or exchanges:
            seen.append(file_hashes(folder))
            assert seen[-1] in whole, f"killed at step {step}"
        else:  # between two renames, the old one stands aside, whole
            (aside,) = parent.glob(".model.*.old")
            seen.append(file_hashes(aside))
            assert seen[-1] == whole[0]
        litter += len(list(parent.iterdir())) > 1
        for left in parent.glob(".model.*.old"):  # nobody but the user may decide on those
            shutil.rmtree(left)
        save_model(models[0], folder, overwrite=True, max_shard_size=SHARD)
        assert os.listdir(parent) == ["model"]
        step += 1 if exchanges else 3
    assert step >= 25
    assert litter >= (20 if exchanges else 7)  # so there was something to sweep up
    assert {tuple(found) for found in seen} == {tuple(side) for side in whole}
    assert file_hashes(folder) == whole[1]


def test_g35_save_sweeps_up_nothing_that_is_in_use_or_of_another(
    models: tuple[Any, Any, PruneReport], folder: Path
) -> None:
    """Another process is saving there right now; other models have names that begin alike."""
    import fcntl

    names = (".model.v2.abcdefgh.saving", ".other.abcdefgh.saving", ".model.x.saving", ".model.abcdefgh.old")
    others = [folder.parent / name for name in names]
    in_use = folder.parent / ".model.abcdefgh.saving"
    left = folder.parent / ".model.hgfedcba.saving"
    for path in (*others, in_use, left):
        path.mkdir()
        (path / "x").write_text("x")
    descriptor = os.open(in_use, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        _save(models, folder)
    finally:
        os.close(descriptor)
    assert sorted(folder.parent.iterdir()) == sorted([folder, *others, in_use])


def test_g36_file_size_limit_below_every_file_is_a_typed_error_and_leaves_the_old_model(
    models: tuple[Any, Any, PruneReport], whole: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    """Real refused writes: each file in turn, of those that the limit reaches, is one byte too long for it."""
    import resource

    _save(models, tmp_path / "measure" / "model")
    sizes = {path.stat().st_size for path in (tmp_path / "measure" / "model").iterdir()}

    def body(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            _save(models, folder)
        except CheckpointError as error:
            os._exit(0 if "nothing was changed" in str(error) else 3)
        os._exit(4)

    limits = sorted({0, 1, 4096, *(size - 1 for size in sizes), *(size // 2 for size in sizes)})
    for limit in limits:
        assert _in_child(lambda limit=limit: body(limit)) == 0, limit  # type: ignore[misc]
        assert file_hashes(folder) == whole[0]
        assert os.listdir(folder.parent) == ["model"]
    assert len(limits) >= 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, where this process may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("may not mount a small disk here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_g36_full_disk_at_each_write_leaves_the_old_model_and_no_litter(
    models: tuple[Any, Any, PruneReport], whole: tuple[Any, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with a page more at each try, until all fits: every page that is written is the one too many, once."""
    folder = save_model(models[0], small_disk / "parent" / "model", max_shard_size=SHARD)
    # The size is looked at first; here the disk fills up after that.
    monkeypatch.setattr("eigenprune.hub.save.SPACE", 0.0)
    filler, page, refused = small_disk / "filler", os.sysconf("SC_PAGE_SIZE"), 0
    said = set()
    free = shutil.disk_usage(small_disk).free
    with filler.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, free)
    while True:
        try:
            _save(models, folder)
        except CheckpointError as error:
            said.add("No space left" in str(error))
        else:
            break
        assert file_hashes(folder) == whole[0]
        assert sorted(os.listdir(small_disk)) == ["filler", "parent"]
        assert os.listdir(folder.parent) == ["model"]
        refused += 1
        os.truncate(filler, filler.stat().st_size - page)
    assert refused >= 25
    assert said == {True}
    assert file_hashes(folder) == whole[1]


def test_g36_space_is_looked_at_before_anything_is_written(
    models: tuple[Any, Any, PruneReport], whole: tuple[Any, Any], small_disk: Path
) -> None:
    folder = save_model(models[0], small_disk / "parent" / "model", max_shard_size=SHARD)
    with (small_disk / "filler").open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, shutil.disk_usage(small_disk).free - 100_000)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, and its disk has [\d,]+ free"):
        _save(models, folder)
    assert file_hashes(folder) == whole[0]
    assert state_hashes(AutoModelForCausalLM.from_pretrained(folder)) == state_hashes(models[0])
