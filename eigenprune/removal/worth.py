# SPDX-License-Identifier: Apache-2.0
"""The worth of every component of a model for a task, by each of the rules; the lowest goes first."""

from collections.abc import Mapping

import torch
from torch import Tensor

from eigenprune.calibrate import PassageGradients
from eigenprune.errors import ConfigError
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.spectral import slice_parts, stack_rows


def gradient_worth(frozen: FrozenPieces, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """<E_i, gradient> of every component, {layer: [slices, rank] float64}; NaN where a slice has fewer components.

    With `PassageGradients.frozen`, the first-order change of the loss if component i is frozen at the mean input:
    `sigma_i u_i^T (xbar G_b^T - G)^T v_i` in the orientation of arXiv 2404.03147. Also right for components that are
    frozen already: minus it is what putting them back changes.
    """
    found = {}
    for name, gradient in gradients.items():
        view, pieces = frozen.views[name], frozen.pieces(name)
        parts = slice_parts(frozen.base_weight(name).double(), view)
        slopes = slice_parts(gradient.double(), view)
        rows = [own.products(part, slope) for own, part, slope in zip(pieces, parts, slopes, strict=True)]
        found[name] = padded(frozen, name, rows)
    return found


def padded(frozen: FrozenPieces, name: str, rows: list[Tensor]) -> Tensor:
    """[slices, rank] on the CPU of one value for each component, NaN where a slice has fewer."""
    return stack_rows(frozen.views[name], lambda i: rows[i], torch.tensor(torch.nan)).cpu()


def sigmas(frozen: FrozenPieces, name: str) -> Tensor:
    """[slices, rank] float64 singular values, NaN where a slice has fewer."""
    return padded(frozen, name, [own.sigmas for own in frozen.pieces(name)])


def task_worth(rule: str, frozen: FrozenPieces, gradients: PassageGradients, seed: int) -> dict[str, Tensor]:
    """The worth of every component of the layers in `gradients` by a rule, {layer: [slices, rank] float64}.

    Args:
        rule: of `spectral.WORTHS`, all but `compat`. `exact` and `paper` are nats an example; `paper` needs gradients
            with partners. `smallest-sigma` is the singular value itself, `random` a draw by `seed`, `laser` the loss
            that zeroing the component would cost by its gradient.

    Raises:
        ConfigError: an unknown rule.
    """
    layers = list(gradients.weight)
    if rule == "exact":
        return gradient_worth(frozen, {name: gradients.frozen(name) for name in layers})
    if rule == "paper":
        return gradient_worth(frozen, {name: gradients.swapped(name) for name in layers})
    if rule == "laser":
        return gradient_worth(frozen, {name: -gradients.weight[name].double() for name in layers})
    if rule == "smallest-sigma":
        return {name: sigmas(frozen, name) for name in layers}
    if rule == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.rand(sigma.shape, generator=generator, dtype=torch.float64) + 0 * sigma
            for name, sigma in ((name, sigmas(frozen, name)) for name in layers)
        }
    raise ConfigError(f"worth {rule!r} is unknown here; there are: exact, paper, random, smallest-sigma, laser")


def eligible(frozen: FrozenPieces, layers: list[str], kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """[slices, rank] bool for every layer: of the wanted kinds, and told apart from its neighbours on any machine."""
    found = {}
    for name in layers:
        view = frozen.views[name]
        rows = [
            own.separable() if part.kind in kinds else torch.zeros_like(own.separable())
            for own, part in zip(frozen.pieces(name), view.slices, strict=True)
        ]
        found[name] = stack_rows(view, lambda i, rows=rows: rows[i], torch.tensor(False)).cpu()  # type: ignore[misc]
    return found


def component_count(frozen: FrozenPieces, layers: list[str], kinds: tuple[str, ...]) -> int:
    """How many components the slices of these kinds have."""
    return sum(
        rank
        for name in layers
        for part, rank in zip(frozen.views[name].slices, frozen.views[name].ranks, strict=True)
        if part.kind in kinds
    )
