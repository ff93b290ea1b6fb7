# SPDX-License-Identifier: Apache-2.0
"""Scores in tasks for a card: from result files of `eigenprune eval --tasks --json`, the dense model's beside them."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from eigenprune.errors import CheckpointError
from eigenprune.hub.facts import CheckpointFacts
from eigenprune.hub.measured import belongs_to, read_result

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,:/_-]{0,95}", re.ASCII)
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class MeasuredTask:
    """One metric of one task.

    Attributes:
        task, version, metric: as lm-eval names them.
        shots: solved examples before each item.
        items: how many were asked.
        items_hash: SHA-256 of the items as they were asked.
        pruned: score of this checkpoint.
        interval: 95 % around it, if known.
        dense: score of its base on the same items, if measured.
    """

    task: str
    version: str
    metric: str
    shots: int
    items: int
    items_hash: str
    pruned: float
    interval: tuple[float, float] | None = None
    dense: float | None = None


def read_measured_tasks(files: Iterable[Path], facts: CheckpointFacts) -> list[MeasuredTask]:
    """The scores in the result files, those of the dense model joined to those of the pruned one by items and metric.

    Raises:
        CheckpointError: a file is no result, or of another model, or of the dense model on other items.
    """
    pruned: dict[tuple[str, str, str], MeasuredTask] = {}
    dense: dict[tuple[str, str, str], tuple[str, float]] = {}
    for file in files:
        result = read_result(file)
        if "tasks" not in result:
            continue
        whose = belongs_to(result, facts, file)
        for found in _scores(result["tasks"], file):
            key = found.task, found.items_hash, found.metric
            if whose == "pruned":
                pruned[key] = found
            else:
                dense[key] = file.name, found.pruned
    for key, (name, _) in dense.items():
        if key not in pruned:
            raise CheckpointError(
                f"{name}: {key[0]} was asked of the dense model, and no result is of this one on the same items"
            )
    return [
        MeasuredTask(**(vars(found) | {"dense": dense.get(key, ("", None))[1]}))
        for key, found in sorted(pruned.items())
    ]


def _scores(tasks: Any, file: Path) -> list[MeasuredTask]:
    found: list[MeasuredTask] = []
    for entry in tasks if isinstance(tasks, list) else [None]:
        if not _is_entry(entry):
            raise CheckpointError(f"{file.name} is no result of this version's eigenprune eval --json (tasks)")
        for metric, value in entry["scores"].items():
            interval = entry["intervals"].get(metric)
            found.append(
                MeasuredTask(
                    task=entry["task"],
                    version=entry["version"],
                    metric=metric,
                    shots=entry["shots"],
                    items=entry["items"],
                    items_hash=entry["items_hash"],
                    pruned=float(value),
                    interval=None if interval is None else (float(interval[0]), float(interval[1])),
                )
            )
    return found


def _is_entry(entry: Any) -> TypeGuard[dict[str, Any]]:
    """Whether every value is what it should be: these go into a card that others read."""
    if not isinstance(entry, dict):
        return False
    named = [entry.get("task"), *(entry["scores"] if isinstance(entry.get("scores"), dict) else [None])]
    return (
        all(isinstance(name, str) and NAME.fullmatch(name) for name in named)
        and isinstance(entry.get("version"), str)
        and all(type(entry.get(key)) is int and entry[key] >= 0 for key in ("shots", "items"))
        and isinstance(entry.get("items_hash"), str)
        and bool(HASH.fullmatch(entry["items_hash"]))
        and all(_is_number(value) for value in entry["scores"].values())
        and isinstance(entry.get("intervals"), dict)
        and all(_is_interval(value) for value in entry["intervals"].values())
    )


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
