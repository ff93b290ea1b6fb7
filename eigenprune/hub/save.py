# SPDX-License-Identifier: Apache-2.0
"""Save a model so that a reader finds the whole old folder or the whole new one, never a part."""

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eigenprune.errors import CheckpointError
from eigenprune.hub.card import automatic_class
from eigenprune.hub.checkpoint import check_pivots
from eigenprune.hub.digests import write_digests
from eigenprune.hub.modeling import write_modeling
from eigenprune.hub.whole_folder import whole_folder
from eigenprune.layers import is_quantised, low_rank_layers, plain_values, quantised_linears, tensor_bytes
from eigenprune.quantize import check_savable
from eigenprune.report import PruneReport

REPORT_NAME = "prune_report.json"
SPACE = 1.05  # of the tensors' bytes: headers, tokenizer, report


def save_model(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    report: PruneReport | None = None,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    remote_code: bool = False,
) -> Path:
    """Save `model` with its own `save_pretrained`, and the tokenizer and report beside it, in one step.

    Everything is written to a sibling folder and forced to disk, then renamed. `SHA256SUMS` beside the weights lets the
    `eigenprune` commands and `push_to_hub` find a file that was damaged later.

    Args:
        model: pruned or not.
        folder: to write; missing parents are made.
        tokenizer: saved beside it.
        report: saved beside it.
        overwrite: replace a model that is there.
        max_shard_size: of one weight file.
        remote_code: also write `modeling_eigenprune.py`, by which readers without this package can load a pruned model
            with `trust_remote_code=True`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder is there already and `overwrite` is not set, a factor has the wrong shape or type
            or is not finite, a modelling file is asked for and the model is quantised, or the disk refuses (full,
            read-only). What was there before stays.

    A process that is killed in between leaves its unfinished folder (`.NAME.*.saving`) to the next save there.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} is there already: choose another folder, or say overwrite=True (--overwrite)")
    if folder.exists() and not (folder.is_dir() and _looks_like_model(folder)):
        raise CheckpointError(f"{folder} holds something other than a model; it is not overwritten")
    check_factors(model)
    if remote_code and quantised_linears(model):
        raise CheckpointError("a quantised model needs eigenprune and torchao to load: it gets no modelling file")
    with whole_folder(folder) as staged:
        _check_space(model, folder)
        model.save_pretrained(staged, max_shard_size=max_shard_size)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, staged)
        if report is not None:
            (staged / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        if remote_code:
            write_modeling(staged, automatic_class(type(model).__name__)[0])
        write_digests(staged)
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
            if is_quantised(weight):
                check_savable(f"{name}.{part}", weight)
            if weight.device.type != "meta" and not torch.isfinite(plain_values(weight)).all():
                raise CheckpointError(f"{name}.{part} holds NaN or infinity; it is not saved")


def _save_tokenizer(tokenizer: Any, staged: Path) -> None:
    """Save it, with an OSError for the bare Exception by which tokenizers reports a full disk."""
    try:
        tokenizer.save_pretrained(staged)
    except Exception as error:
        if type(error) is Exception:
            raise OSError(str(error)) from error
        raise


def _check_space(model: nn.Module, folder: Path) -> None:
    """Refuse before writing gigabytes that do not fit; the old folder goes only after the new one is there."""
    tensors = chain(model.parameters(), model.buffers())
    needed = int(SPACE * sum(map(tensor_bytes, tensors)))
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise CheckpointError(f"{folder} needs {needed:,} bytes, and its disk has {free:,} free; nothing was changed")


def _looks_like_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or not any(folder.iterdir())
