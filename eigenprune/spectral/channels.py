# SPDX-License-Identifier: Apache-2.0
"""Whole hidden channels as components: which go first, what that loses, and the weights that make up for it.

A channel (see `channel_groups`) is a row of each producer and a column of the consumer, and all of it goes at once. The
consumer then makes up for it with the channels that stay: with C the second moments of its inputs and F of its output
gradients, keeping the channels K of W costs

    1/2 tr(F W S W^T),  S = C - C[:, K] C[K, K]^-1 C[K, :],  with  W' = W C[:, K] C[K, K]^-1

in the unit of every other loss here. Which channels go is chosen a few at a time, always those that alone would cost
least: the optimal brain surgeon (Hassibi and Stork, 1993) over columns. MoDeGPT (arXiv 2408.09632) chooses by ridge
leverage scores instead, and does not look at gradients.

What is left is factored in its own metric. For the consumer the two losses add up exactly, since a truncation of W' has
no part in what W' has lost; for the producers the rows that stay have the same statistics as before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eigenprune.calibrate import ChannelGroup, Statistics
from eigenprune.calibrate.cache import save_tensors
from eigenprune.layers import dense_weight
from eigenprune.spectral.decompose import Spectrum, spectrum
from eigenprune.spectral.methods import Method
from eigenprune.spectral.metric import Metric, input_gram, output_gram, square_root

# How many channels a plan keeps, as fractions of all: finer where little is removed, which is where most layers end.
KEPT_FRACTIONS = (1.0, 0.97, 0.94, 0.9, 0.86, 0.81, 0.75, 0.69, 0.62, 0.56, 0.5, 0.42, 0.33, 0.25, 0.17)
# Each step passes over the whole inverse, and scores its channels as if each went alone.
REMOVED_AT_ONCE = 16


@dataclass(frozen=True)
class ChannelPlan:
    """One number of channels of a group.

    Attributes:
        kept: [k] int64, ascending.
        loss: what the removal of the others costs, nats per token.
        spectra: of what is left of the producers, in their order, and of the consumer.
    """

    kept: Tensor
    loss: float
    spectra: tuple[Spectrum, ...]


def kept_counts(width: int, multiple: int) -> list[int]:
    """How many of `width` channels the plans keep, falling: all of them, then multiples of `multiple`."""
    counts = {max(multiple, round(width * part / multiple) * multiple) for part in KEPT_FRACTIONS[1:]}
    return [width, *sorted((count for count in counts if count < width), reverse=True)]


def remove_channels(
    weight: Tensor, inputs: Tensor, outputs: Tensor, counts: Sequence[int]
) -> list[tuple[Tensor, float]]:
    """The channels of a consumer that stay, and the loss, for each of `counts`, which fall.

    Args:
        weight: [m, n] float64.
        inputs: C [n, n], positive definite. outputs: F [m, m].
        counts: of channels to keep, at most n.
    """
    kept = torch.arange(weight.shape[1], device=weight.device)
    inverse, left, loss = torch.linalg.inv(inputs), weight.clone(), 0.0
    found = []
    for count in counts:
        while len(kept) > count:
            alone = (left * (outputs @ left)).sum(0) / inverse.diagonal()  # twice the loss without each channel
            gone = alone.argsort()[: min(REMOVED_AT_ONCE, len(kept) - count)]
            stays = torch.ones(len(kept), dtype=torch.bool, device=weight.device)
            stays[gone] = False
            columns, block = left[:, gone], inverse[gone][:, gone]
            lost = torch.linalg.solve(block, columns.t()).t()
            loss += 0.5 * float((columns * (outputs @ lost)).sum())
            left = (left - lost @ inverse[gone])[:, stays]
            inverse = (inverse - inverse[:, gone] @ torch.linalg.solve(block, inverse[gone]))[stays][:, stays]
            kept = kept[stays]
        found.append((kept.cpu(), loss))
    return found


def reduced_weights(
    group: ChannelGroup, layers: Mapping[str, nn.Module], method: Method, statistics: Statistics, kept: Tensor
) -> dict[str, tuple[Tensor, Metric]]:
    """What is left of the layers of `group` when the channels `kept` stay: weight [m', n'] float64, and its metric."""
    return _Grams(group, layers, method, statistics).reduced(kept)


def channel_plans(
    group: ChannelGroup,
    layers: Mapping[str, nn.Module],
    method: Method,
    statistics: Statistics,
    multiple: int,
    folder: Path | None = None,
) -> list[ChannelPlan]:
    """The plans of `group`, the first with all channels.

    Args:
        group: of the dense `layers`.
        method: with Grams on both sides.
        statistics: of its kinds.
        multiple: of which numbers of channels are multiples.
        folder: named after all that the plans depend on but `multiple`; they are kept there. None keeps nothing.
    """
    width = dense_weight(layers[group.consumer]).shape[1]
    counts = kept_counts(width, multiple)
    name = sha256("\n".join([*group.names, repr(counts)]).encode()).hexdigest()[:16]
    file = None if folder is None else folder / f"channels-{name}.safetensors"
    plans = [] if file is None else _read(file, counts, len(group.names))
    if plans:
        return plans
    grams = _Grams(group, layers, method, statistics)
    weight = dense_weight(layers[group.consumer]).detach().double()
    for kept, loss in remove_channels(weight, grams.inputs, grams.outputs[group.consumer], counts):
        reduced = grams.reduced(kept)
        plans.append(ChannelPlan(kept, loss, tuple(spectrum(*reduced[layer]) for layer in group.names)))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(_tensors(plans), file)
    return plans


class _Grams:
    """The shrunk second moments that the layers of one group need, float64."""

    def __init__(
        self, group: ChannelGroup, layers: Mapping[str, nn.Module], method: Method, statistics: Statistics
    ) -> None:
        device = dense_weight(layers[group.consumer]).device
        self.group = group
        self.weights = {name: dense_weight(layers[name]).detach().double() for name in group.names}
        self.inputs = input_gram(method, statistics, group.consumer, device)
        self.outputs = {name: output_gram(method, statistics, name, device) for name in group.names}
        # Producers read one input. No removal changes it, nor the output side of the consumer.
        self.shared = square_root(input_gram(method, statistics, group.producers[0], device))
        self.after = square_root(self.outputs[group.consumer])

    def reduced(self, kept: Tensor) -> dict[str, tuple[Tensor, Metric]]:
        kept = kept.to(self.inputs.device)
        found = {
            name: (self.weights[name][kept], Metric(square_root(self.outputs[name][kept][:, kept]), self.shared))
            for name in self.group.producers
        }
        inside = square_root(self.inputs[kept][:, kept])
        weight = self.weights[self.group.consumer]
        if len(kept) < weight.shape[1]:
            weight = inside.gram_solve((weight @ self.inputs[:, kept]).t()).t()
        found[self.group.consumer] = (weight, Metric(self.after, inside))
        return found


def _tensors(plans: Sequence[ChannelPlan]) -> dict[str, Tensor]:
    tensors = {"losses": torch.tensor([plan.loss for plan in plans], dtype=torch.float64)}
    for i, plan in enumerate(plans):
        tensors[f"kept.{i}"] = plan.kept
        tensors |= {f"energies.{i}.{j}": found.energies for j, found in enumerate(plan.spectra)}
    return tensors


def _read(file: Path, counts: Sequence[int], layers: int) -> list[ChannelPlan]:
    """The plans in `file`; none where it is missing, damaged, or of other counts."""
    try:
        tensors = load_file(file)
        plans = [
            ChannelPlan(
                tensors[f"kept.{i}"],
                float(tensors["losses"][i]),
                tuple(Spectrum(tensors[f"energies.{i}.{j}"]) for j in range(layers)),
            )
            for i in range(len(counts))
        ]
    except (FileNotFoundError, SafetensorError, KeyError, IndexError):
        return []
    return plans if [len(plan.kept) for plan in plans] == list(counts) else []
