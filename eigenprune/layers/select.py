# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model are pruned, and the reason for every dense layer that is not."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from eigenprune.errors import ConfigError
from eigenprune.layers.dense import dense_weight, is_dense
from eigenprune.layers.low_rank_linear import LowRankLinear
from eigenprune.layers.quantised import is_quantised

# Last name parts of heads and routers: small, and every output depends on them.
HEAD_NAMES = frozenset({"score", "classifier", "qa_outputs", "pooler", "router", "lm_head", "embed_out"})
SMALLEST_SIDE = 16  # below two ranks of a multiple of 8 there is nothing to choose


@dataclass(frozen=True)
class Selection:
    """The linear layers of a model, by name in model order.

    Attributes:
        chosen: the dense layers to prune.
        skipped: why each other one stays dense.
        shapes: (out, in) of them all.
    """

    chosen: dict[str, nn.Module]
    skipped: dict[str, str]
    shapes: dict[str, tuple[int, int]]


def select_layers(model: nn.Module, skip: Sequence[str] = ()) -> Selection:
    """Choose the layers of `model` to prune.

    Left alone: the output embeddings, heads and routers, layers that share storage with another parameter (tied),
    subclasses of Linear, layers with a side below 16, and names that match a pattern of `skip` (regular expressions,
    found anywhere in the name).

    Raises:
        ConfigError: a pattern is no regular expression, or matches no module.
    """
    patterns = [_compile(pattern) for pattern in skip]
    dense = {name: module for name, module in model.named_modules() if is_dense(module) and name}
    for pattern in patterns:
        if not any(pattern.search(name) for name in dense):
            raise ConfigError(
                f"skip pattern {pattern.pattern!r} matches no layer; see `eigenprune inspect MODEL` for the names"
            )
    shared = _shared_storages(model)
    output = _output_embeddings(model)
    chosen, skipped, shapes = {}, {}, {}
    for name, module in _candidates(model):
        shapes[name] = (dense_weight(module).shape[0], dense_weight(module).shape[1])
        reason = _reason_to_skip(name, module, patterns, shared, output)
        if reason is None:
            chosen[name] = module
        else:
            skipped[name] = reason
    return Selection(chosen, skipped, shapes)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"skip pattern {pattern!r} is no regular expression: {error}") from error


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear layer, with those inside a factored layer left out."""
    factored = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and (is_dense(module) or isinstance(module, nn.Linear)) and not name.startswith(factored)
    ]


def _reason_to_skip(
    name: str, module: nn.Module, patterns: list[re.Pattern[str]], shared: Counter[int], output: nn.Module | None
) -> str | None:
    parts = name.split(".")
    if not is_dense(module):
        return f"{type(module).__name__} is a subclass of Linear"
    weight = dense_weight(module)
    if shared[_storage(weight)] > 1:
        return "tied: its weight is shared with another module"
    if module is output:
        return "output embeddings"
    if HEAD_NAMES.intersection(parts):
        return "head or router"
    if any(pattern.search(name) for pattern in patterns):
        return "asked to skip"
    if min(weight.shape) < SMALLEST_SIDE:
        return f"a side is below {SMALLEST_SIDE}"
    return None


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()


def _storage(tensor: torch.Tensor) -> int:
    """A number that two tensors share when they share memory; meta and quantised ones, which have none, by object."""
    if tensor.device.type == "meta" or is_quantised(tensor):
        return id(tensor if tensor._base is None else tensor._base)
    return tensor.untyped_storage().data_ptr()


def _shared_storages(model: nn.Module) -> Counter[int]:
    """How many parameters, by the places where they can be reached and not by object, live in each storage."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    counts: Counter[int] = Counter()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[_storage(parameter)] += max(1, places[id(module)])
    return counts
