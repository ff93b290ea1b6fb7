# SPDX-License-Identifier: Apache-2.0
"""What a removal for a task looks like, as plain data: the numbers behind every picture of it."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

DEPTH = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Component:
    """One singular component: how large it is, what it is worth to the task, and whether it is removed.

    `worth` is in nats an example (negative: the task is better without it); `sigma` in the unit of the weight.
    """

    layer: str
    kind: str
    head: int
    sigma: float
    worth: float
    removed: bool

    @property
    def depth(self) -> int:
        """The first number in the layer's name; 0 where there is none."""
        found = DEPTH.search(self.layer)
        return int(found.group(1)) if found else 0


@dataclass(frozen=True)
class PathPoint:
    """The model after one round of removal.

    Attributes:
        removed: share of all components that are gone, in [0, 1].
        accuracy: on the held-out questions, in [0, 1].
        loss: of the right answers to them, nats an example.
        retention: loss on what must not be lost, nats a token.
    """

    removed: float
    accuracy: float
    loss: float
    retention: float


@dataclass(frozen=True)
class Shares:
    """Right answers before and after, with intervals (low, high), all in [0, 1]."""

    task: str
    total: int
    before: float
    after: float
    before_interval: tuple[float, float]
    after_interval: tuple[float, float]
    p_value: float


@dataclass(frozen=True)
class TaskViews:
    """Everything that the pictures show.

    Attributes:
        components: all of them, of all layers that could change.
        path: round by round, the first being the model as it came.
        chosen: which of `path` the model is left at.
        retention_bound: the highest allowed retention loss; None without a guard.
        shares: of each task that was tested.
    """

    components: tuple[Component, ...]
    path: tuple[PathPoint, ...]
    chosen: int
    retention_bound: float | None
    shares: tuple[Shares, ...] = ()

    def matrices(self) -> dict[str, list[Component]]:
        """The components of each layer, in model order."""
        found: dict[str, list[Component]] = {}
        for component in self.components:
            found.setdefault(component.layer, []).append(component)
        return found

    def by_layer_and_kind(self) -> list[dict[str, Any]]:
        """For every depth and kind: how many components there are, how many are removed, the sum of all negative worth
        and that of all positive, in nats an example."""
        cells: dict[tuple[int, str], dict[str, Any]] = {}
        for component in self.components:
            empty = {"components": 0, "removed": 0, "negative": 0.0, "positive": 0.0}
            cell = cells.setdefault((component.depth, component.kind), empty)
            cell["components"] += 1
            cell["removed"] += component.removed
            if math.isfinite(component.worth):
                cell["negative" if component.worth < 0 else "positive"] += component.worth
        return [{"depth": depth, "kind": kind} | cells[depth, kind] for depth, kind in cells]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the path, the tests and the sums; the single components only where one is removed."""
        return {
            "path": [asdict(point) for point in self.path],
            "chosen": self.chosen,
            "retention_bound": self.retention_bound,
            "shares": [asdict(share) for share in self.shares],
            "by_layer_and_kind": self.by_layer_and_kind(),
            "removed": [asdict(component) for component in self.components if component.removed],
        }


def most_changed(views: TaskViews, count: int) -> Sequence[str]:
    """The layers that lost most components, in model order; where fewer lost any, also those of lowest worth."""
    matrices = views.matrices()

    def order(name: str) -> tuple[int, float]:
        worths = [one.worth for one in matrices[name] if math.isfinite(one.worth)]
        return -sum(one.removed for one in matrices[name]), min(worths, default=0.0)

    chosen = set(sorted(matrices, key=order)[:count])
    return [name for name in matrices if name in chosen]
