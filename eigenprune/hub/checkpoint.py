# SPDX-License-Identifier: Apache-2.0
"""What the files of a pruned checkpoint must hold, checked before any weight is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eigenprune.errors import CheckpointError


def check_factor_files(
    files: Sequence[str | Path], modules: Mapping[str, Sequence[Any]], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Check that the safetensors `files` hold the factors of every layer, in the shapes that config and model imply.

    transformers fills a missing tensor with random numbers and a warning; a pruned model must not run on those.

    Args:
        modules: {layer name in the files: (layout, rank)}.
        shapes: {layer name: (out, in)}; layers not named here are not looked at.

    Raises:
        CheckpointError: a file is cut short or no safetensors file, or a factor is missing, or its shape or type is
            wrong, or pivots are out of range or repeated.
    """
    expected = {}
    for name, (out_features, in_features) in shapes.items():
        layout, rank = modules[name]
        expected[f"{name}.right.weight"] = [rank, in_features]
        expected[f"{name}.left.weight"] = [out_features - rank * (layout == "pivot"), rank]
        if layout == "pivot":
            expected[f"{name}.pivots"] = [rank]
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file.name}: a pruned model is stored as safetensors only; pickled weights are not read"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                for key in expected.keys() & set(opened.keys()):
                    _check_tensor(key, opened, expected.pop(key), shapes)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} is cut short or damaged ({error}): download or save it again"
            ) from error
    if expected:
        some = ", ".join(sorted(expected)[:3])
        raise CheckpointError(
            f"{len(expected)} tensors of factored layers are missing from the checkpoint, among them {some}"
        )


def _check_tensor(key: str, opened: Any, shape: list[int], shapes: Mapping[str, tuple[int, int]]) -> None:
    part = opened.get_slice(key)
    if list(part.get_shape()) != shape:
        raise CheckpointError(f"{key} has shape {list(part.get_shape())} in the file, and {shape} by the config")
    if key.endswith(".pivots"):
        check_pivots(opened.get_tensor(key), shapes[key.removesuffix(".pivots")][0], key)
    elif not part.get_dtype().startswith(("F", "BF")):
        raise CheckpointError(f"{key} is stored as {part.get_dtype()}, not as floating-point numbers")


def check_pivots(pivots: Tensor, out_features: int, key: str) -> None:
    """Check that `pivots` are distinct int32 positions in [0, out_features).

    Raises:
        CheckpointError: they are not.
    """
    if pivots.dtype != torch.int32:
        raise CheckpointError(f"{key} is stored as {pivots.dtype}, not as int32")
    if int(pivots.min()) < 0 or int(pivots.max()) >= out_features or len(pivots.unique()) != len(pivots):
        raise CheckpointError(f"{key} does not hold distinct positions below {out_features}")
