# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a pair of models are chosen among, which are kept whole, and which are one tensor twice."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.errors import ConfigError, WeightError

# Heads are small, often new in the fine-tuned model, and every output depends on them.
HEADS = (r"(^|\.)(classifier|score|qa_outputs|pooler|classification_head)\.",)
EMBEDDINGS = (r"embed|(^|\.)(wte|wpe|shared)\.",)


@dataclass(frozen=True)
class Plan:
    """The floating tensors of a fine-tuned model, in its order.

    Attributes:
        chosen: to choose entries of.
        whole: kept whole.
        same: {name: the name in `chosen` or `whole` that is the same tensor}.
        in_base: {name in `chosen`: its name in the base model, which may hold a tied tensor under one name only}.
    """

    chosen: tuple[str, ...]
    whole: tuple[str, ...]
    same: Mapping[str, str]
    in_base: Mapping[str, str]


def plan_tensors(
    base: Mapping[str, Tensor] | None, tuned: Mapping[str, Tensor], keep_whole: Sequence[str], only: Sequence[str]
) -> Plan:
    """Sort the floating tensors of `tuned`; integer and bool tensors are no entry's business, and in none of the lists.

    A tensor is kept whole where a pattern of `keep_whole` matches its name (or that of a tensor tied to it), where
    `only` is given and matches none, and where the base model does not have it. Without a base model (entries go to
    zero), nothing is asked of it.

    Raises:
        ConfigError: a pattern is no regular expression, or matches no tensor (a default pattern may).
        WeightError: shapes differ, or a tensor is tied in the fine-tuned model but two unequal ones in the base model.
    """
    names = [name for name in tuned if tuned[name].is_floating_point()]
    same = tied_names(tuned, names)
    wanted, unwanted = _matching(only, names), _matching(keep_whole, names)
    chosen: list[str] = []
    whole: list[str] = []
    in_base: dict[str, str] = {}
    for name in names:
        if name in same:
            continue
        group = [name, *(other for other, first in same.items() if first == name)]
        inside = not only or any(other in wanted for other in group)
        present = [] if base is None else [other for other in group if other in base]
        if not inside or (base is not None and not present) or any(other in unwanted for other in group):
            whole.append(name)
            continue
        chosen.append(name)
        if base is None:
            continue
        in_base[name] = present[0]
        for other in present:
            _check_pair(other, base[other], tuned[name], base[present[0]])
    return Plan(tuple(chosen), tuple(whole), same, in_base)


def tied_names(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, str]:
    """{name: the first name of the same memory, shape and strides}; of a plain dict, whose tensors are all alive."""
    if not isinstance(
        tensors, dict
    ):  # a file: it holds a tied tensor once, and memory of one read is used for the next
        return {}
    first: dict[tuple[object, ...], str] = {}
    same = {}
    for name in names:
        tensor = tensors[name]
        if not tensor.numel() or tensor.device.type == "meta":
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if first.setdefault(key, name) != name:
            same[name] = first[key]
    return same


def _check_pair(name: str, base: Tensor, tuned: Tensor, first: Tensor) -> None:
    if base.shape != tuned.shape:
        raise WeightError(
            f"{name}: {tuple(tuned.shape)} in the fine-tuned model, {tuple(base.shape)} in the base model: give the "
            "model it was fine-tuned from, or name the tensor in keep_whole"
        )
    if not base.is_floating_point():
        raise WeightError(f"{name}: {tuned.dtype} in the fine-tuned model, {base.dtype} in the base model")
    if base is not first and not torch.equal(base, first):
        raise WeightError(f"{name} is tied to another tensor in the fine-tuned model, but not in the base model")


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from error
        matches = {name for name in names if compiled.search(name)}
        if not matches and pattern not in HEADS + EMBEDDINGS:
            raise ConfigError(f"pattern {pattern!r} matches no tensor of the fine-tuned model")
        found |= matches
    return found
