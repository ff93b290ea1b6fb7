# SPDX-License-Identifier: Apache-2.0
"""Save a model so that a reader finds the whole old folder or the whole new one, never a part."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from eigenprune.errors import CheckpointError
from eigenprune.hub.checkpoint import check_pivots
from eigenprune.hub.rename import put_in_place
from eigenprune.layers import low_rank_layers
from eigenprune.report import PruneReport

REPORT_NAME = "prune_report.json"


def save_model(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    report: PruneReport | None = None,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Save `model` with its own `save_pretrained`, and the tokenizer and report beside it, in one step.

    Everything is written to a sibling folder and forced to disk, then renamed.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder is there already and `overwrite` is not set, a factor has the wrong shape or type
            or is not finite, or the disk refuses (full, read-only). What was there before stays.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} is there already: choose another folder, or say overwrite=True (--overwrite)")
    if folder.exists() and not (folder.is_dir() and _looks_like_model(folder)):
        raise CheckpointError(f"{folder} holds something other than a model; it is not overwritten")
    check_factors(model)
    staged = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".saving", dir=folder.parent))
        model.save_pretrained(staged, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if report is not None:
            (staged / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        _follow_umask(staged)
        _force_to_disk(staged)
        put_in_place(staged, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk with an error of its own
        raise CheckpointError(f"{folder} cannot be written: {error}; nothing was changed") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
    return folder


def check_factors(model: nn.Module) -> None:
    """Check every factored layer of `model` against its own layout and rank.

    Raises:
        CheckpointError: a factor has the wrong shape or type, holds NaN or infinity, or has bad pivots.
    """
    for name, module in low_rank_layers(model).items():
        if module.layout == "pivot" and module.pivots.device.type != "meta":
            check_pivots(module.pivots, module.out_features, f"{name}.pivots")
        rows = module.out_features - (module.rank if module.layout == "pivot" else 0)
        expected = {"right": (module.rank, module.in_features), "left": (rows, module.rank)}
        for part, shape in expected.items():
            weight = module.get_submodule(part).weight
            if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != shape or not weight.is_floating_point():
                raise CheckpointError(
                    f"{name}.{part} is not a floating-point matrix of shape {shape}; it cannot be saved"
                )
            if weight.device.type != "meta" and not torch.isfinite(weight).all():
                raise CheckpointError(f"{name}.{part} holds NaN or infinity; it is not saved")


def _looks_like_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or not any(folder.iterdir())


def _follow_umask(staged: Path) -> None:
    """Give folder and files the permissions that newly made ones get; temporary ones are the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    staged.chmod(0o777 & ~umask)
    for path in staged.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _force_to_disk(staged: Path) -> None:
    for path in [*staged.rglob("*"), staged]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
