# SPDX-License-Identifier: Apache-2.0
"""Statistics and sampled texts on disk: what names them, and how a killed run goes on."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eigenprune.calibrate.accumulate import Accumulator

CACHE_VERSION = 1
SECONDS_BETWEEN_SAVES = 30.0  # a save of a 1 GB pass takes about a second


def default_cache_dir() -> Path:
    """`$EIGENPRUNE_CACHE`, else `eigenprune` in the user's cache folder."""
    named = os.environ.get("EIGENPRUNE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eigenprune"


def model_fingerprint(model: nn.Module) -> str:
    """A hash over names, dtypes, shapes and bytes of all parameters and saved buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def windows_hash(windows: Tensor) -> str:
    """A hash over the shape and the int64 token ids of windows [windows, window]."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(windows.long().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def cache_key(model: nn.Module, texts: str, settings: Sequence[str]) -> str:
    """The name for what was measured with `model` on the texts of that hash, or written by it, under `settings`."""
    key = [CACHE_VERSION, model_fingerprint(model), _architecture(model), texts, *settings]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _architecture(model: nn.Module) -> str:
    """What the config says beside the weights (a rope base, say), without where the model was loaded from."""
    config: Any = getattr(model, "config", None)
    values = {} if config is None else {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return json.dumps(values, sort_keys=True, default=str)


class PassFile:
    """The sums of one pass on disk: `NAME.safetensors` when finished, `NAME.partial.safetensors` on the way."""

    def __init__(self, folder: Path, number: int, layers: Sequence[str]) -> None:
        split = hashlib.sha256("\n".join(layers).encode()).hexdigest()[:8]  # another memory bound splits otherwise
        self.finished = folder / f"pass-{number:03d}-{split}.safetensors"
        self.partial = self.finished.with_suffix(".partial.safetensors")
        self._saved_at = time.monotonic()

    def is_finished(self) -> bool:
        """Whether the means are on disk and whole; a damaged file is dropped."""
        try:
            with safe_open(self.finished, framework="pt"):
                return True
        except FileNotFoundError:
            return False
        except SafetensorError:
            self.finished.unlink()
            return False

    def resume(self, accumulator: Accumulator, count: int) -> int:
        """Load half-finished sums into `accumulator`; returns how many windows they hold. Unusable ones are dropped."""
        try:
            with safe_open(self.partial, framework="pt") as opened:
                facts = json.loads(opened.metadata()["progress"])
            counts, windows = dict(facts["counts"]), int(facts["windows"])
            tensors = load_file(self.partial)
        except FileNotFoundError:
            return 0
        except (SafetensorError, KeyError, TypeError, ValueError):
            self.partial.unlink()
            return 0
        sums = accumulator.tensors()
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        fits = (
            shapes == {name: total.shape for name, total in sums.items()} and counts.keys() == accumulator.counts.keys()
        )
        if not fits or not 0 <= windows < count:
            self.partial.unlink()
            return 0
        for name, total in sums.items():
            total.copy_(tensors[name])
        accumulator.counts.update(counts)
        return windows

    def save_now_and_then(self, accumulator: Accumulator, windows: int) -> None:
        """Save the sums over the first `windows` windows, if the last save is some time ago."""
        if time.monotonic() - self._saved_at < SECONDS_BETWEEN_SAVES:
            return
        progress = json.dumps({"windows": windows, "counts": accumulator.counts})
        save_tensors(accumulator.tensors(), self.partial, {"progress": progress})
        self._saved_at = time.monotonic()

    def finish(self, means: Mapping[str, Tensor]) -> None:
        """Save the means and drop the half-finished sums."""
        save_tensors(means, self.finished, None)
        self.partial.unlink(missing_ok=True)


class SampleFile:
    """The documents that a model has written so far, in whole batches: `sampled-KEY.safetensors`."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / f"sampled-{key}.safetensors"

    def resume(self, batches: Sequence[int], document: int) -> list[Tensor]:
        """The finished ones of the `batches` (documents in each), [documents, document] int64; an unusable file is
        dropped."""
        try:
            tokens = load_file(self._path)["tokens"]
        except FileNotFoundError:
            return []
        except (SafetensorError, KeyError):
            self._path.unlink()
            return []
        finished = [sum(batches[: number + 1]) for number in range(len(batches))]
        if tokens.ndim != 2 or tokens.shape[1] != document or tokens.shape[0] not in finished:
            self._path.unlink()
            return []
        return list(tokens.long().split(list(batches[: finished.index(tokens.shape[0]) + 1])))

    def save(self, done: Sequence[Tensor]) -> None:
        """Save all finished batches."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"tokens": torch.cat(list(done)).int()}, self._path, None)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Write beside `path`, then rename over it, so that a killed run leaves the whole old file or the whole new one."""
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), staged, metadata)
        with open(staged, "rb") as written:
            os.fsync(written.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
