# SPDX-License-Identifier: Apache-2.0
"""Many fine-tuned models over one base in memory: exchange the entries of sparse deltas, and back, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eigenprune.entries.packing import pack_mask, unpack_mask
from eigenprune.errors import CheckpointError, WeightError
from eigenprune.hub.delta_decode import DeltaFile
from eigenprune.hub.delta_folder import open_delta
from eigenprune.hub.delta_manifest import StoredTensor
from eigenprune.hub.weight_source import DTYPES, tensor_digest


@dataclass
class _Exchanged:
    """Entries of one tensor that are not in the model at the moment: the base's while a delta is in, or a delta's.

    `mask` is packed; None stands for all entries.
    """

    name: str
    mask: Tensor | None
    values: Tensor


def switch_delta_(model: nn.Module, delta: str | Path | None, *, check: bool = True) -> None:
    """Make `model`, which has its base's weights or another delta in it, the fine-tuned model of `delta`.

    Nothing but the stored entries is written, in place: no weight is loaded again, no tensor moves, and optimizers,
    compiled graphs and tied weights stay as they are. In memory the exchanged values are kept, and one bit for every
    entry of the tensors that change.

    Args:
        model: loaded from the base, in the base's own dtype, on any devices.
        delta: folder of a delta; None goes back to the base, to the bit.
        check: compare the model with the base that the delta was made from first. That reads the whole model, about a
            second a gigabyte; False trusts the caller.

    Raises:
        CheckpointError: the delta is damaged, or the model is not its base, or has not all of its tensors.
        WeightError: a tensor of the model has no data here, or is tied to one that the delta changes differently.

    If anything fails, the model is as it was.
    """
    before: list[_Exchanged] = getattr(model, "_eigenprune_exchanged", [])
    _exchange_all_(model, before)
    if delta is None:
        _remember(model, [])
        return
    done: list[_Exchanged] = []
    try:
        with open_delta(delta) as opened:
            tensors = _tensors(model, opened)
            if check:
                _check_base(tensors, opened)
            for name, tensor in tensors.items():
                if opened.manifest.tensors[name].form != "base":
                    entry = _read(opened, name)
                    _exchange_(tensor, entry)
                    done.append(entry)
    except BaseException:
        _exchange_all_(model, done)
        _exchange_all_(model, before)
        raise
    _remember(model, done)


@contextmanager
def delta_applied(model: nn.Module, delta: str | Path, *, check: bool = True) -> Iterator[nn.Module]:
    """`model` as the fine-tuned model of `delta` inside, and with its base's weights after; see `switch_delta_`."""
    switch_delta_(model, delta, check=check)
    try:
        yield model
    finally:
        switch_delta_(model, None)


def _tensors(model: nn.Module, delta: DeltaFile) -> dict[str, Tensor]:
    """{name: the model's tensor} of all that the delta lists, each of the right shape and dtype, and with data."""
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    places: dict[int, str] = {}
    for name, stored in delta.manifest.tensors.items():
        found = state.get(name)
        if not isinstance(found, Tensor) or tuple(found.shape) != stored.shape:
            what = "missing" if not isinstance(found, Tensor) else f"of shape {tuple(found.shape)}"
            raise CheckpointError(
                f"{name} is {what} in this model, and of shape {stored.shape} in the delta: load the base in the class "
                "of the fine-tuned model"
            )
        _check_tensor(name, found, stored)
        if found.numel() and stored.form != "base":
            other = places.setdefault(found.data_ptr(), name)
            if other != name:
                raise WeightError(f"{name} and {other} are one tensor in this model, and two in the delta")
        tensors[name] = found.detach()
    return tensors


def _check_tensor(name: str, found: Tensor, stored: StoredTensor) -> None:
    if found.dtype != DTYPES[stored.dtype]:
        raise CheckpointError(
            f"{name} is {found.dtype} in this model, and {DTYPES[stored.dtype]} in the delta: load the base with that "
            "dtype"
        )
    if found.device.type == "meta" or not found.is_contiguous():
        raise WeightError(f"{name} has no data on this machine, or is not contiguous: it cannot be changed in place")


def _check_base(tensors: dict[str, Tensor], delta: DeltaFile) -> None:
    wanted = delta.manifest.base_tensors
    for name, tensor in tensors.items():
        if delta.manifest.tensors[name].form != "whole" and tensor_digest(tensor) != wanted[name]:
            raise CheckpointError(
                f"this model is not the base of the delta: {name} differs. Load {delta.manifest.base_model}, unchanged "
                "and in its own dtype, or go back to it with switch_delta_(model, None)"
            )


def _read(delta: DeltaFile, name: str) -> _Exchanged:
    stored = delta.manifest.tensors[name]
    if stored.form == "whole":
        return _Exchanged(name, None, delta.values(name))
    mask = torch.zeros(stored.entries, dtype=torch.bool)
    mask[delta.stored_numbers(name)] = True
    return _Exchanged(name, pack_mask(mask), delta.values(name))


def _remember(model: nn.Module, entries: list[_Exchanged]) -> None:
    """Keep what is to be put back with the model itself, so that a copy of the model has it too."""
    model.__dict__["_eigenprune_exchanged"] = entries


def _exchange_all_(model: nn.Module, entries: list[_Exchanged]) -> None:
    if entries:
        state = model.state_dict(keep_vars=True)
        for entry in entries:
            _exchange_(state[entry.name].detach(), entry)


def _exchange_(tensor: Tensor, entry: _Exchanged) -> None:
    """Put the values into `tensor`, and what was there into `entry`."""
    flat = tensor.view(-1)
    if entry.mask is None:
        old = flat.clone()
        flat.copy_(entry.values)
    else:
        numbers = unpack_mask(entry.mask, flat.numel()).nonzero().view(-1).to(flat.device)
        old = flat[numbers]
        flat[numbers] = entry.values.to(flat.device)
    entry.values = old.cpu()
