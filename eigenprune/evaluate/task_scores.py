# SPDX-License-Identifier: Apache-2.0
"""Scores in tasks, and how much they differ between two models that were asked the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from eigenprune.errors import CalibrationError


@dataclass(frozen=True)
class TaskScore:
    """One model in one task; two of them compare only if `items_hash` is the same.

    Attributes:
        task: its name.
        version: of its definition.
        shots: solved examples before each item.
        items: how many were asked.
        items_hash: SHA-256, in hex, over the items, as they were asked, in order.
        scores: {metric: mean over items, or what the metric says}.
        stderr: {metric: standard error of the score}.
        intervals: {metric: (low, high)}, 95 %.
        answers: {metric: value of each item, in order}, where a metric has one for each.
        seconds: wall time.
    """

    task: str
    version: str
    shots: int
    items: int
    items_hash: str
    scores: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    answers: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """A difference of averages over tasks.

    Attributes:
        before, after: averages over tasks of the mean over their items, each task counting alike.
        difference: `after - before`.
        stderr: its standard error over the items, each paired with itself.
        unpaired_stderr: what the error would be if each model had been asked items of its own.
    """

    before: float
    after: float
    difference: float
    stderr: float
    unpaired_stderr: float


def paired_difference(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> Difference:
    """How far the average over tasks moved, and how sure that is.

    Items are a sample of each task's, and tasks are fixed: the variance of the average of T tasks is
    `sum_t var(a_ti - b_ti) / n_t / T^2`, with the sample variance over the n_t items (Miller, arXiv 2411.00640, eq. 7).

    Args:
        before, after: {task: value of each item}, the same tasks and items in the same order.

    Raises:
        CalibrationError: tasks or numbers of items differ, or a task has fewer than two items.
    """
    if before.keys() != after.keys() or not before:
        raise CalibrationError(f"tasks before {sorted(before)} and after {sorted(after)}: the same ones are needed")
    count = len(before)
    means_before, means_after, paired, unpaired = 0.0, 0.0, 0.0, 0.0
    for task, first in before.items():
        second = after[task]
        if len(first) != len(second) or len(first) < 2:
            raise CalibrationError(
                f"{task}: {len(first)} and {len(second)} items; at least two, and the same, are needed"
            )
        means_before += math.fsum(first) / len(first) / count
        means_after += math.fsum(second) / len(second) / count
        change = [b - a for a, b in zip(first, second, strict=True)]
        paired += _variance(change) / len(first) / count**2
        unpaired += (_variance(first) + _variance(second)) / len(first) / count**2
    return Difference(means_before, means_after, means_after - means_before, math.sqrt(paired), math.sqrt(unpaired))


def _variance(values: Sequence[float]) -> float:
    """The sample variance."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
