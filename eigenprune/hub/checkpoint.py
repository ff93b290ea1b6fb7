# SPDX-License-Identifier: Apache-2.0
"""What the files of a pruned checkpoint must hold, checked before any weight is loaded."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eigenprune.errors import CheckpointError
from eigenprune.hub.limits import check_header
from eigenprune.hub.names import is_weight_name
from eigenprune.quantize import NUMBERS, SCALE

SUBFOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)  # `from_pretrained` can be given one
STORED = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
FACTOR_DTYPES = ("F64", "F32", "BF16", "F16")  # an 8-bit float without its scale is no weight


def check_factor_files(files: Sequence[str | Path], layers: Mapping[str, nn.Module]) -> set[str]:
    """Check that the safetensors `files` hold every tensor of these `layers`, in its shape and of its kind.

    transformers fills a missing tensor with random numbers and a warning; a pruned model must not run on those.

    Args:
        files: all files of the checkpoint.
        layers: {layer name in the files: the still empty layer, as config and model imply it}: factored ones, with
            `StoredWeight` in the place of quantised factors, and that alone for quantised dense layers.

    Returns:
        The names of other factored or quantised layers that the files hold.

    Raises:
        CheckpointError: a file is cut short or no safetensors file, or a tensor is missing, or its shape or type is
            wrong, or pivots are out of range or repeated.
    """
    expected = {
        f"{name}.{part}": (tensor, layer)
        for name, layer in layers.items()
        for part, tensor in layer.state_dict().items()
    }
    found: set[str] = set()
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file.name}: a pruned model is stored as safetensors only; pickled weights are not read"
            )
        if not is_weight_name(file.name):
            raise CheckpointError(f"{file.name!r:.80} is no name of a weight file: save the model again")
        try:
            check_header(file)
            with safe_open(file, framework="pt") as opened:
                found.update(opened.keys())
                for key in expected.keys() & set(opened.keys()):
                    tensor, layer = expected.pop(key)
                    _check_tensor(key, opened, list(tensor.shape), int(getattr(layer, "out_features", 0)))
                    _check_kind(key, opened, tensor.dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} is missing, cut short or damaged ({error}): download or save it again"
            ) from error
    if expected:
        some = ", ".join(sorted(expected)[:3])
        raise CheckpointError(
            f"{len(expected)} tensors of factored layers are missing from the checkpoint, among them {some}"
        )
    factored = {key.removesuffix(".right.weight") for key in found if key.endswith(".right.weight")}
    others = {name for name in factored if f"{name}.left.weight" in found}
    numbers = {key.removesuffix(f".{NUMBERS}") for key in found if key.endswith(f".{NUMBERS}")}
    # Of a quantised factor the layer is named, where that is no layer of its own.
    others |= {name.removesuffix(".right").removesuffix(".left") for name in numbers}
    return others - layers.keys()


def check_plain_files(files: Sequence[str | Path], tensors: Mapping[str, Sequence[int]]) -> None:
    """Check that the safetensors `files` hold what pruning has given or made smaller, beside the factors.

    Args:
        tensors: {name in the files: shape}: the biases of layers that had none, and the weights of layers that have
            lost channels and are dense.

    Raises:
        CheckpointError: a tensor is missing, or its shape or type is wrong.
    """
    expected = {name: list(shape) for name, shape in tensors.items()}
    for file in map(Path, files) if expected else ():
        with safe_open(file, framework="pt") as opened:
            for key in expected.keys() & set(opened.keys()):
                _check_tensor(key, opened, expected.pop(key), 0)
    if expected:
        raise CheckpointError(f"the checkpoint lacks {min(expected)}, which its config speaks of")


def check_places(files: Sequence[str | Path], folder: str | Path) -> None:
    """Check that the weight `files` of a checkpoint in a local `folder` lie in it, by their names.

    transformers joins the names of an index to the folder unseen. A `folder` that is the id of a repository on the Hub
    is not looked at: no file in a repository has such a name.

    Raises:
        CheckpointError: one does not.
    """
    if not Path(folder).is_dir():
        return
    for file in map(Path, files):
        inside = file.is_relative_to(folder) and all(map(SUBFOLDER.fullmatch, file.relative_to(folder).parts[:-1]))
        if not inside:
            raise CheckpointError(f"the index names {file.name!r:.80}, which is not in the folder of the model")


def _check_tensor(key: str, opened: Any, shape: list[int], out_features: int) -> None:
    part = opened.get_slice(key)
    if list(part.get_shape()) != shape:
        raise CheckpointError(f"{key} has shape {list(part.get_shape())} in the file, and {shape} by the config")
    if key.endswith(".pivots"):
        check_pivots(opened.get_tensor(key), out_features, key)
    elif not key.endswith(f".{NUMBERS}") and part.get_dtype() not in FACTOR_DTYPES:
        raise CheckpointError(f"{key} is stored as {part.get_dtype()}, not as one of {', '.join(FACTOR_DTYPES)}")


def _check_kind(key: str, opened: Any, dtype: torch.dtype) -> None:
    """Of the parts of a quantised weight the dtype too: it says how they are read."""
    if key.endswith((f".{NUMBERS}", f".{SCALE}")):
        found = opened.get_slice(key).get_dtype()
        if found != STORED[dtype]:
            raise CheckpointError(f"{key} is stored as {found}, not as {STORED[dtype]}")


def check_pivots(pivots: Tensor, out_features: int, key: str) -> None:
    """Check that `pivots` are distinct int32 positions in [0, out_features).

    Raises:
        CheckpointError: they are not.
    """
    if pivots.dtype != torch.int32:
        raise CheckpointError(f"{key} is stored as {pivots.dtype}, not as int32")
    if int(pivots.min()) < 0 or int(pivots.max()) >= out_features or len(pivots.unique()) != len(pivots):
        raise CheckpointError(f"{key} does not hold distinct positions below {out_features}")
