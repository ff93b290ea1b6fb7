# SPDX-License-Identifier: Apache-2.0
"""`save_model`: the old folder or the new one, whole, whatever happens in between (rows G35, G36, G37)."""

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenprune import EigenpruneConfig, prune_, save_model
from eigenprune.errors import CheckpointError
from eigenprune.hub import rename, staging
from eigenprune.layers import low_rank_layers
from tests.helpers.compare import file_hashes, state_hashes
from tests.helpers.tiny_models import saved_dense, tiny_tokenizer, token_windows

REPOSITORY = Path(__file__).resolve().parent.parent.parent
KILLS = 12


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock checkpoint: transformers saves a loaded model in another order than one made from its config."""
    return saved_dense("llama", tmp_path_factory.mktemp("dense") / "llama")


def _pruned(dense: Path, keep: float) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(dense)
    return model, prune_(model, EigenpruneConfig(keep=keep), windows=token_windows(), progress=False)


@pytest.fixture(scope="module")
def old(dense: Path) -> Any:
    return _pruned(dense, 0.8)[0]


@pytest.fixture(scope="module")
def new(dense: Path) -> Any:
    return _pruned(dense, 0.5)[0]


@pytest.fixture(scope="module")
def contents(old: Any, new: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, str]]:
    """What a folder holds when the old, or the new, model was saved whole."""
    folder = tmp_path_factory.mktemp("whole")
    for name, model in (("old", old), ("new", new)):
        save_model(model, folder / name, max_shard_size="60KB")
    return file_hashes(folder / "old"), file_hashes(folder / "new")


def test_saved_folder_has_model_tokenizer_and_report_and_loads(dense: Path, tmp_path: Path) -> None:
    model, report = _pruned(dense, 0.6)
    folder = save_model(model, tmp_path / "deep" / "model", tokenizer=tiny_tokenizer(), report=report)
    assert folder == tmp_path / "deep" / "model"
    assert state_hashes(AutoModelForCausalLM.from_pretrained(folder)) == state_hashes(model)
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [97, 98]
    assert json.loads((folder / "prune_report.json").read_text())["keep"] == report.keep
    assert os.listdir(tmp_path / "deep") == ["model"]


def test_existing_folder_is_refused_without_overwrite(old: Any, new: Any, tmp_path: Path) -> None:
    save_model(old, tmp_path / "model")
    before = file_hashes(tmp_path)
    with pytest.raises(CheckpointError, match="overwrite"):
        save_model(new, tmp_path / "model")
    assert file_hashes(tmp_path) == before


def test_overwriting_a_model_leaves_nothing_of_the_old_one(old: Any, new: Any, tmp_path: Path) -> None:
    folder = save_model(old, tmp_path / "model", max_shard_size="60KB")
    (folder / "of_the_old_one.txt").write_text("x")
    save_model(new, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".json") == [
        "SHA256SUMS",
        "model.safetensors",
    ]
    assert not (folder / "model.safetensors.index.json").exists()
    assert os.listdir(tmp_path) == ["model"]


def test_folder_of_something_else_is_never_overwritten(new: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    (tmp_path / "file").write_text("text")
    before = file_hashes(tmp_path)
    for name in ("photos", "file"):
        with pytest.raises(CheckpointError, match="other than a model"):
            save_model(new, tmp_path / name, overwrite=True)
    assert file_hashes(tmp_path) == before


def test_empty_folder_may_be_overwritten(new: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_model(new, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(umask: int, new: Any, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = save_model(new, tmp_path / "model", max_shard_size="60KB")
        assert os.umask(umask) == umask  # as it was found
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}


def _raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return fail


def _full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _late_failure(real: Callable[..., Any], error: BaseException, calls: int) -> Callable[..., Any]:
    """`real` for some calls, then `error`."""
    left = [calls]

    def run(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(*args, **kwargs)

    return run


# Where the disk refuses: (object, attribute, calls that still go well, error).
FAILURES: dict[str, tuple[Any, str, int, BaseException]] = {
    "making the folder": (staging.tempfile, "mkdtemp", 0, _full()),
    "before the second shard": (sys.modules["transformers.modeling_utils"], "safe_save_file", 1, _full()),
    "inside safetensors": (
        sys.modules["transformers.modeling_utils"],
        "safe_save_file",
        1,
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ),
    "writing the report": (Path, "write_text", 0, _full()),
    "setting permissions": (Path, "chmod", 2, PermissionError(errno.EPERM, "no")),
    "forcing the first file to disk": (os, "fsync", 0, OSError(errno.EIO, "input/output error")),
    "forcing the last file to disk": (os, "fsync", 3, OSError(errno.EIO, "input/output error")),
    "exchanging the folders": (rename, "exchange", 0, OSError(errno.EACCES, "no")),
}


@pytest.mark.parametrize("where", FAILURES)
def test_failed_save_keeps_the_old_folder_and_leaves_no_litter(
    where: str,
    dense: Path,
    old: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: tuple[dict[str, str], dict[str, str]],
) -> None:
    model, report = _pruned(dense, 0.5)
    save_model(old, tmp_path / "parent" / "model", max_shard_size="60KB")
    owner, name, calls, error = FAILURES[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _late_failure(getattr(owner, name), error, calls))
        with pytest.raises(CheckpointError, match="nothing was changed"):
            save_model(model, tmp_path / "parent" / "model", report=report, overwrite=True, max_shard_size="60KB")
    assert file_hashes(tmp_path / "parent" / "model") == contents[0]
    assert os.listdir(tmp_path / "parent") == ["model"]
    save_model(model, tmp_path / "parent" / "model", overwrite=True, max_shard_size="60KB")  # and then it goes well
    assert file_hashes(tmp_path / "parent" / "model") == contents[1]


@pytest.mark.parametrize("failing", [0, 1])
def test_failed_rename_where_folders_cannot_be_exchanged_keeps_the_old_one(
    failing: int,
    old: Any,
    new: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: tuple[dict[str, str], dict[str, str]],
) -> None:
    """As on a system without an exchange: the old folder steps aside, and comes back when the second rename fails."""
    save_model(old, tmp_path / "parent" / "model", max_shard_size="60KB")
    real, calls = os.rename, []

    def flaky(*args: Any) -> None:
        calls.append(args)
        if len(calls) == failing + 1:
            raise OSError(errno.EACCES, "no")
        real(*args)

    monkeypatch.setattr(rename, "exchange", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", flaky)
        with pytest.raises(CheckpointError):
            save_model(new, tmp_path / "parent" / "model", overwrite=True, max_shard_size="60KB")
    assert file_hashes(tmp_path / "parent" / "model") == contents[0]
    assert os.listdir(tmp_path / "parent") == ["model"]
    save_model(new, tmp_path / "parent" / "model", overwrite=True, max_shard_size="60KB")
    assert file_hashes(tmp_path / "parent" / "model") == contents[1]
    assert os.listdir(tmp_path / "parent") == ["model"]


def test_interrupt_while_writing_leaves_no_litter(new: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_model(new, tmp_path / "parent" / "model")
    assert os.listdir(tmp_path / "parent") == []


def test_file_size_limit_of_the_system_is_a_typed_error(tmp_path: Path, new: Any) -> None:
    """A real refused write, through the real safetensors writer."""
    save_model(new, tmp_path / "source")
    code = (
        "import resource, signal, sys, eigenprune\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    eigenprune.save_model(model, sys.argv[2])\n"
        "except eigenprune.EigenpruneError as error:\n"
        "    print(type(error).__name__)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "out" / "model")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["CheckpointError"], done.stderr[-2000:]
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("damage", ["shape", "dtype", "nan", "pivots repeat", "pivots are float"])
def test_broken_factor_is_not_saved_and_is_named(damage: str, dense: Path, tmp_path: Path) -> None:
    model, _ = _pruned(dense, 0.6)
    name, layer = next((n, m) for n, m in low_rank_layers(model).items() if m.layout == "pivot")
    with torch.no_grad():
        if damage == "shape":
            layer.left.weight = torch.nn.Parameter(layer.left.weight[1:].clone())
        elif damage == "dtype":
            layer.left.weight = torch.nn.Parameter(layer.left.weight.long(), requires_grad=False)
        elif damage == "nan":
            layer.right.weight[0, 0] = torch.nan
        elif damage == "pivots repeat":
            layer.pivots[0] = layer.pivots[1]
        else:
            layer.pivots = layer.pivots.float()
    with pytest.raises(CheckpointError, match=name):
        save_model(model, tmp_path / "parent" / "model")
    assert not (tmp_path / "parent").exists()


def test_killed_process_leaves_the_whole_old_or_the_whole_new_folder(
    old: Any, new: Any, tmp_path: Path, contents: tuple[dict[str, str], dict[str, str]]
) -> None:
    save_model(old, tmp_path / "old", max_shard_size="60KB")
    save_model(new, tmp_path / "new", max_shard_size="60KB")
    parent = tmp_path / "parent"
    folder = save_model(old, parent / "model", max_shard_size="60KB")
    command = [
        sys.executable,
        "-m",
        "tests.helpers.save_and_die",
        str(tmp_path / "old"),
        str(tmp_path / "new"),
        str(folder),
    ]
    generator = random.Random(0)
    killed_midway = 0
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent_process:
        assert parent_process.stdin is not None
        assert parent_process.stdout is not None
        assert parent_process.stdout.readline() == "ready\n"
        for _ in range(KILLS):
            parent_process.stdin.write("go\n")
            parent_process.stdin.flush()
            child = int(parent_process.stdout.readline())
            time.sleep(generator.uniform(0.0, 0.2))  # a save takes some 0.05 s
            os.kill(child, signal.SIGKILL)
            assert parent_process.stdout.readline() == "dead\n"
            found = file_hashes(folder)
            assert found in contents, [[name for name in found if found[name] != whole.get(name)] for whole in contents]
            litter = [path for path in parent.iterdir() if path != folder]
            killed_midway += bool(litter)
            for path in litter:
                shutil.rmtree(path)
        parent_process.stdin.close()
    assert killed_midway > 0  # else no kill hit a save, and nothing was shown
    assert state_hashes(AutoModelForCausalLM.from_pretrained(folder)) in (state_hashes(old), state_hashes(new))
