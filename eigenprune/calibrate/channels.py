# SPDX-License-Identifier: Apache-2.0
"""Hidden channels: where layers write what one later layer reads, entry by entry, so that whole entries can go.

The MLP of a transformer is such a place: entry j of what `down_proj` reads depends on entry j of what `gate_proj` and
`up_proj` write, and on no other. No model is known here by name; the model itself is asked.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eigenprune.calibrate.inputs import shared_inputs
from eigenprune.calibrate.objective import model_inputs
from eigenprune.layers import dense_weight

TOKENS = 32  # that the model is asked on
EQUAL = 1e-3  # relative; where entries do mix, the difference is of the size of the input itself


@dataclass(frozen=True)
class ChannelGroup:
    """`producers` write [..., channels], `consumer` reads [..., channels], and in between no channel meets another."""

    producers: tuple[str, ...]
    consumer: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its layers."""
        return (*self.producers, self.consumer)


def channel_groups(model: nn.Module, windows: Tensor, layers: Mapping[str, nn.Module]) -> list[ChannelGroup]:
    """The groups among `layers`, in the order in which they run; no layer is in two of them.

    A candidate is a layer with the layers of one input that run just before it, if they write as much as it reads. All
    candidates are tried at once: the outputs of the producers are put in another order and the input of the consumer
    back in the old one. Where no channel meets another, nothing changes, in any layer. What does not pass is dropped,
    with all candidates of the same names but for numbers, and the rest is tried again.

    Args:
        model: a transformers model; it ends as it was.
        windows: [windows, window] int64 token ids, of which a few are read.
        layers: dense, by name.
    """
    ids = windows[:1, :TOKENS].to(next(model.parameters()).device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            plain, order = _consumer_inputs(model, ids, layers, [])
            left = _candidates(layers, shared_inputs(model, ids, layers), order)
            while left:
                moved, _ = _consumer_inputs(model, ids, layers, left)
                broken = next((group for group in left if not _same(moved, plain, group.consumer)), None)
                if broken is None:
                    return _apart(left) if _same(moved, plain, "") else []
                left = [group for group in left if _pattern(group) != _pattern(broken)]
    finally:
        for module, flag in training.items():
            module.training = flag
    return []


def _candidates(layers: Mapping[str, nn.Module], groups: Mapping[str, str], order: list[str]) -> list[ChannelGroup]:
    """Layers as they ran, each with the whole input group of the one before, where the sizes agree."""
    members: dict[str, list[str]] = {}
    for layer, leader in groups.items():
        members.setdefault(leader, []).append(layer)
    found: list[ChannelGroup] = []
    taken: set[str] = set()
    for before, layer in itertools.pairwise(order):
        if before not in groups or layer not in groups or groups[before] == groups[layer]:
            continue
        producers = tuple(members[groups[before]])
        width = dense_weight(layers[layer]).shape[1]
        fits = all(dense_weight(layers[name]).shape[0] == width for name in producers)
        if fits and not taken.intersection(producers):
            found.append(ChannelGroup(producers, layer))
            taken.update(producers)
    return found


def _apart(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Those that share no layer with one before them: of three layers in a row, the first two."""
    found: list[ChannelGroup] = []
    for group in groups:
        if not any(set(group.names).intersection(other.names) for other in found):
            found.append(group)
    return found


def _consumer_inputs(
    model: nn.Module, ids: Tensor, layers: Mapping[str, nn.Module], groups: list[ChannelGroup]
) -> tuple[dict[str, list[Tensor]], list[str]]:
    """What every layer reads, and the model gives (under ""), with the channels of `groups` in another order between
    producers and consumer; and the layers in the order in which they first ran."""
    read: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    handles = []
    for group in groups:
        width = dense_weight(layers[group.consumer]).shape[1]
        shuffled = torch.randperm(width, generator=generator).to(ids.device)
        handles += [layers[name].register_forward_hook(_reordered_output(shuffled)) for name in group.producers]
        handles.append(layers[group.consumer].register_forward_pre_hook(_reordered_input(shuffled.argsort())))
    handles += [module.register_forward_pre_hook(_reader(name, read)) for name, module in layers.items()]
    with _removed_at_the_end(handles):
        output = model(**model_inputs(model, ids))
    order = list(read)
    read[""] = [output[0]]
    return read, order


def _same(found: Mapping[str, list[Tensor]], wanted: Mapping[str, list[Tensor]], name: str) -> bool:
    pairs = zip(found.get(name, []), wanted[name], strict=False)
    return len(found.get(name, [])) == len(wanted[name]) and all(
        a.shape == b.shape and float((a - b).float().norm()) <= EQUAL * float(b.float().norm()) for a, b in pairs
    )


def _pattern(group: ChannelGroup) -> tuple[str, ...]:
    return tuple(re.sub(r"\d+", "N", name) for name in group.names)


def _reordered_output(order: Tensor) -> Callable[..., Tensor]:
    return lambda _module, _args, output: output.index_select(-1, order)


def _reordered_input(order: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    return lambda _module, args: (args[0].index_select(-1, order), *args[1:])


def _reader(name: str, read: dict[str, list[Tensor]]) -> Callable[..., None]:
    return lambda _module, args: read.setdefault(name, []).append(args[0].detach())


@contextmanager
def _removed_at_the_end(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
