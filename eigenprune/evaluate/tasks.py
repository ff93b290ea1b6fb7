# SPDX-License-Identifier: Apache-2.0
"""The tasks that a model can be measured on and pruned for: one table, and any file of prompts and answers."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eigenprune.calibrate.texts import json_lines
from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate import task_rows
from eigenprune.evaluate.task_rows import TaskRow
from eigenprune.evaluate.task_tokens import token_example
from eigenprune.evaluate.token_example import TokenExample

SPLITS = ("train", "held_out", "test")
SEED = 42  # of the division, as in the released code of the paper
HELD_OUT = 0.2  # of what is no test: 320 products are 256 to learn from and 64 to stop by
ENDINGS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Task:
    """A set of questions with answers, divided into `train`, `held_out` and `test`.

    Attributes:
        name: as in `find_task`.
        about: one line for people.
        generate: makes all rows; None where they come from a file.
        read: makes a row of one line of that file.
        data: the file of JSON lines (`.gz` or not), or a folder with `train` and `validation` (or `test`) files.
        test_fraction: of one file, or of the rows made: how many are kept for the test.
    """

    name: str
    about: str
    generate: Callable[[], list[TaskRow]] | None = None
    read: Callable[[Mapping[str, Any]], TaskRow] | None = None
    data: Path | None = None
    test_fraction: float = 0.2

    def rows(self, split: str, *, seed: int = SEED, held_out: float = HELD_OUT) -> list[TaskRow]:
        """The questions of a split as text, in an order drawn by `seed`, so that the first N are a fair sample.

        One file, or the rows made, are divided by `seed`: first the test, then the held-out part of the rest. A folder
        with a file of its own for the test keeps that whole.

        Args:
            split: `train`, `held_out` or `test`.
            seed: of the division.
            held_out: the part of what is no test, in [0, 1), that is kept to decide when to stop.

        Raises:
            ConfigError: no such split, or `held_out` out of range.
            CalibrationError: the rows have no source, a file is missing, empty or damaged (the line is named), or so
                small that the split has no row.
        """
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} is unknown; there are: {', '.join(SPLITS)}")
        if not 0 <= held_out < 1:
            raise ConfigError(f"held_out={held_out!r} must be in [0, 1): a part of the rows that are no test")
        rest, test = self._divided(seed)
        kept = round(held_out * len(rest))
        found = {"train": rest[kept:], "held_out": rest[:kept], "test": test}[split]
        if not found:
            raise CalibrationError(f"task {self.name}: no row is left for {split} of {len(rest) + len(test)} in all")
        return found

    def examples(
        self,
        tokenizer: Any,
        split: str,
        *,
        seed: int = SEED,
        held_out: float = HELD_OUT,
        limit: int | None = None,
        bos: bool | None = None,
    ) -> list[TokenExample]:
        """The questions of a split in token ids, see `rows` and `token_example`; with `limit` only the first ones.

        Raises:
            ConfigError, CalibrationError: as these two.
        """
        rows = self.rows(split, seed=seed, held_out=held_out)[:limit]
        return [token_example(tokenizer, row, bos=bos) for row in rows]

    def _divided(self, seed: int) -> tuple[list[TaskRow], list[TaskRow]]:
        """(rows to learn from and stop by, rows of the test)."""
        if self.generate is not None:
            return self._cut(_drawn(self.generate(), seed))
        files = _files(self.name, self.data)
        parts = [_drawn(self._read(path), seed) for path in files]
        return (parts[0], parts[1]) if len(parts) == 2 else self._cut(parts[0])

    def _cut(self, rows: list[TaskRow]) -> tuple[list[TaskRow], list[TaskRow]]:
        test = round(self.test_fraction * len(rows))
        return rows[test:], rows[:test]

    def _read(self, path: Path) -> list[TaskRow]:
        rows = []
        for number, value in json_lines(path):
            try:
                if not isinstance(value, Mapping):
                    raise CalibrationError("no JSON object")
                rows.append((self.read or task_rows.plain_row)(value))
            except CalibrationError as error:
                raise CalibrationError(f"{path}, line {number}: {error}") from error
        if not rows:
            raise CalibrationError(f"{path} holds no row: task {self.name} needs one question a line")
        return rows


TASKS = {
    task.name: task
    for task in (
        Task("int-sum", "sums of two numbers below 100 (made, 10,000)", generate=task_rows.sum_rows),
        Task("int-mult", "products of two numbers below 20 (made, 400)", generate=task_rows.product_rows),
        Task("cb", "CommitmentBank of SuperGLUE (needs data)", read=task_rows.cb_row, test_fraction=0.5),
        Task("copa", "COPA of SuperGLUE (needs data)", read=task_rows.copa_row, test_fraction=0.5),
        Task("rte", "RTE of SuperGLUE (needs data)", read=task_rows.rte_row, test_fraction=0.5),
        Task("basic-arithmetic", "basic_arithmetic of Ai2 (needs data)", read=task_rows.arithmetic_row),
    )
}


def find_task(name: str, data: str | Path | None = None) -> Task:
    """The task of that name.

    Args:
        name: a row of `TASKS`, or the path of a `.jsonl` (or `.jsonl.gz`) file whose rows have `prompt`, `answer` and,
            where there are alternatives, `choices`.
        data: the rows of a task that is not made: a file of JSON lines in the form of its data set on the Hub, or a
            folder with `train.jsonl` and `validation.jsonl`.

    Raises:
        ConfigError: there is no such task, or data is given for one that is made.
        CalibrationError: the task needs data.
    """
    if name in TASKS:
        task = TASKS[name]
        if task.generate is not None:
            if data is not None:
                raise ConfigError(f"task {name} is made, and takes no data")
            return task
        if data is None:
            raise CalibrationError(
                f"task {name} needs its rows: pass data (--data), a .jsonl file as its data set on the Hub has it, "
                "or a folder with train.jsonl and validation.jsonl"
            )
        return replace(task, data=Path(data))
    if name.endswith(ENDINGS):
        if data is not None:
            raise ConfigError(f"{name} is a file of rows itself, and takes no data")
        path = Path(name)
        return Task(path.name.partition(".")[0], "your own rows", read=task_rows.plain_row, data=path)
    raise ConfigError(
        f"task {name!r:.120} is unknown; there are: {', '.join(TASKS)}, and any .jsonl file with 'prompt' and 'answer'"
    )


def _drawn(rows: list[TaskRow], seed: int) -> list[TaskRow]:
    return random.Random(seed).sample(rows, len(rows))


def _files(name: str, data: Path | None) -> list[Path]:
    """One file to be divided, or two: to learn from, and for the test."""
    if data is None:
        raise CalibrationError(f"task {name} has no rows: give a file or a folder as its data")
    if not data.is_dir():
        return [data]
    found = {stem: _first_file(data, stem) for stem in ("train", "validation", "test")}
    # Before `test`, since the test sets of SuperGLUE have no labels.
    last = found["validation"] or found["test"]
    files = [path for path in (found["train"], last) if path is not None]
    if not files:
        raise CalibrationError(f"{data} holds no train.jsonl, validation.jsonl or test.jsonl (or .jsonl.gz) for {name}")
    return files


def _first_file(folder: Path, stem: str) -> Path | None:
    return next((path for ending in ENDINGS if (path := folder / f"{stem}{ending}").is_file()), None)
