# SPDX-License-Identifier: Apache-2.0
"""What the released code of arXiv 2404.03147 does, for comparison only; written anew from its description.

It differs from the paper's formula, and from `exact`, in these: a component's score is the *largest* effect over all
examples and positions; the effect is that of swapping in the input of the example before in its batch; the input is
that of the block, before its norm (for `down`: the values before the activation); the bias sums the last batch's mean
input over positions; and with several kinds each kind's quota counts into the list of all. Two things are left out:
norms are not folded into the weights first (TransformerLens does that; with norms of gain 1 it is the same), and the
bias of `o`, there one for each position, is their mean here, since a layer has one bias.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eigenprune.calibrate import Passage, PassageBatch, batch_losses, collate, partner_rows, passage_batches
from eigenprune.calibrate.collect import calibration_mode
from eigenprune.errors import CalibrationError
from eigenprune.layers import dense_weight
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.spectral import slice_parts, stack_rows

BATCH = 5


@dataclass(frozen=True)
class CompatScores:
    """By layer name.

    Attributes:
        worth: [slices, rank] float64, the largest effect; NaN where a slice has fewer components.
        inputs: [in] float64, what the bias of the removed components is taken at.
    """

    worth: dict[str, Tensor]
    inputs: dict[str, Tensor]


def compat_scores(frozen: FrozenPieces, passages: list[Passage], batch: int = BATCH) -> CompatScores:
    """Scores of every component by the released rule; the loss is that of each answer's first token, batch means.

    Raises:
        CalibrationError: a batch of one (every example would be its own partner, and all scores 0), or a layer whose
            raw input cannot be told.
    """
    first = [Passage(passage.ids[: passage.start + 1], passage.start) for passage in passages]
    groups = list(passage_batches(first, batch))
    if min((len(rows) for rows in groups), default=0) < 2:
        raise CalibrationError(
            f"{len(first)} examples in batches of {batch} leave a batch of one, in which every example is its own "
            "partner and all worth is 0: use another batch size or number of examples"
        )
    watch = _RawInputs(frozen)
    with calibration_mode(frozen.model, backward=True, checkpointing=False, autocast=False), watch.watching():
        for rows in groups:
            watch.start(collate([first[row] for row in rows]))
            batch_losses(frozen.model, watch.batch)[0].mean().backward()
            watch.add()
    worth = {
        name: stack_rows(frozen.views[name], lambda i, rows=rows: rows[i], torch.tensor(torch.nan)).cpu()  # type: ignore[misc]
        for name, rows in watch.scores.items()
    }
    return CompatScores(worth, watch.inputs)


def pooled_masks(
    frozen: FrozenPieces, worth: dict[str, Tensor], kinds: tuple[str, ...], fraction: float
) -> dict[str, Tensor]:
    """The components that the released code removes: of each kind those among the lowest floor(fraction * N) of *all*.

    N counts the kind's own components. Ties go by (layer, slice, piece).
    """
    entries = []
    for number, (name, values) in enumerate(worth.items()):
        for i, (part, rank) in enumerate(zip(frozen.views[name].slices, frozen.views[name].ranks, strict=True)):
            if part.kind in kinds:
                entries += [(float(values[i, j]), number, i, j, part.kind) for j in range(rank)]
    entries.sort()
    names, masks = list(worth), dict[str, Tensor]()
    for kind in kinds:
        count = int(fraction * sum(entry[4] == kind for entry in entries))
        for _, number, i, j, own in entries[:count]:
            if own == kind:
                masks.setdefault(names[number], frozen.empty_mask(names[number]))[i, j] = True
    return masks


class _RawInputs:
    """Hooks that keep one batch's raw inputs and output gradients, and the running maximum over batches."""

    def __init__(self, frozen: FrozenPieces) -> None:
        self.frozen = frozen
        self.scores: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, Tensor] = {}
        self.batch: PassageBatch

    def start(self, batch: PassageBatch) -> None:
        self.batch = batch
        self.outputs: dict[str, Tensor] = {}
        self.read: dict[str, Tensor] = {}
        self.before_norm: dict[int, tuple[Tensor, Tensor]] = {}
        self.gradients: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        model = self.frozen.model
        norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
        handles = [module.register_forward_hook(self._norm) for module in norms]
        handles += [model.get_submodule(name).register_forward_hook(self._layer(name)) for name in self.frozen.views]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _norm(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.before_norm[output.data_ptr()] = (args[0].detach(), output)  # held, so that no address is used twice

    def _layer(self, name: str) -> Callable[..., None]:
        def watch(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0]
            self.outputs[name] = output.detach()
            self.read[name] = self.before_norm[x.data_ptr()][0] if x.data_ptr() in self.before_norm else x.detach()
            output.register_hook(lambda gradient: self.gradients.__setitem__(name, gradient.detach()))

        return watch

    def raw_input(self, name: str) -> Tensor:
        """[n, width, in]: what the released code takes for the input of a layer."""
        if self.frozen.views[name].kind != "down":
            return self.read[name]
        parent = name.rpartition(".")[0]
        inner = [other for other in self.outputs if other.rpartition(".")[0] == parent and other != name]
        for kind in ("gate", "up"):
            for other in inner:
                if self.frozen.views[other].kind == kind:
                    return self.outputs[other]
        raise CalibrationError(f"{name}: what stands before its activation is not known; score it with 'exact'")

    @torch.no_grad()
    def add(self) -> None:
        """Raise the maxima by this batch, and take its mean input for the bias."""
        for name, view in self.frozen.views.items():
            raw = self.raw_input(name).double()
            rows = raw.flatten(0, -2)
            change = partner_rows(rows, self.batch.mask) - rows
            gradient = self.gradients[name].double().flatten(0, -2)
            weight = dense_weight(self.frozen.model.get_submodule(name)).detach().double()
            found = []
            for index, (pieces, part) in enumerate(
                zip(self.frozen.pieces(name), slice_parts(weight, view), strict=True)
            ):
                place = slice(view.slices[index].start, view.slices[index].stop)
                x = change[:, place] if view.axis == 1 else change
                g = gradient[:, place] if view.axis == 0 else gradient
                if pieces.on_rows:
                    effect = (x @ part.T @ pieces.vectors) * (g @ pieces.vectors)
                else:
                    effect = (x @ pieces.vectors) * (g @ part @ pieces.vectors)
                found.append(effect.amax(0))
            known = self.scores.get(name)
            self.scores[name] = (
                found if known is None else [torch.maximum(a, b) for a, b in zip(known, found, strict=True)]
            )
            mean = raw.mean(0)
            self.inputs[name] = mean.mean(0) if view.kind == "o" else mean.sum(0)
