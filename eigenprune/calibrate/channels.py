# SPDX-License-Identifier: Apache-2.0
"""Hidden channels: where layers write what one later layer reads, entry by entry, so that whole entries can go.

The MLP of a transformer is such a place: entry j of what `down_proj` reads depends on entry j of what `gate_proj` and
`up_proj` write, and on no other. No model is known here by name; the model itself is asked.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.calibrate.inputs import shared_inputs
from eigenprune.calibrate.objective import model_inputs
from eigenprune.layers import dense_weight

TOKENS = 32  # that the model is asked on
EQUAL = 1e-3  # relative: far above rounding, and far below what the absence of half of the channels does where they mix


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

    A candidate is a layer with those layers of one input, run just before it, that write as much as it reads. It is
    tried by taking away one half of the channels, drawn at random, from the outputs of the producers: the consumer must
    then read the other half, as it was; and if it is given all of it, the model must say what it said. Candidates of
    the same names but for numbers are tried, and pass, together.

    Args:
        model: a transformers model; it ends as it was.
        windows: [windows, window] int64 token ids, of which a few are read.
        layers: dense, by name.

    Raises:
        CalibrationError: the model cannot run on token ids alone.
    """
    ids = windows[:1, :TOKENS].to(next(model.parameters()).device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            inputs = shared_inputs(model, ids, layers)
            plain = _run(model, ids, layers)
            by_pattern: dict[tuple[str, ...], list[ChannelGroup]] = {}
            for group in _candidates(layers, inputs, plain.order):
                by_pattern.setdefault(_pattern(group), []).append(group)
            found = [groups for groups in by_pattern.values() if _passes(model, ids, layers, groups, plain)]
    finally:
        for module, flag in training.items():
            module.training = flag
    passed = [group for groups in found for group in groups]
    return _apart(sorted(passed, key=lambda group: plain.order.index(group.consumer)))


@dataclass(frozen=True)
class _Seen:
    """Of one run: what each layer read at each of its calls, and what the model gave."""

    read: dict[str, list[Tensor]]
    output: Tensor

    @property
    def order(self) -> list[str]:
        """The layers, as they first ran."""
        return list(self.read)


def _run(model: nn.Module, ids: Tensor, layers: Mapping[str, nn.Module], handles: Sequence[Any] = ()) -> _Seen:
    """Run with hooks that are there already, and remove them."""
    read: dict[str, list[Tensor]] = {}
    watching = [module.register_forward_pre_hook(_reader(name, read)) for name, module in layers.items()]
    try:
        output = model(**model_inputs(model, ids))
    finally:
        for handle in (*handles, *watching):
            handle.remove()
    return _Seen(read, output[0])


def _passes(
    model: nn.Module, ids: Tensor, layers: Mapping[str, nn.Module], groups: Sequence[ChannelGroup], plain: _Seen
) -> bool:
    generator = torch.Generator().manual_seed(0)
    handles, verdicts = [], list[bool]()
    for group in groups:
        width = dense_weight(layers[group.consumer]).shape[1]
        kept = torch.randperm(width, generator=generator)[: width // 2].to(ids.device)
        handles += [layers[name].register_forward_hook(_taker(kept)) for name in group.producers]
        before = iter(plain.read[group.consumer])
        handles.append(layers[group.consumer].register_forward_pre_hook(_judge(kept, before, verdicts)))
    try:
        moved = _run(model, ids, layers, handles)
    except (RuntimeError, ValueError, IndexError):  # something between them counts on the number of channels
        return False
    return bool(verdicts) and all(verdicts) and _equal(moved.output, plain.output)


def _taker(kept: Tensor) -> Callable[..., Tensor]:
    """Leaves the channels `kept` of the output of a layer."""
    return lambda _module, _args, output: output.index_select(-1, kept)


def _judge(kept: Tensor, before: Iterator[Tensor], verdicts: list[bool]) -> Callable[..., tuple[Any, ...]]:
    """Says whether the channels `kept` of what was read `before` are read, which it then hands on as a whole."""

    def judge(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        old = next(before, None)
        if old is None:
            verdicts.append(False)
            return args
        wanted = old.index_select(-1, kept)
        verdicts.append(args[0].shape == wanted.shape and _equal(args[0], wanted))
        return (old, *args[1:])

    return judge


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).float().norm()) <= EQUAL * float(wanted.float().norm())


def _candidates(layers: Mapping[str, nn.Module], groups: Mapping[str, str], order: list[str]) -> list[ChannelGroup]:
    """Layers as they ran, each with those that read what the one before reads, and write as much as it reads."""
    members: dict[str, list[str]] = {}
    for layer, leader in groups.items():
        members.setdefault(leader, []).append(layer)
    found: list[ChannelGroup] = []
    taken: set[str] = set()
    for before, layer in itertools.pairwise(order):
        if before not in groups or layer not in groups or groups[before] == groups[layer]:
            continue
        width = dense_weight(layers[layer]).shape[1]
        producers = tuple(name for name in members[groups[before]] if dense_weight(layers[name]).shape[0] == width)
        if before in producers and not taken.intersection(producers):
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


def _pattern(group: ChannelGroup) -> tuple[str, ...]:
    return tuple(re.sub(r"\d+", "N", name) for name in group.names)


def _reader(name: str, read: dict[str, list[Tensor]]) -> Callable[..., None]:
    return lambda _module, args: read.setdefault(name, []).append(args[0].detach())
