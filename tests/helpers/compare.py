# SPDX-License-Identifier: Apache-2.0
"""Bit-exact comparison of models and folders, also across processes: everything becomes a JSON-able dict of hashes."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn


def tensor_hash(tensor: Tensor) -> str:
    """dtype, shape and a hash of the bytes."""
    if hasattr(tensor, "tensor_data_names"):  # one of torchao's; told without the package, which would plug itself in
        tensor = tensor.dequantize()
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()[:24]}"


def state_hashes(model: nn.Module) -> dict[str, str]:
    """Every saved tensor of a model."""
    return {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()}


def tied_groups(model: nn.Module) -> list[list[str]]:
    """The names of parameters that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.data_ptr(), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def file_hashes(folder: Path) -> dict[str, str]:
    """Every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
