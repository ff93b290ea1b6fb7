# SPDX-License-Identifier: Apache-2.0
"""From a model and a task's name to a better model and a report: test, remove, test again."""

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate.answers import answer_losses, right_answers
from eigenprune.evaluate.intervals import compare_answers
from eigenprune.evaluate.tasks import HELD_OUT, SEED, Task
from eigenprune.evaluate.token_example import TokenExample
from eigenprune.removal.remove import remove_
from eigenprune.removal.task_report import TaskReport
from eigenprune.spectral import layer_views


@dataclass(frozen=True)
class TaskSplits:
    """The three splits of a task in token ids; the test is looked at before and after, and never in between."""

    train: list[TokenExample]
    held_out: list[TokenExample]
    test: list[TokenExample]


def task_splits(
    task: Task,
    tokenizer: Any,
    *,
    train: int | None = 256,
    held_out: int | None = 64,
    test: int | None = None,
    seed: int = SEED,
    held_out_part: float = HELD_OUT,
    bos: bool | None = None,
) -> TaskSplits:
    """The splits of `task`, each with at most so many examples; None takes all.

    Raises:
        ConfigError: a count below 1, or a setting of `Task.rows` out of range.
        CalibrationError: as `Task.examples`.
    """
    limits = {"train": train, "held_out": held_out, "test": test}
    for split, limit in limits.items():
        if limit is not None and limit < 1:
            raise ConfigError(f"{split}={limit}: at least one example is needed")
    found = {
        split: task.examples(tokenizer, split, seed=seed, held_out=held_out_part, limit=limit, bos=bos)
        for split, limit in limits.items()
    }
    return TaskSplits(**found)


def run_task_(
    model: nn.Module,
    task: str,
    examples: TaskSplits,
    retention: list[TokenExample] | Tensor,
    *,
    batch: int = 16,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> TaskReport:
    """Answer the test questions, remove in place what stands in the task's way, and answer them again.

    Args:
        model: a causal language model; changed in place.
        task: its name, for the report.
        examples: see `task_splits`.
        retention: what must not be lost: examples, or [windows, window] int64 token ids of plain text.
        batch: examples in one run.
        settings: plain JSON values to keep in the report.
        **options: of `remove_`.

    Raises:
        ConfigError, CalibrationError, WeightError: as `remove_`, which leaves the model as it was.
    """
    if not examples.test:
        raise CalibrationError(f"task {task} has no test question")
    began = time.perf_counter()
    before, before_loss = _tested(model, examples.test, batch)
    middle = time.perf_counter()
    removal = remove_(model, examples.train, held_out=examples.held_out, retention=retention, batch=batch, **options)
    found = time.perf_counter()
    views = layer_views(model, options.get("view", "head"), options.get("kinds"), options.get("skip", ()))
    after, after_loss = _tested(model, examples.test, batch)
    return TaskReport(
        task=task,
        test=compare_answers(before, after),
        test_loss=(before_loss, after_loss),
        answers=(before, after),
        removal=removal,
        slices={name: tuple((part.kind, part.head) for part in view.slices) for name, view in views.items()},
        settings={"test": len(examples.test)} | (settings or {}),
        seconds={
            "test before": middle - began,
            "removal": found - middle,
            "test after": time.perf_counter() - found,
        },
    )


def _tested(model: nn.Module, test: list[TokenExample], batch: int) -> tuple[tuple[bool, ...], float]:
    """(whether each was answered rightly, mean loss of the right answers)."""
    right = tuple(right_answers(model, test, batch).tolist())
    return right, float(answer_losses(model, test, batch).double().mean())
