# SPDX-License-Identifier: Apache-2.0
"""`TaskReport`: a task before and after, what was removed for it, and the views of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eigenprune.evaluate.intervals import Comparison
from eigenprune.removal.removal import RemovalReport
from eigenprune.report.task_views import Component, PathPoint, Shares, TaskViews


@dataclass(frozen=True)
class TaskReport:
    """What `run_task_` did.

    Attributes:
        task: its name.
        test: answers to the test questions before and after.
        test_loss: of the right answers to them, nats an example, (before, after).
        answers: whether each test question was answered rightly, (before, after), in the order of the split.
        removal: the search, and what was removed.
        slices: layer name to (kind, head) of each of its slices.
        settings: of the examples: counts, seed, and what the retention text was.
        seconds: {stage: seconds}.
    """

    task: str
    test: Comparison
    test_loss: tuple[float, float]
    answers: tuple[tuple[bool, ...], tuple[bool, ...]]
    removal: RemovalReport
    slices: dict[str, tuple[tuple[str, int], ...]]
    settings: dict[str, Any]
    seconds: dict[str, float]

    @property
    def removed(self) -> float:
        """Share of all components that were removed."""
        return self.removal.removal.count / self.removal.components

    def views(self) -> TaskViews:
        """The numbers of the pictures."""
        shares = Shares(
            task=self.task,
            total=self.test.total,
            before=self.test.before / self.test.total,
            after=self.test.after / self.test.total,
            before_interval=self.test.before_interval,
            after_interval=self.test.after_interval,
            p_value=self.test.p_value,
        )
        return removal_views(self.removal, self.slices, (shares,))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the single components that stay are left out, their sums are there."""
        before, after = ("".join("01"[one] for one in side) for side in self.answers)
        return {
            "task": self.task,
            "test": self.test.to_dict(),
            "test_loss": list(self.test_loss),
            "answers": {"before": before, "after": after},
            "removed": self.removed,
            "removal": self.removal.to_dict(),
            "views": self.views().to_dict(),
            "settings": dict(self.settings),
            "seconds": dict(self.seconds),
        }


def removal_views(
    report: RemovalReport, slices: Mapping[str, Sequence[tuple[str, int]]], shares: tuple[Shares, ...] = ()
) -> TaskViews:
    """The numbers of the pictures of a removal; `slices` holds (kind, head) of every slice of every layer."""
    path = tuple(
        PathPoint(
            removed=entry.removed / report.components,
            accuracy=entry.held_out_accuracy,
            loss=entry.held_out_loss,
            retention=entry.retention_loss,
        )
        for entry in report.rounds
    )
    bound = report.settings.get("retention_bound")
    limit = None if bound is None else report.before.retention_loss + bound
    return TaskViews(tuple(_components(report, slices)), path, report.chosen, limit, shares)


def _components(report: RemovalReport, slices: Mapping[str, Sequence[tuple[str, int]]]) -> list[Component]:
    found = []
    for layer, worths in report.worth.items():
        sigmas, mask = report.sigma[layer], report.removal.masks.get(layer)
        for index, (kind, head) in enumerate(slices[layer]):
            for piece in range(worths.shape[1]):
                sigma = float(sigmas[index, piece])
                if sigma == sigma:  # NaN fills up slices that have fewer components than others
                    removed = mask is not None and bool(mask[index, piece])
                    found.append(Component(layer, kind, head, sigma, float(worths[index, piece]), removed))
    return found
