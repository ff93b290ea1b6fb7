# SPDX-License-Identifier: Apache-2.0
"""The search of eigenpruning: the estimate proposes, real forward passes decide.

Rounds of: worth of every component at the model as it stands, by one backward pass over the task and one over what must
be retained; the best moves (freeze a component, or put one back) in groups; each group kept only if the real losses
gain and the guard holds, a failing group split in halves down to single components. Arguments for each part: sections
1.d and 1.f of the project's notes on arXiv 2404.03147, and the pilot there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate import calibration_mode
from eigenprune.removal.examples import ExampleSet, Judges
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.removal.one_shot import State, entry_of
from eigenprune.removal.removal import RemovalRound
from eigenprune.removal.worth import gradient_worth

GROUPS = 16  # the first groups hold a sixteenth of all that may be removed
POOL = 2  # moves looked at in a round, as a multiple of all that may be removed
LEAST_GAIN = 1e-3  # of the objective, in nats an example, for another round to be worth its price


@dataclass(frozen=True)
class SearchSettings:
    """See `remove_`."""

    limit: int
    bound: float
    weight: float
    checks: int
    pooled: bool
    autocast: bool
    progress: bool
    keep_on_interrupt: bool = False


@dataclass(frozen=True)
class Losses:
    """One forward check: the objective of each set, and the loss that the guard watches."""

    search: float
    held_out: float
    retention: float
    guarded: float


@dataclass(frozen=True, order=True)
class Move:
    """Freeze a component, or put it back: what it is estimated to change, and which."""

    change: float
    layer: str
    slice: int
    piece: int


class Search:
    """The search over one model, made while that is as it came.

    Args:
        frozen: the model.
        means: mean input of every layer of the base, [in].
        allowed: {layer: [slices, rank] bool}, the components that may go.
    """

    def __init__(
        self,
        frozen: FrozenPieces,
        judges: Judges,
        means: dict[str, Tensor],
        allowed: dict[str, Tensor],
        settings: SearchSettings,
    ) -> None:
        self.frozen, self.judges, self.means, self.allowed, self.settings = frozen, judges, means, allowed, settings
        self.checks = 0
        self.now = self._losses()
        self.base = self.now
        self.interrupted = False
        self._kept = frozen.state()  # what the last check that gained has left
        self._bar = tqdm(
            total=settings.checks, desc="checking", unit="check", disable=not settings.progress, leave=False
        )

    def run(self) -> Iterator[tuple[RemovalRound, State]]:
        """The model after each round, the first being the one before any."""
        with self._bar:
            yield self.entry(), self.frozen.state()
            while self.checks < self.settings.checks:
                before, known = self.objective(self.now), self.checks
                try:
                    self._round()
                except KeyboardInterrupt:
                    if not self.settings.keep_on_interrupt:
                        raise
                    self.interrupted = True
                    self.frozen.undo_all_()  # a layer may be half way: from the base, then
                    self.frozen.restore_(self._kept)
                if self.checks == known or self.objective(self.now) >= before:
                    return
                yield self.entry(), self.frozen.state()
                if self.interrupted or before - self.objective(self.now) < LEAST_GAIN:
                    return

    def objective(self, losses: Losses) -> float:
        """What a round lowers: that of the task, and that of what is retained at its weight."""
        return self._task(losses) + self.settings.weight * losses.retention

    def removed(self) -> int:
        """How many components are frozen."""
        return sum(int(mask.sum()) for mask in self.frozen.masks.values())

    def entry(self) -> RemovalRound:
        """The model as it stands, for the report."""
        return entry_of(self.frozen, self.judges, self.checks)

    def _task(self, losses: Losses) -> float:
        if not self.settings.pooled:
            return losses.held_out
        counts = len(self.judges.search), len(self.judges.held_out)
        return (losses.search * counts[0] + losses.held_out * counts[1]) / sum(counts)

    def _losses(self) -> Losses:
        model = self.frozen.model
        with calibration_mode(model, backward=False, autocast=self.settings.autocast):
            return self._measured(model)

    def _measured(self, model: nn.Module) -> Losses:
        search = self.judges.search.measured(model).objective if self.settings.pooled else 0.0
        retention = self.judges.retention.measured(model)
        held_out = self.judges.held_out.measured(model)
        return Losses(search, held_out.objective, retention.objective, retention.token_loss)

    def _round(self) -> None:
        moves = self._moves()[: int(POOL * self.settings.limit)]
        size = max(1, self.settings.limit // GROUPS)
        for first in range(0, len(moves), size):
            self._try(moves[first : first + size])

    def _moves(self) -> list[Move]:
        """All moves that should lower the objective, the best first."""
        worths = objective_slopes(self.frozen, self.judges, self.means, self.settings.weight, self.settings.autocast)
        moves = []
        for name, worth in worths.items():
            gone = self.frozen.mask(name)
            change = torch.where(gone, -1.0, 1.0) * worth
            change = change.masked_fill(~(self.allowed[name] | gone), torch.inf).nan_to_num(torch.inf)
            moves += [Move(float(change[i, j]), name, i, j) for i, j in (change < 0).nonzero().tolist()]
        return sorted(moves)

    def _try(self, moves: list[Move]) -> None:
        """Make the moves if the real losses gain; else try each half."""
        if not moves or self.checks >= self.settings.checks:
            return
        before = self._make(moves)
        if before is None:
            if len(moves) > 1:
                self._halves(moves)
            return
        self.checks += 1
        self._bar.update()
        found = self._losses()
        if self._gains(found):
            self.now, self._kept = found, self.frozen.state()
            return
        for name, (mask, delta) in before.items():
            self.frozen.set_(name, mask, delta)
        if len(moves) > 1:
            self._halves(moves)

    def _halves(self, moves: list[Move]) -> None:
        self._try(moves[: len(moves) // 2])
        self._try(moves[len(moves) // 2 :])

    def _gains(self, found: Losses) -> bool:
        """Whether the guard holds, and the objective falls: on all examples, and on the held-out ones alone."""
        weight, now = self.settings.weight, self.now
        if found.guarded > self.base.guarded + self.settings.bound:
            return False
        held_out = found.held_out - now.held_out + weight * (found.retention - now.retention)
        return held_out < 0 and self.objective(found) < self.objective(now)

    def _make(self, moves: list[Move]) -> State | None:
        """Toggle the components of `moves`; what the touched layers were before, or None where too many would go."""
        masks: dict[str, Tensor] = {}
        for move in moves:
            mask = masks.setdefault(move.layer, self.frozen.mask(move.layer))
            mask[move.slice, move.piece] = ~mask[move.slice, move.piece]
        change = sum(int(mask.sum()) - int(self.frozen.mask(name).sum()) for name, mask in masks.items())
        if self.removed() + change > self.settings.limit:
            return None
        before = {name: self._layer_state(name) for name in masks}
        for name, mask in masks.items():
            self.frozen.set_(name, mask, self.frozen.delta(name, mask, self.means[name]))
        return before

    def _layer_state(self, name: str) -> tuple[Tensor, Tensor]:
        mask = self.frozen.mask(name)
        return mask, self.frozen.deltas.get(name, torch.zeros(self.frozen.views[name].shape[0]))


def objective_slopes(
    frozen: FrozenPieces, judges: Judges, means: dict[str, Tensor], weight: float, autocast: bool = False
) -> dict[str, Tensor]:
    """First-order change of the objective if each component is frozen, at the model as it stands.

    {layer: [slices, rank] float64}, NaN where a slice has fewer components.
    """
    task = _slopes(frozen, judges.search, means, autocast)
    harm = _slopes(frozen, judges.retention, means, autocast)
    return {name: worth + weight * harm[name] for name, worth in task.items()}


def _slopes(frozen: FrozenPieces, examples: ExampleSet, means: dict[str, Tensor], autocast: bool) -> dict[str, Tensor]:
    layers = {name: frozen.model.get_submodule(name) for name in means}
    found = examples.gradients(frozen.model, layers, autocast)
    frozen_at = {name: examples.weight * found.frozen_at(name, means[name]) for name in found.weight}
    return gradient_worth(frozen, frozen_at)


def best_round(rounds: list[RemovalRound], bound: float, key: Callable[[RemovalRound], float]) -> int:
    """The first of the rounds with the lowest `key` among those that may be kept; round 0 always may.

    The guard must let a round pass, and it must answer at least as many held-out examples rightly as round 0: a mean
    can fall while answers that were right are given up for others that are hopeless.
    """
    limit, least = rounds[0].retention_loss + bound, rounds[0].held_out_accuracy
    passing = [
        i
        for i, entry in enumerate(rounds)
        if i == 0 or (entry.retention_loss <= limit and entry.held_out_accuracy >= least)
    ]
    return min(passing, key=lambda i: (key(rounds[i]), i))
