# SPDX-License-Identifier: Apache-2.0
"""What a dense model predicts on token windows, kept small enough to outlive the model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.cache import cache_key, save_tensors, windows_hash
from eigenprune.calibrate.objective import has_head, model_inputs
from eigenprune.errors import CalibrationError, ConfigError, WeightError
from eigenprune.recover.compute import computing, device_of
from eigenprune.recover.divergence import likeliest

TOP = 64
NAMES = ("log_probabilities", "classes")
SECONDS_BETWEEN_SAVES = 60.0

Part = tuple[Tensor, Tensor]  # of one window


@dataclass(frozen=True)
class Targets:
    """A teacher's likeliest classes at every position of some windows.

    Attributes:
        windows: [windows, window] int64 token ids.
        log_probabilities: [windows, positions, top] float16, natural logarithms.
        classes: [windows, positions, top] int32.
        key: a hash of the teacher, the windows and `top`.
    """

    windows: Tensor
    log_probabilities: Tensor
    classes: Tensor
    key: str

    def __len__(self) -> int:
        return len(self.windows)


def teacher_targets(
    teacher: nn.Module,
    windows: Tensor,
    *,
    top: int = TOP,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Targets:
    """Run `teacher` over `windows` once, and keep its `top` likeliest classes at each position.

    Memory: 6 `top` bytes a token, and the logits of one window. The teacher is not needed afterwards, so that a model
    can be asked before it is pruned, and pruned in place.

    Args:
        teacher: a transformers model with a head, in memory.
        windows: [windows, window] int64 token ids.
        top: classes kept for each position; at most the vocabulary.
        cache_dir: where they are kept under a hash of model, windows and `top`; None keeps them in memory only.
        progress: show a bar on standard error.

    Raises:
        ConfigError: the model has no head.
        CalibrationError: no windows.
        WeightError: the teacher predicts NaN or infinity.
    """
    if not has_head(teacher):
        raise ConfigError(f"{type(teacher).__name__} has no head, so it predicts nothing to learn from: use 'block'")
    if windows.ndim != 2 or windows.numel() == 0:
        raise CalibrationError(f"windows of shape {tuple(windows.shape)}: [windows, window] with tokens is needed")
    key = cache_key(teacher, windows_hash(windows), ["targets", str(top)])
    path = None if cache_dir is None else cache_dir / f"targets-{key}.safetensors"
    parts = [] if path is None else _read(path, len(windows))
    if len(parts) < len(windows):
        _predict(teacher, windows, top, parts, path, progress)
    return Targets(windows, torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]), key)


def _predict(
    teacher: nn.Module, windows: Tensor, top: int, parts: list[Part], path: Path | None, progress: bool
) -> None:
    """Add the windows that `parts` has not yet, and keep what there is, after an interrupt too."""
    device, began = device_of(teacher), time.monotonic()
    bar = tqdm(
        total=len(windows), initial=len(parts), desc="dense model", unit="window", disable=not progress, leave=False
    )
    try:
        with torch.no_grad(), bar:
            for ids in windows[len(parts) :].split(1):
                with computing(teacher):  # and no longer: under autocast, float16 values cannot be put together
                    values, classes = likeliest(logits_of(teacher, ids.to(device)), top)
                if not torch.isfinite(values).all():
                    raise WeightError("the dense model predicts NaN or infinity: check it with `eigenprune eval`")
                parts.append((values.cpu(), classes.cpu()))
                bar.update()
                if time.monotonic() - began > SECONDS_BETWEEN_SAVES:
                    _write(path, parts)
                    began = time.monotonic()
    finally:
        _write(path, parts)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[positions, classes] of the prediction for ids [1, window]; one position for a model that labels whole texts."""
    output: Any = model(**model_inputs(model, ids)).logits
    logits: Tensor = output.reshape(-1, output.shape[-1])
    return logits


def _write(path: Path | None, parts: Sequence[Part]) -> None:
    if path is not None and parts:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.stack([part[i] for part in parts]) for i, name in enumerate(NAMES)}
        save_tensors(tensors, path, None)


def _read(path: Path, windows: int) -> list[Part]:
    """What was kept there of the first windows; nothing where that is damaged."""
    try:
        tensors = load_file(path)
        values, classes = (tensors[name] for name in NAMES)
    except (FileNotFoundError, SafetensorError, KeyError):
        return []
    return list(zip(values, classes, strict=True)) if len(values) == len(classes) <= windows else []
