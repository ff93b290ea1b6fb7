# SPDX-License-Identifier: Apache-2.0
"""Figures for a card: from result files of `eigenprune eval --json` only, and only where they belong to the model."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenprune.errors import CheckpointError
from eigenprune.hub.facts import CheckpointFacts
from eigenprune.hub.limits import read_json
from eigenprune.hub.names import HUB_ID

TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Measured:
    """Perplexity on one set of texts.

    Attributes:
        texts: names of the text files.
        window: tokens in a window.
        tokens: predicted tokens.
        token_hash: SHA-256 of their ids.
        pruned: perplexity of this checkpoint.
        dense: that of its base on the same tokens, if measured.
        dataset: (id of the data set on the Hub, id of the task in it), if the texts are one.
    """

    texts: tuple[str, ...]
    window: int
    tokens: int
    token_hash: str
    pruned: float
    dense: float | None = None
    dataset: tuple[str, str] | None = None


def read_measured(files: Iterable[Path], facts: CheckpointFacts) -> list[Measured]:
    """The result files, those of the dense model joined to those of the pruned one by the hash of their tokens.

    Raises:
        CheckpointError: a file is no result, or of another model, or of the dense model on other tokens.
    """
    pruned: dict[str, dict[str, Any]] = {}
    dense: dict[str, tuple[str, float]] = {}
    elsewhere: dict[str, float] = {}
    for file in files:
        result = read_result(file)
        if "perplexity" not in result:
            continue
        other = _other_domain(result)
        if belongs_to(result, facts, file) == "pruned":
            pruned[result["token_hash"]] = result
            if other is not None:
                pruned.setdefault(other["token_hash"], other)
        else:
            dense[result["token_hash"]] = (file.name, result["perplexity"])
            if other is not None:  # no mistake if it was measured with another version of Python, so of its manual
                elsewhere[other["token_hash"]] = other["perplexity"]
    for token_hash, (name, _) in dense.items():
        if token_hash not in pruned:
            raise CheckpointError(f"{name} is of the dense model, and no result is of this one on the same tokens")
    return [
        Measured(
            texts=tuple(result["texts"]),
            window=result["window"],
            tokens=result["tokens"],
            token_hash=token_hash,
            pruned=result["perplexity"],
            dense=dense.get(token_hash, ("", elsewhere.get(token_hash)))[1],
            dataset=_dataset(result),
        )
        for token_hash, result in sorted(pruned.items(), key=lambda item: (_is_other(item[1]), item[0]))
    ]


def _other_domain(result: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a result that is of another domain than its texts, in the form of a result."""
    other = result.get("other_domain")
    return None if other is None else {**other, "texts": [other["text"]], "window": result["window"]}


def _is_other(result: dict[str, Any]) -> bool:
    return "text" in result


def belongs_to(result: dict[str, Any], facts: CheckpointFacts, file: Path) -> str:
    """Whether a result is of the checkpoint (`pruned`) or of its base (`dense`).

    Raises:
        CheckpointError: it is of another model.
    """
    if result["weights"] == facts.weights_hash:
        return "pruned"
    if result["factored_layers"] == 0 and result["parameters"] == facts.parameters[0]:
        return "dense"
    raise CheckpointError(
        f"{file.name} was measured on another model than this checkpoint and its base: "
        "run eigenprune eval on this folder again"
    )


def check_dataset(dataset: object, task: object) -> None:
    """Check the id of a data set on the Hub, and of a task in it.

    Raises:
        CheckpointError: one of them cannot be such an id.
    """
    if not isinstance(dataset, str) or not HUB_ID.fullmatch(dataset):
        raise CheckpointError(f"{dataset!r:.120} is no data set on the Hub: owner/name, as in Salesforce/wikitext")
    if not isinstance(task, str) or not TASK.fullmatch(task):
        raise CheckpointError(f"{task!r:.120} is no task of {dataset}: its page on the Hub says which there are")


def _dataset(result: dict[str, Any]) -> tuple[str, str] | None:
    if result.get("dataset") is None:
        return None
    check_dataset(result["dataset"], result.get("task_id"))
    return result["dataset"], result["task_id"]


def read_result(file: Path) -> dict[str, Any]:
    """A result file with perplexity, tasks or both; the fields of perplexity and of the model are checked.

    Raises:
        CheckpointError: it is none.
    """
    result = read_json(file)
    kinds: dict[str, Any] = {"parameters": int, "factored_layers": int, "weights": (str, type(None))}
    of_text = "perplexity" in result or "tasks" not in result
    if of_text:
        kinds |= {"perplexity": (float, int), "window": int, "tokens": int, "token_hash": str, "texts": list}
    bad = [key for key, kind in kinds.items() if not isinstance(result.get(key), kind)]
    other = result.get("other_domain")
    if of_text and other is not None and not (isinstance(other, dict) and isinstance(other.get("text"), str)):
        bad = [*bad, "other_domain"]
    if of_text and not bad:
        figures = [result, *([] if other is None else [other])]
        kinds = {"perplexity": (float, int), "tokens": int, "token_hash": str}
        bad = [key for key, kind in kinds.items() if not all(isinstance(part.get(key), kind) for part in figures)]
        if not bad and not all(math.isfinite(part["perplexity"]) and part["perplexity"] >= 1 for part in figures):
            bad = ["perplexity"]
    if bad or not all(isinstance(text, str) for text in result.get("texts", [])):
        raise CheckpointError(
            f"{file.name} is no result of this version's eigenprune eval --json ({', '.join(bad) or 'texts'})"
        )
    return result
