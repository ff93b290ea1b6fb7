# SPDX-License-Identifier: Apache-2.0
"""Which 16 windows of a pool of 64 to calibrate on: SmolLM2-135M-Instruct at keep 0.8 by the rule of choice.

Protocol of `quality.py` (default method; evaluation on 24 windows of 1024 tokens of the raw WikiText-2 test text,
float32). The pool is the first 1024 tokens of each of the first 64 rows of WikiText-2 `train_samples`. Each rule is a
row of `eigenprune.calibrate.CHOICES`; `random` is measured with several seeds, which shows what chance does. `damage`
compares the dense model with one pruned to 0.8 on the first 4 windows of the pool.

Rows go to a JSONL file as they are measured; rows that are there already are not measured again.

    python benchmarks/window_choice.py                       # all rows, about an hour on 2 cores
    python benchmarks/window_choice.py --rules random coverage
    python benchmarks/window_choice.py --table               # print the rows kept so far as a Markdown table
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from calibration import CurveBench
from get_smollm2 import get_smollm2
from quality import Row
from result_rows import RESULTS_FOLDER, command_line, keep_row, kept_rows, shared_or_exit
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigenprune import EigenpruneConfig, prune_
from eigenprune.calibrate import (
    CHOICES,
    choose_indices,
    collect_statistics,
    default_cache_dir,
    window_features,
    windows_hash,
)

POOL, COUNT, DRAFT, KEEP = 64, 16, 4, 0.8
SEEDS = (0, 1, 2)
RESULTS = RESULTS_FOLDER / "window_choice.jsonl"
KEY = ("rule", "seed")


class ChoiceBench(CurveBench):
    """A bench whose calibrations are named `rule#seed`."""

    chosen: list[int]

    def pool(self) -> Tensor:
        """[64, 1024] token ids."""
        return super().calibration_windows(f"wikitext2@{POOL}")

    def calibration_windows(self, calibration: str) -> Tensor:
        """[16, 1024] token ids."""
        rule, _, seed = calibration.partition("#")
        pool = self.pool()
        features: dict[str, Tensor] = {"index": torch.arange(float(POOL))}
        for name in CHOICES[rule].needs:
            features[name] = self.feature(name, pool)
        self.chosen = choose_indices(rule, features, COUNT, seed=int(seed))
        return pool[torch.tensor(self.chosen)]

    def measured_on(self, calibration: str) -> dict[str, Any]:
        """Statistics of the windows that the rule chooses."""
        windows = self.calibration_windows(calibration)
        began = time.process_time()
        found = collect_statistics(self.model, windows, self.layers, progress=False)
        self.statistics_seconds = time.process_time() - began
        return {"statistics": found}

    def feature(self, name: str, pool: Tensor) -> Tensor:
        """Of every window of the pool; kept, with the seconds that it took, for the rows to come."""
        folder = default_cache_dir() / "window-choice"
        path = folder / f"{name}-{windows_hash(pool)[:16]}.safetensors"
        if not path.exists():
            began = time.process_time()
            pruned = self.draft(pool) if name == "damage" else None
            found = window_features(self.model, pool, [name], layers=self.layers, pruned=pruned, progress=False)[name]
            folder.mkdir(parents=True, exist_ok=True)
            seconds = torch.tensor(time.process_time() - began)
            save_file({name: found, "cpu_seconds": seconds}, path)
        return load_file(path)[name]

    def feature_seconds(self, rule: str) -> float:
        """Processor seconds that the features of a rule took, for the whole pool."""
        end = f"-{windows_hash(self.pool())[:16]}.safetensors"
        folder = default_cache_dir() / "window-choice"
        return sum(float(load_file(folder / f"{name}{end}")["cpu_seconds"]) for name in CHOICES[rule].needs)

    def draft(self, pool: Tensor) -> torch.nn.Module:
        """The model pruned on the first few windows."""
        model = copy.deepcopy(self.model)
        statistics = collect_statistics(self.model, pool[:DRAFT], self.layers, progress=False)
        prune_(model, EigenpruneConfig(keep=KEEP), statistics=statistics, progress=False)
        return model


def wanted_rows() -> list[tuple[str, int]]:
    """(rule, seed), those that need no look at the windows first."""
    order = ("random", "first", "coverage", "prototypes", "el2n", "damage", "grand")
    rows = [(rule, seed) for rule in order for seed in (SEEDS if rule == "random" else (0,))]
    return sorted(rows, key=lambda row: row[1] > 0)  # the other seeds last


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: multiples of the dense perplexity by rule."""
    lines = ["| rule | perplexity / dense | seconds to look at the pool | source |", "| --- | --- | --- | --- |"]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["seed"])
        found = ", ".join(f"{row['perplexity'] / row['dense']:.3f}" for row in own)
        lines.append(f"| `{rule}` | {found} | {own[0]['feature_cpu_seconds']:.0f} | {CHOICES[rule].source} |")
    return "\n".join(lines)


def dense_perplexity() -> float:
    """That of the protocol, from the rows of `quality.py`."""
    rows = kept_rows(RESULTS_FOLDER / "quality.jsonl")
    return next(row["perplexity"] for row in rows if row["method"] == "dense")


def main() -> None:
    """Measure the rows that are missing."""
    parser = command_line(__doc__, RESULTS)
    parser.add_argument("--rules", nargs="*", default=list(CHOICES), choices=list(CHOICES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    options = parser.parse_args()
    rows = kept_rows(options.out)
    if options.table:
        print(table(rows))
        return
    shared = shared_or_exit()
    bench = ChoiceBench(get_smollm2(options.models), shared)
    done = {tuple(row[key] for key in KEY) for row in rows}
    for rule, seed in wanted_rows():
        if rule not in options.rules or seed not in options.seeds or (rule, seed) in done:
            continue
        found = bench.measure(Row(f"{rule}#{seed}", "kfac", "pivot", "global", KEEP))
        found |= {"rule": rule, "seed": seed, "pool": POOL, "calibration_windows": COUNT, "chosen": bench.chosen}
        found |= {"dense": dense_perplexity(), "feature_cpu_seconds": bench.feature_seconds(rule)}
        found |= {"statistics_cpu_seconds": bench.statistics_seconds}
        rows.append(keep_row(options.out, found))
        print(f"{rule} {seed}: {found['perplexity']:.3f}", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
