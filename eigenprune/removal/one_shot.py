# SPDX-License-Identifier: Apache-2.0
"""Removal in one shot by a given ranking: the published rules and the baselines, each judged like the search."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from eigenprune.removal.examples import Judges
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.removal.removal import RemovalRound

State = dict[str, tuple[Tensor, Tensor]]
FRACTIONS = (0.125, 0.25, 0.5, 1.0)  # of what may be removed
LASER_MATRICES = 8  # how many matrices are cut for real
LASER_CUTS = (0.5, 0.9)  # of a matrix's rank


def one_shot(
    frozen: FrozenPieces, judges: Judges, means: dict[str, Tensor] | None, attempts: Iterable[dict[str, Tensor]]
) -> Iterator[tuple[RemovalRound, State]]:
    """The model as it came, and after each attempt; every attempt starts from the base.

    Args:
        means: the input that removed components are frozen at, [in] by layer; None adds no bias.
        attempts: masks by layer.
    """
    checks = 0
    yield entry_of(frozen, judges, checks), frozen.state()
    for masks in attempts:
        frozen.undo_all_()
        for name, mask in masks.items():
            zero = torch.zeros(frozen.views[name].shape[0])
            frozen.set_(name, mask, zero if means is None else frozen.delta(name, mask, means[name]))
        checks += 1
        yield entry_of(frozen, judges, checks), frozen.state()


def entry_of(frozen: FrozenPieces, judges: Judges, checks: int) -> RemovalRound:
    """The model as it stands, for the report."""
    model = frozen.model
    held_out = judges.held_out.measured(model)
    return RemovalRound(
        removed=sum(int(mask.sum()) for mask in frozen.masks.values()),
        search_loss=judges.search.measured(model).loss,
        held_out_loss=held_out.loss,
        held_out_objective=held_out.objective,
        held_out_accuracy=judges.held_out.accuracy(model) or 0.0,
        retention_loss=judges.retention.measured(model).token_loss,
        retention_accuracy=judges.retention.accuracy(model),
        checks=checks,
    )


def ranking(allowed: dict[str, Tensor], worth: dict[str, Tensor]) -> list[tuple[float, int, int, int]]:
    """(worth, number of the layer, slice, piece) of every allowed component, lowest first; ties in this order."""
    found = []
    for number, (name, values) in enumerate(worth.items()):
        places = (allowed[name] & ~values.isnan()).nonzero().tolist()
        found += [(float(values[i, j]), number, i, j) for i, j in places]
    return sorted(found)


def lowest(allowed: dict[str, Tensor], worth: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Masks of the lowest FRACTIONS of `limit` components."""
    order, names = ranking(allowed, worth), list(worth)
    for count in sorted({int(fraction * min(limit, len(order))) for fraction in FRACTIONS} - {0}):
        masks: dict[str, Tensor] = {}
        for _, number, i, j in order[:count]:
            mask = masks.setdefault(names[number], torch.zeros_like(allowed[names[number]]))
            mask[i, j] = True
        yield masks


def laser_cuts(frozen: FrozenPieces, worth: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """The small singular values of one matrix at a time, of those matrices whose cut the gradient likes best."""
    cuts = []
    for name, values in worth.items():
        for cut in LASER_CUTS:
            mask = frozen.empty_mask(name)
            for index, rank in enumerate(frozen.views[name].ranks):
                mask[index, rank - int(cut * rank) : rank] = True
            if 0 < int(mask.sum()) <= limit:
                cuts.append((float(values[mask].nansum()), name, mask))
    for _, name, mask in sorted(cuts, key=lambda cut: cut[:1])[:LASER_MATRICES]:
        yield {name: mask}
