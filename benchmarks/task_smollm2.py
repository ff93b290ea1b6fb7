# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct on five tasks, before and after removing what hurts each, whatever the outcome.

python benchmarks/task_smollm2.py --stage before               # accuracy of the untouched model, some minutes
python benchmarks/task_smollm2.py --stage after --tasks int-mult
python benchmarks/task_smollm2.py --table                      # the rows kept so far, nothing measured

INT-SUM and INT-MULT are made; basic_arithmetic, CB and COPA come from the shared folder (EIGENPRUNE_SHARED). Rows that
are there already are not measured again. Ctrl-C ends a search, and its row says so. CB and COPA have no training file
here: half of their validation set is the test, the other half is what is learned from and stopped by.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, shared_folder
from get_smollm2 import PROVENANCE, get_smollm2
from result_rows import keep_row, kept_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenprune import perplexity
from eigenprune.calibrate import SEPARATOR, cut_windows, read_texts, token_ids
from eigenprune.evaluate import answer_losses, right_answers, spaced_windows
from eigenprune.evaluate.intervals import wilson_interval
from eigenprune.evaluate.tasks import find_task
from eigenprune.evaluate.token_example import TokenExample
from eigenprune.hub import base_weights, save_adapter
from eigenprune.removal.task_run import TaskSplits, run_task_

RESULTS = Path(__file__).parent / "results" / "tasks.jsonl"
# Of the guard: WikiText-2 training text. What it cost is then measured on the test text, which the search never sees.
GUARD_WINDOWS, GUARD_WINDOW = 8, 128
TEXT_WINDOWS, TEXT_WINDOW = 8, 256


@dataclass(frozen=True)
class Plan:
    """How much of a task is used.

    Attributes:
        data: folder in the shared data; None where the rows are made.
        train, held_out, test: how many rows of each split at most.
        held_out_part: of the rows that are no test.
    """

    data: str | None
    train: int
    held_out: int
    test: int
    held_out_part: float = 0.2


PLANS = {
    "int-sum": Plan(None, 128, 48, 200),
    "int-mult": Plan(None, 128, 48, 80),
    "basic-arithmetic": Plan("basic_arithmetic", 128, 48, 200),
    "cb": Plan("cb", 16, 12, 28, 0.43),
    "copa": Plan("copa", 30, 20, 50, 0.4),
}


def examples(tokenizer: Any, name: str, split: str) -> list[TokenExample]:
    """The examples of a split of the plan."""
    plan, shared = PLANS[name], shared_folder()
    if plan.data is not None and shared is None:
        sys.exit(f"task_smollm2.py needs the data of the shared folder for {name}: set EIGENPRUNE_SHARED")
    task = find_task(name, None if plan.data is None or shared is None else shared / "data" / plan.data)
    limit = {"train": plan.train, "held_out": plan.held_out, "test": plan.test}[split]
    return task.examples(tokenizer, split, held_out=plan.held_out_part, limit=limit)


def measured(model: Any, found: list[TokenExample]) -> dict[str, Any]:
    """Right answers with their interval, and the mean loss of the right answer."""
    began = time.perf_counter()
    right = right_answers(model, found).tolist()
    loss = float(answer_losses(model, found).double().mean())
    return {
        "right": sum(right),
        "total": len(right),
        "interval": list(wilson_interval(sum(right), len(right))),
        "answer_loss": loss,
        "answers": "".join("01"[one] for one in right),
        "seconds": time.perf_counter() - began,
    }


def before(model: Any, tokenizer: Any, names: list[str], out: Path) -> None:
    """Measure the untouched model on the test split of each task."""
    done = {row["task"] for row in kept_rows(out) if row["stage"] == "before"}
    for name in names:
        if name not in done:
            row = {"stage": "before", "task": name, "model": PROVENANCE}
            keep_row(out, row | measured(model, examples(tokenizer, name, "test")))
            print(f"{name}: {kept_rows(out)[-1]['right']} of {kept_rows(out)[-1]['total']}", file=sys.stderr)


def after(model: Any, tokenizer: Any, name: str, options: argparse.Namespace) -> None:
    """Remove what stands in the way of one task, and keep the row."""
    shared = shared_folder()
    if shared is None:
        sys.exit("task_smollm2.py guards with WikiText of the shared folder: set EIGENPRUNE_SHARED")
    folder = shared / "data" / "wikitext2"
    guard = cut_windows(
        tokenizer, read_texts([folder / "train_samples.jsonl.gz"]), count=options.guard, window=GUARD_WINDOW
    )
    text = torch.tensor(token_ids(tokenizer, SEPARATOR.join(read_texts([folder / "test_raw.txt.gz"]))[:400_000]))
    windows = spaced_windows(text, TEXT_WINDOW, TEXT_WINDOWS)
    split = TaskSplits(**{part: examples(tokenizer, name, part) for part in ("train", "held_out", "test")})
    split = replace(split, held_out=split.held_out[: options.held_out])
    base, text_before = base_weights(model), perplexity(model, windows, progress=False).loss
    report = run_task_(
        model,
        name,
        split,
        guard,
        remove=options.remove,
        worth=options.worth,
        kinds=options.kinds,
        skip=options.skip,
        settings={"skip": options.skip},
        checks=options.checks,
        retention_bound=options.bound,
        pooled=False,
        autocast=True,
        retention_weight=options.weight,
        seed=0,
        progress=True,
        keep_on_interrupt=True,
    )
    found = report.to_dict()
    views = found.pop("views")
    row = {"stage": "after", "model": PROVENANCE, "pictures": {key: views[key] for key in ("path", "chosen")}} | found
    row["wikitext_test_loss"] = [text_before, perplexity(model, windows, progress=False).loss]
    row["removal"].pop("pieces")
    if options.adapters is not None and report.removal.removal.count:
        path = options.adapters / f"{name}.safetensors"
        save_adapter(report.removal.removal, base, path, model=model, provenance={"task": name}, overwrite=True)
        row["adapter_bytes"] = path.stat().st_size
    if options.pictures is not None:
        from eigenprune.report.task_pictures import write_pictures

        write_pictures(report.views(), options.pictures, name)
    keep_row(options.out, row)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every task before and after."""
    lines = ["| task | before | after | McNemar p | removed | WikiText-2 test loss |", "| --- " * 6 + "|"]
    for row in rows:
        if row["stage"] == "after":
            test, text = row["test"], row["wikitext_test_loss"]
            sides = [
                f"{test[side]}/{test['total']} ({100 * test[f'{side}_interval'][0]:.1f} to "
                f"{100 * test[f'{side}_interval'][1]:.1f} %)"
                for side in ("before", "after")
            ]
            lines.append(
                f"| {row['task']}, {row['removal']['settings']['worth']} | {sides[0]} | {sides[1]} | "
                f"{test['p_value']:.2g} | {100 * row['removed']:.2f} % | {text[0]:.3f} -> {text[1]:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("before", "after"), default="before")
    parser.add_argument("--table", action="store_true", help="print the rows kept so far, and measure nothing")
    parser.add_argument("--remove", type=float, default=0.01)
    parser.add_argument("--worth", default="exact")
    parser.add_argument("--kinds", nargs="*", help="default: all")
    parser.add_argument("--skip", nargs="*", default=[], help="regular expressions of layers that stay as they are")
    parser.add_argument("--held-out", type=int, help="questions to stop by; default: of the plan")
    parser.add_argument("--guard", type=int, default=GUARD_WINDOWS, help="windows of text that the search guards")
    parser.add_argument("--checks", type=int, default=300)
    parser.add_argument("--bound", type=float, default=0.05, help="nats a token by which the guard's loss may rise")
    parser.add_argument("--weight", type=float, default=5.0, help="of the guard's loss in what the search lowers")
    parser.add_argument("--adapters", type=Path, help="folder to keep the adapters in")
    parser.add_argument("--pictures", type=Path, help="folder to write pictures to (needs matplotlib)")
    parser.add_argument("--tasks", nargs="*", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the model is kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.table:
        print(table(kept_rows(options.out)))
        return
    folder = get_smollm2(options.models)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if options.stage == "before":
        before(model, tokenizer, options.tasks, options.out)
        return
    done = [
        (row["task"], row["removal"]["settings"]["worth"], row["settings"].get("skip", []))
        for row in kept_rows(options.out)
        if "removal" in row
    ]
    for name in options.tasks:
        if (name, options.worth, options.skip) not in done:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            after(model, tokenizer, name, options)
    print(table(kept_rows(options.out)))


if __name__ == "__main__":
    main()
