# SPDX-License-Identifier: Apache-2.0
"""Hidden channels in a run of `prune_`: found, chosen together with the ranks of their layers, and taken out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.calibrate import ChannelGroup, channel_groups
from eigenprune.layers import dense_like, dense_weight, is_conv1d
from eigenprune.memory import release_unused
from eigenprune.prune.measure import Measured
from eigenprune.prune.price import layer_price
from eigenprune.prune.run import Run
from eigenprune.spectral import (
    Allocation,
    Cost,
    Decomposed,
    JointOptions,
    Options,
    channel_plans,
    components,
    joint_options,
    layer_of_factors,
    reduced_weights,
)


@dataclass(frozen=True)
class Grouped:
    """The channel groups of a run, each of which the allocation sees as one matrix, named after its consumer."""

    joint: dict[str, JointOptions] = field(default_factory=dict)
    groups: dict[str, ChannelGroup] = field(default_factory=dict)

    @property
    def layers(self) -> set[str]:
        """Of all groups."""
        return {name for group in self.groups.values() for name in group.names}

    @property
    def options(self) -> dict[str, Options]:
        """By consumer."""
        return {name: joint.options for name, joint in self.joint.items()}

    def expanded(self, found: Allocation, layers: Mapping[str, nn.Module]) -> Allocation:
        """`found` with a choice for each layer, in the order of `layers`, and the channels that stay."""
        choices = {name: choice for name, choice in found.choices.items() if name not in self.groups}
        kept: dict[ChannelGroup, Tensor] = {}
        for name, group in self.groups.items():
            own, channels = self.joint[name].choices(found.choices[name].rank)
            choices |= dict(zip(group.names, own, strict=True))
            if channels is not None:
                kept[group] = channels
        return replace(found, choices={name: choices[name] for name in layers}, kept=kept)


def grouped_options(run: Run, layers: Mapping[str, nn.Module], decomposed: Decomposed, measured: Measured) -> Grouped:
    """The groups among `layers`, with what each can have; none where the method removes no channels."""
    statistics = measured.statistics
    if not run.method.channels or statistics is None:
        return Grouped()
    with run.clock("channels"):
        groups = {group.consumer: group for group in channel_groups(run.model, _ids(run.model, measured), layers)}
        joint = {}
        for name in run.bar(groups, "channels"):
            members = {layer: dense_weight(layers[layer]) for layer in groups[name].names}
            plans = channel_plans(
                groups[name], layers, run.method, statistics, run.config.rank_multiple, decomposed.folder
            )
            joint[name] = joint_options(
                plans,
                {layer: (weight.shape[0], weight.shape[1]) for layer, weight in members.items()},
                run.config.layout,
                run.config.rank_multiple,
                cost_of=partial(_price, run, members),
                min_keep=run.config.min_keep,
            )
            release_unused()
    return Grouped(joint, groups)


def reduced_layers(
    group: ChannelGroup, dense: Mapping[str, nn.Module], kept: Tensor, found: Allocation, run: Run, measured: Measured
) -> Iterator[tuple[str, nn.Module]]:
    """The layers of `group` with the channels `kept` alone, factored where `found` gives them a rank."""
    if measured.statistics is None:
        return
    reduced = reduced_weights(group, dense, run.method, measured.statistics, kept)
    for name, (weight, metric) in reduced.items():
        old = dense[name]
        bias: Tensor | None = old.bias  # type: ignore[assignment]
        if bias is not None and name != group.consumer:
            bias = bias.detach()[kept.to(bias.device)]
        new = dense_like(weight.to(dense_weight(old).dtype), bias, conv1d=is_conv1d(old))
        new.requires_grad_(dense_weight(old).requires_grad)
        rank = found.choices[name].rank
        if rank:
            left, right = components(weight, metric, rank).truncated(rank)
            yield name, layer_of_factors(new, left, right, run.config.layout)
        else:
            yield name, new


def _price(run: Run, weights: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Cost:
    return layer_price(run, shape, weights[name])


def _ids(model: nn.Module, measured: Measured) -> Tensor:
    """Token ids [windows, window]: any do, so the smallest ones where no text was read."""
    if measured.windows is not None:
        return measured.windows
    config: Any = getattr(model, "config", None)
    return torch.arange(32).unsqueeze(0) % (32 if config is None else config.get_text_config().vocab_size)
