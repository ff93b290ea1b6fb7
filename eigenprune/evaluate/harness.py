# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), run by its own code on a model that is in memory.

Needs the extra `lm-eval`. Prompts, metrics and versions are lm-eval's; only where the data comes from may be changed,
by task files with local `data_files`, so that nothing is fetched. A saved model needs none of this: lm-eval loads it
itself, `lm_eval --model hf --model_args pretrained=FOLDER`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml
from torch import nn

from eigenprune.calibrate.objective import is_causal
from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate.intervals import CONFIDENCE, wilson_interval
from eigenprune.evaluate.task_scores import TaskScore

GROUP = "eigenprune"  # the tasks of a run, as a group that only this module sees
RESAMPLES = 1000  # for standard errors of metrics that have no formula


def load_tasks(names: Sequence[str], *, task_files: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """lm-eval's tasks by name.

    Args:
        names: of tasks, or of groups of `task_files`.
        task_files: a folder of lm-eval's task files (`*.yaml`). An entry for a task, alone or in a group, goes over
            lm-eval's own definition of that name. Paths in its `data_files` that are not absolute are looked for in the
            working folder, then beside the file, then in the folders above that. Task files are code: lm-eval imports
            the functions that they name.
        progress: show on standard error how data is read.

    Raises:
        ConfigError: lm-eval is missing, a name is unknown, or a task file cannot be read.
        CalibrationError: the data of a task is not there.
    """
    manager = _manager(task_files)
    groups, entries = local_entries(task_files) if task_files is not None else ({}, {})
    wanted = [inner for name in names for inner in groups.get(name, [name])]
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown or not wanted:
        raise ConfigError(f"lm-eval knows no task {', '.join(map(repr, unknown)) or 'at all without a name'}")
    found: dict[str, Any] = {}
    for name in dict.fromkeys(wanted):
        try:
            with _bars(progress):
                found |= manager.load([{"group": GROUP, "task": [entries.get(name, {"task": name})]}])["tasks"]
        except (OSError, ValueError, KeyError) as error:
            raise CalibrationError(
                f"the data of task {name} cannot be loaded ({_first_line(error)}): "
                "name local files of it in a task file, and give its folder as task_files (--task-files)"
            ) from error
    return found


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    shots: int | None = None,
    progress: bool = True,
) -> list[TaskScore]:
    """What `model` scores in `tasks`, in their order.

    Args:
        model: a causal language model of transformers, pruned or not; its dtype and device are used as they are.
        tokenizer: that belongs to it.
        tasks: from `load_tasks`.
        limit: items of each task, from the first on; None: all.
        batch_size: requests in a forward pass. Batches are padded, which changes roundings only.
        shots: solved examples before each item; None: as the task says, 0 where it says nothing.
        progress: show lm-eval's bars on standard error.

    Raises:
        ConfigError: lm-eval is missing, a number is out of range, or the model is no language model.
    """
    if (limit is not None and limit < 1) or batch_size < 1:
        raise ConfigError(f"limit={limit!r} and batch_size={batch_size!r} must be at least 1")
    check_installed()
    if not (is_causal(model) or getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        raise ConfigError(f"{type(model).__name__} writes no text: tasks of lm-eval are for language models")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found: list[TaskScore] = []
    with _bars(progress):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        for name, task in tasks.items():
            began = time.perf_counter()
            results = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=[task],
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=RESAMPLES,
                task_manager=_empty_manager(),
            )
            found.append(_score(name, results, time.perf_counter() - began))
    return found


def check_installed() -> None:
    """Raise a ConfigError that names the extra where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks are run by lm-eval, which is not installed: pip install 'eigenprune[lm-eval]'")


def local_entries(folder: Path) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """What the task files of a folder say: {group: its tasks}, and {task: its entry, with absolute `data_files`}.

    Raises:
        ConfigError: there is no such folder, or no task file in it, or one is no YAML.
        CalibrationError: a data file is missing.
    """
    files = sorted(Path(folder).glob("*.yaml"))
    if not files:
        raise ConfigError(f"{folder}: no folder with task files of lm-eval (*.yaml)")
    groups: dict[str, list[str]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        content = _read_yaml(file)
        listed = content.get("task")
        inner = listed if isinstance(listed, list) else [content] if isinstance(listed, str) else []
        for entry in inner:
            if isinstance(entry, dict) and isinstance(entry.get("task"), str):
                known = {"task": entry["task"]} if entry is content else entry
                entries[entry["task"]] = known | _absolute_data(entry, file)
        if isinstance(content.get("group"), str):
            groups[content["group"]] = [e["task"] if isinstance(e, dict) else str(e) for e in inner]
    return groups, entries


def _bars(shown: bool) -> contextlib.AbstractContextManager[Any]:
    """lm-eval and datasets have no switch of their own for their bars; their errors are raised, not printed."""
    return contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO())


class _TaskFileLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads `!function x.y` as text: lm-eval resolves it, and only the data files matter here."""


_TaskFileLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = _TaskFileLoader(file.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file.name} is no task file of lm-eval: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file.name} is no task file of lm-eval: it holds no mapping")
    return content


def _absolute_data(entry: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """`dataset_kwargs` of an entry with absolute paths; nothing where it has no `data_files`."""
    options = entry.get("dataset_kwargs")
    named = options.get("data_files") if isinstance(options, dict) else None
    if named is None:
        return {}
    if isinstance(named, dict):
        found: Any = {split: _found(names, file) for split, names in named.items()}
    else:
        found = _found(named, file)
    return {"dataset_kwargs": {**(options or {}), "data_files": found}}


def _found(names: Any, file: Path) -> Any:
    if isinstance(names, list):
        return [_found(name, file) for name in names]
    folder = file.resolve().parent
    places = [Path.cwd() / str(names), *(above / str(names) for above in (folder, *folder.parents))]
    for place in places:
        if place.is_file():
            return str(place)
    raise CalibrationError(f"{file.name}: no data file {names} in the working folder, beside the file, or above it")


def _manager(task_files: Path | None) -> Any:
    check_installed()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if task_files is None else str(task_files))


def _empty_manager() -> Any:
    """A manager for tasks that are loaded: indexing lm-eval's own thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _score(name: str, results: Any, seconds: float) -> TaskScore:
    """What lm-eval's results say about one task."""
    samples = results["samples"][name]
    scores, errors, intervals, answers = {}, {}, {}, {}
    for key, value in results["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = results["results"][name].get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric}/{kind}"
        of_kind = [sample for sample in samples if sample.get("filter", "none") == kind]
        each = [sample.get(metric) for sample in of_kind]
        scores[label] = float(value)
        if isinstance(error, int | float):
            errors[label] = float(error)
        if all(isinstance(answer, int | float) for answer in each):
            answers[label] = [float(answer) for answer in each]
        interval = _interval(scores[label], errors.get(label), answers.get(label))
        if interval is not None:
            intervals[label] = interval
    return TaskScore(
        task=name,
        version=str(results.get("versions", {}).get(name, "")),
        shots=int(results.get("n-shot", {}).get(name, 0)),
        items=len({sample["doc_id"] for sample in samples}),
        items_hash=_items_hash(samples),
        scores=scores,
        stderr=errors,
        intervals=intervals,
        answers=answers,
        seconds=seconds,
    )


def _interval(score: float, error: float | None, answers: list[float] | None) -> tuple[float, float] | None:
    """95 %: Wilson's for a share of right answers, else the normal one."""
    if answers and set(answers) <= {0.0, 1.0}:
        return wilson_interval(round(sum(answers)), len(answers))
    if error is None:
        return None
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return score - half, score + half


def _items_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over lm-eval's hashes of document, prompt and target, in order: the same items, asked the same way."""
    digest = hashlib.sha256()
    for sample in samples:
        for part in ("doc_hash", "prompt_hash", "target_hash"):
            digest.update(str(sample.get(part)).encode())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
