# SPDX-License-Identifier: Apache-2.0
"""Gradients of a task's loss at every layer, summed while passages stream by: all that signed worth is made of.

With x the input of a layer and g the gradient of a passage's loss at its output, three sums over tokens are kept and no
token is: `sum g x^T`, `sum g` and `sum x`. The filling of a batch counts in none of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.collect import calibration_mode
from eigenprune.calibrate.passages import (
    Passage,
    PassageBatch,
    batch_logits,
    collate,
    logit_losses,
    passage_batches,
)
from eigenprune.errors import CalibrationError, WeightError
from eigenprune.memory import release_unused

Measure = Callable[[nn.Module, PassageBatch], Tensor]
"""One value for each example of a batch, with a gradient."""


@dataclass(frozen=True)
class PassageGradients:
    """Means over passages, by layer name; what the gradients are of is the loss of a passage, if not said otherwise.

    Attributes:
        loss: mean over passages.
        weight: mean of sum_t g x^T, [out, in] float32: the gradient of the loss for the weight.
        output: mean of sum_t g, [out] float32: the gradient for the bias.
        partner: mean of sum_t g x'^T with x' the input at the same place of another passage; empty unless asked for.
        input_mean: mean of x over all tokens, [in] float32.
    """

    loss: float
    weight: dict[str, Tensor] = field(repr=False)
    output: dict[str, Tensor] = field(repr=False)
    partner: dict[str, Tensor] = field(repr=False)
    input_mean: dict[str, Tensor] = field(repr=False)

    def frozen(self, layer: str) -> Tensor:
        """[out, in] float64: <E, this> is the first-order change of the loss if E x is frozen at E xbar, for any E."""
        return self.frozen_at(layer, self.input_mean[layer])

    def frozen_at(self, layer: str, mean: Tensor) -> Tensor:
        """As `frozen`, where E x is frozen at E mean."""
        return torch.outer(self.output[layer].double(), mean.double()) - self.weight[layer].double()

    def swapped(self, layer: str) -> Tensor:
        """As `frozen`, where E x becomes E x' of another passage: the formula of arXiv 2404.03147."""
        return self.partner[layer].double() - self.weight[layer].double()


def passage_gradients(
    model: nn.Module,
    passages: Sequence[Passage],
    layers: Mapping[str, nn.Module],
    *,
    batch: int = 16,
    partners: bool = False,
    autocast: bool = False,
    progress: bool = False,
) -> PassageGradients:
    """`batch_gradients` of the loss of `passages`, summed over the predicted tokens of each.

    Args:
        batch: passages in one run; neighbours in length stand together.
        partners: whether to sum `partner` too. x' is the input of the passage before in its batch (the last, for the
            first), at the same place or, past its end, at its last token.

    Raises:
        CalibrationError: no passages, no causal language model, or partners with fewer than two passages in a batch.
        WeightError: a loss is NaN or infinite.
    """
    if not passages:
        raise CalibrationError("no passages: a gradient needs at least one example")
    groups = list(passage_batches(passages, batch))
    if partners and len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    if partners and min(len(rows) for rows in groups) < 2:
        raise CalibrationError("in a batch of one, every example is its own partner and all worth is 0: use 2 or more")
    parts = ((collate([passages[row] for row in rows]), _passage_losses) for rows in groups)
    return batch_gradients(
        model, parts, layers, count=len(passages), partners=partners, autocast=autocast, progress=progress
    )


def batch_gradients(
    model: nn.Module,
    parts: Iterable[tuple[PassageBatch, Measure]],
    layers: Mapping[str, nn.Module],
    *,
    count: int,
    partners: bool = False,
    autocast: bool = False,
    progress: bool = False,
) -> PassageGradients:
    """Run forward and backward over batches and sum; weights, gradient flags and mode are as before afterwards.

    Layers that do not see every token once (routed experts, say) are left out of the result.

    Memory: the weights of `layers` once more in float32 (twice with `partners`), and the activations of one batch,
    whatever the number of batches.

    Args:
        parts: batches, each with its measure; the gradients are those of the sum of `measure(model, batch)`.
        count: what all sums are divided by.
        partners: as for `passage_gradients`.
        autocast: whether bfloat16 may be used where this machine multiplies it in hardware.

    Raises:
        CalibrationError: no causal language model.
        WeightError: a measure is NaN or infinite.
    """
    sums = _Sums(layers, partners)
    total = 0.0
    bar = tqdm(parts, desc="gradients", unit="batch", disable=not progress, leave=False)
    with calibration_mode(model, backward=True, checkpointing=False, autocast=autocast), sums.watching():
        for batch, measure in bar:
            sums.batch = batch
            loss = measure(model, batch).sum()
            if not bool(torch.isfinite(loss)):
                raise WeightError("the loss of an example is NaN or infinite: check the weights of the model")
            loss.backward()
            total += float(loss.detach())
            sums.tokens += int(batch.mask.sum())
    release_unused()
    return sums.means(total, count)


def _passage_losses(model: nn.Module, batch: PassageBatch) -> Tensor:
    return logit_losses(*batch_logits(model, batch))


class _Sums:
    """The sums of one run, and the hooks that add to them."""

    def __init__(self, layers: Mapping[str, nn.Module], partners: bool) -> None:
        self.layers, self.partners = layers, partners
        self.batch: PassageBatch | None = None
        self.tokens = 0
        self.odd: set[str] = set()
        self.weight: dict[str, Tensor] = {}
        self.partner: dict[str, Tensor] = {}
        self.output: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}

    def watching(self) -> "_Hooks":
        return _Hooks([module.register_forward_hook(self._hook(name)) for name, module in self.layers.items()])

    def _hook(self, name: str) -> Callable[..., None]:
        def watch(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            batch, x = self.batch, args[0].detach()
            if batch is None or x.shape[:-1].numel() != batch.mask.numel():
                self.odd.add(name)
                return
            if not output.requires_grad:
                return
            mask = batch.mask.to(x.device).view(-1, 1)
            with torch.no_grad():
                rows = x.flatten(0, -2).float()
                _add(self.inputs, name, (rows * mask).sum(0))
            output.register_hook(lambda gradient: self._backward(name, rows, gradient))

        return watch

    @torch.no_grad()
    def _backward(self, name: str, rows: Tensor, gradient: Tensor) -> None:
        with torch.autocast(gradient.device.type, enabled=False):
            flat = gradient.detach().flatten(0, -2).float()
            _add_product(self.weight, name, flat, rows)
            _add(self.output, name, flat.sum(0))
            if self.partners and self.batch is not None:
                _add_product(self.partner, name, flat, partner_rows(rows, self.batch.mask))

    def means(self, total: float, count: int) -> PassageGradients:
        """All sums divided by their counts, in place."""
        kept = [name for name in self.layers if name in self.weight and name not in self.odd]
        return PassageGradients(
            loss=total / count,
            weight={name: self.weight[name].div_(count) for name in kept},
            output={name: self.output[name].div_(count) for name in kept},
            partner={name: self.partner[name].div_(count) for name in kept if name in self.partner},
            input_mean={name: self.inputs[name].div_(self.tokens) for name in kept},
        )


class _Hooks:
    """Hooks that are gone when the context ends."""

    def __init__(self, handles: list[torch.utils.hooks.RemovableHandle]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_error: object) -> None:
        for handle in self.handles:
            handle.remove()


def partner_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """For every token of a batch, the row of the passage before, at its place or its last: [n * width, features].

    Args:
        rows: [n * width, features].
        mask: [n, width], ones on the left.
    """
    count, width = mask.shape
    last = mask.sum(1).roll(1).sub(1).unsqueeze(1)
    place = torch.minimum(torch.arange(width).expand(count, width), last).to(rows.device)
    passage = torch.arange(count, device=rows.device).roll(1).unsqueeze(1)
    return rows[(passage * width + place).flatten()]


def _add_product(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    """Add `left.T @ right`, without a matrix beside the sum."""
    if name in sums:
        sums[name].addmm_(left.T, right)
    else:
        sums[name] = left.T @ right


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value.clone()
