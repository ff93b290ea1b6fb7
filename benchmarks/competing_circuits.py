# SPDX-License-Identifier: Apache-2.0
"""Eigenpruning where there is something to gain: a model that knows the product and says the sum.

Trains the model of `competing_model.py` (once a seed; it is kept in --work), removes components for the product on 320
of the 400 `x` prompts, with 320 of the 400 `+` prompts as what must be retained, and measures on the other 80 of each,
which choose nothing: of the 320, 80 propose (worth is measured on them) and 240 decide. Beside it the same call with
random components, with the smallest ones and with the formula of arXiv 2404.03147, their fraction chosen likewise.

    python benchmarks/competing_circuits.py --seeds 4 --json      # minutes a seed on 2 cores
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from competing_model import PLUS, STEPS, TIMES, questions, shuffled, trained_model
from environment import environment
from torch import nn

from eigenprune.evaluate import accuracy
from eigenprune.evaluate.token_example import TokenExample
from eigenprune.removal import RemovalReport, remove_

SPLIT, PROPOSING = 320, 80
SPLIT_SEED = 42
BATCH = 512
RESULTS = Path(__file__).parent / "results" / "competing_circuits.jsonl"
SEARCH = {"remove": 0.35, "checks": 6000, "retention_bound": 0.6, "retention_weight": 0.7, "pooled": False}
BASELINES = ("random", "smallest-sigma", "paper")
BASELINE_BOUND = 10.0  # nats: no guard, so that a baseline's best is seen whatever it costs elsewhere


def percent(model: nn.Module, examples: list[TokenExample]) -> float:
    """Accuracy in percent, to a hundredth."""
    return round(100 * accuracy(model, examples, BATCH), 2)


def pruned(model: nn.Module, seed: int, worth: str, settings: dict[str, Any]) -> tuple[nn.Module, RemovalReport]:
    """A copy of `model` without what stands in the product's way."""
    times, plus = shuffled(questions(TIMES), SPLIT_SEED)[:SPLIT], shuffled(questions(PLUS), SPLIT_SEED)[:SPLIT]
    copied = copy.deepcopy(model)
    proposing, deciding = times[:PROPOSING], times[PROPOSING:]
    report = remove_(
        copied, proposing, held_out=deciding, retention=plus, worth=worth, batch=BATCH, seed=seed, **settings
    )
    return copied, report


def seed_row(seed: int, work: Path, steps: int, progress: bool) -> dict[str, Any]:
    """All figures of one seed, accuracies in percent."""
    start = time.perf_counter()
    model = trained_model(seed, work, steps)
    trained = time.perf_counter()
    test = shuffled(questions(TIMES), SPLIT_SEED)[SPLIT:]
    plus, apart = questions(PLUS), shuffled(questions(PLUS), SPLIT_SEED)[SPLIT:]
    after, report = pruned(model, seed, "exact", SEARCH | {"progress": progress})
    row: dict[str, Any] = {
        "seed": seed,
        "product_before": percent(model, test),
        "product_after": percent(after, test),
        "plus_before": percent(model, plus),
        "plus_after": percent(after, plus),
        "plus_apart_after": percent(after, apart),
        "removed": report.after.removed,
        "components": report.components,
        "seconds": {
            "training": round(trained - start, 1),
            "removal": round(time.perf_counter() - trained, 1),
        },
        "rounds": [vars(entry) for entry in report.rounds],
        "chosen": report.chosen,
        "baselines": {},
    }
    for worth in BASELINES:
        settings = {"remove": 0.2, "retention_bound": BASELINE_BOUND, "progress": False}
        other, found = pruned(model, seed, worth, settings)
        row["baselines"][worth] = {
            "product_after": percent(other, test),
            "plus_after": percent(other, plus),
            "removed": found.after.removed,
        }
    return row


def main() -> None:
    """Print one row a seed, then the means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=4, help="how many models: seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument(
        "--work", type=Path, default=Path(".models") / "competing", help="where trained models are kept"
    )
    parser.add_argument("--out", type=Path, help=f"append a raw row for each seed here, such as {RESULTS.name}")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows = []
    for seed in range(given.seeds):
        row = seed_row(seed, given.work, given.steps, progress=not given.json)
        rows.append(row)
        if given.out is not None:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"steps": given.steps, "settings": SEARCH} | environment()) + "\n")
        if not given.json:
            print({key: row[key] for key in row if key != "rounds"}, flush=True)
    keys = ("product_before", "product_after", "plus_before", "plus_after", "plus_apart_after")
    means = {key: round(sum(row[key] for row in rows) / len(rows), 2) for key in keys} if rows else {}
    print(json.dumps({"seeds": rows, "mean": means}) if given.json else f"mean: {means}")


if __name__ == "__main__":
    main()
