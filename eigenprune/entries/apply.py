# SPDX-License-Identifier: Apache-2.0
"""Put masks to use: the kept entries of one model, the others of another one, or zero."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from eigenprune.entries.groups import tied_names
from eigenprune.errors import WeightError


def merge_entries(
    base: Mapping[str, Tensor] | None, tuned: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each tensor of `tuned`, in its order: its value where the mask is True, else that of `base`.

    One tensor at a time, so that a large model can be written as it goes; `dict(merge_entries(...))` is a state dict.
    The tensors are new ones, in the dtype and on the device of `tuned`; those without a mask (integers) are copies.
    Neither model changes. Where two names share one mask and one memory in `tuned` (tied weights), both get equal
    values.

    Args:
        base: the base model's tensors; None: entries that are not kept become zero (Wanda, magnitude pruning).
        tuned: the fine-tuned model's.
        masks: of `select_entries`.

    Raises:
        WeightError: a mask has another shape than its tensor, or the base model lacks a value that is needed.
    """
    same = tied_names(tuned, list(tuned))
    for name, tensor in tuned.items():
        if name not in masks:
            yield name, tensor.detach().clone()
            continue
        mask = masks[name].to(tensor.device)
        if mask.shape != tensor.shape:
            raise WeightError(f"{name}: a mask of {tuple(mask.shape)} for a tensor of {tuple(tensor.shape)}")
        if bool(mask.all()):
            yield name, tensor.detach().clone()
            continue
        yield name, torch.where(mask, tensor.detach(), _other(base, name, same, tensor))


def _other(base: Mapping[str, Tensor] | None, name: str, same: Mapping[str, str], tensor: Tensor) -> Tensor:
    if base is None:
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    if name not in base:  # a file holds a tied tensor under one of its names
        group = same.get(name, name)
        name = next((other for other in (group, *same) if same.get(other, other) == group and other in base), name)
    if name not in base or base[name].shape != tensor.shape:
        raise WeightError(f"{name}: the base model has no value of shape {tuple(tensor.shape)} for its entries")
    return base[name].detach().to(tensor.device, tensor.dtype)
