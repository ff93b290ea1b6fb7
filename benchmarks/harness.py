# SPDX-License-Identifier: Apache-2.0
"""Zero-shot accuracy of SmolLM2-135M-Instruct, dense and pruned, in five tasks of lm-eval: the first 200 items of each.

lm-eval's own prompts and metrics, run on local data (task files of the shared folder). Averages are over tasks, once
of `acc`, once of `acc_norm` where the task has it (ARC, HellaSwag, OpenBookQA) and `acc` elsewhere. Differences are
paired item by item. COPA has 100 items. Every (model, task) is a row with all answers; rows that are there are not
measured again.

    python benchmarks/harness.py --model keep-0.8=FOLDER                 # dense first, then the pruned folder
    python benchmarks/harness.py --dtype float32 --tasks copa arc_easy   # what the dtype changes
    python benchmarks/harness.py --table                                 # print the rows kept so far
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from get_smollm2 import get_smollm2
from result_rows import RESULTS_FOLDER, command_line, keep_row, kept_rows, shared_or_exit
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenprune.evaluate import paired_difference
from eigenprune.evaluate.harness import load_tasks, run_tasks
from eigenprune.hub import hash_weights

TASKS = ("copa", "winogrande", "openbookqa", "arc_easy", "hellaswag")  # the cheapest first
LIMIT = 200
BATCH = 8
RESULTS = RESULTS_FOLDER / "harness.jsonl"
KEY = ("weights", "task", "limit", "dtype")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
POINT = 100


def measure(model: Any, tokenizer: Any, task: str, tasks: dict[str, Any], limit: int) -> dict[str, Any]:
    """One row."""
    began = time.process_time()
    (score,) = run_tasks(model, tokenizer, {task: tasks[task]}, limit=limit, batch_size=BATCH, progress=False)
    found = score.to_dict()
    found["answers"] = {metric: list(map(int, answers)) for metric, answers in score.answers.items()}
    return found | {"limit": limit, "batch_size": BATCH, "cpu_seconds": time.process_time() - began}


def answers_of(rows: list[dict[str, Any]], metric: str) -> dict[str, list[int]]:
    """{task: answers}, by `acc` where a task does not have `metric`."""
    return {row["task"]: row["answers"].get(metric, row["answers"]["acc"]) for row in rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: accuracies, averages and paired differences to the dense model."""
    lines = [
        "| model | dtype | metric | " + " | ".join(TASKS) + " | average | - dense, points (standard error) |",
        "| --- " * (len(TASKS) + 5) + "|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["model"]), []).append(row)
    for (dtype, model), own in groups.items():
        dense = groups.get((dtype, "dense"), [])
        for metric in ("acc", "acc_norm"):
            found = answers_of(own, metric)
            cells = [f"{POINT * sum(a) / len(a):.1f}" if (a := found.get(task)) else "" for task in TASKS]
            whole = set(found) == set(TASKS)
            mean = sum(sum(a) / len(a) for a in found.values()) / len(found)
            cells.append(f"{POINT * mean:.2f}" if whole else "")
            cells.append(difference(dense, own, metric) if whole and model != "dense" else "")
            lines.append(f"| {model} | {dtype} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(dense: list[dict[str, Any]], own: list[dict[str, Any]], metric: str) -> str:
    """Points by which `own` is above the dense model, with the paired standard error."""
    hashes = {row["task"]: row["items_hash"] for row in dense}
    if hashes != {row["task"]: row["items_hash"] for row in own}:
        return "other items"
    found = paired_difference(answers_of(dense, metric), answers_of(own, metric))
    return f"{POINT * found.difference:+.2f} ({POINT * found.stderr:.2f})"


def named(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER`."""
    name, _, folder = text.partition("=")
    if not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=FOLDER of a model is needed")
    return name, Path(folder)


def main() -> None:
    """Measure the rows that are missing."""
    parser = command_line(__doc__, RESULTS)
    parser.add_argument("--model", action="append", type=named, default=[], help="NAME=FOLDER; repeat for more")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=int, default=LIMIT)
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    options = parser.parse_args()
    rows = kept_rows(options.out)
    if options.table:
        print(table(rows))
        return
    shared = shared_or_exit()
    dense = get_smollm2(options.models)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tasks = load_tasks(options.tasks, task_files=shared / "lm_eval", progress=False)
    done = {tuple(row[key] for key in KEY) for row in rows}
    for name, folder in [("dense", dense), *options.model]:
        weights = hash_weights(folder)
        missing = [task for task in options.tasks if (weights, task, options.limit, options.dtype) not in done]
        if not missing:
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype])
        for task in missing:
            row = {"model": name, "weights": weights, "dtype": options.dtype}
            row |= measure(model, tokenizer, task, tasks, options.limit)
            rows.append(keep_row(options.out, row))
            print(f"{name} {task}: {row['scores']} in {row['seconds']:.0f} s", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
