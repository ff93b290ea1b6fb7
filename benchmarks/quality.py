# SPDX-License-Identifier: Apache-2.0
"""Perplexity of pruned SmolLM2-135M-Instruct: methods x layouts x allocations at keep 0.9, 0.8, 0.6.

Every method with its own allocation, the global and the uniform one; the default method with every allocation.

Protocol. Calibration: the first 1024 tokens of each of the first 64 rows of WikiText-2 `train_samples`; besides, the
default method on 64 windows of `wiki_passages` and of the text that ships with Python, to show what another
domain costs. Evaluation: 24 windows of 1024 tokens at even spacing over the raw WikiText-2 test text, no BOS, float32.

Rows go to a JSONL file as they are measured; rows that are there already are not measured again, or with
`--this-commit` those that this commit measured.

    python benchmarks/quality.py                      # all rows, some hours on 2 cores
    python benchmarks/quality.py --methods kfac --keep 0.8
    python benchmarks/quality.py --methods zs io --layouts pair --allocations own
    python benchmarks/quality.py --calibration-windows 128 --methods kfac --layouts pivot --allocations global
    python benchmarks/quality.py --calibration-windows 8 --evaluation-windows 4 --out /tmp/small.jsonl
    python benchmarks/quality.py --table              # print the rows kept so far as a Markdown table
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import environment
from get_smollm2 import get_smollm2
from result_rows import RESULTS_FOLDER, command_line, keep_row, kept_rows, shared_or_exit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenprune import EigenpruneConfig, prune_
from eigenprune.calibrate import BUILTIN, builtin_texts, cut_windows, default_cache_dir, read_texts, token_ids
from eigenprune.evaluate import perplexity, spaced_windows
from eigenprune.layers import select_layers
from eigenprune.spectral import ALLOCATIONS, METHODS

KEEP = (0.9, 0.8, 0.6)
LAYOUTS = ("pivot", "pair")
SHARED_ALLOCATIONS = ("global", "uniform")
WINDOW = 1024
CALIBRATION_WINDOWS = 64
EVALUATION_WINDOWS = 24
RESULTS = RESULTS_FOLDER / "quality.jsonl"
KEY = ("calibration", "method", "layout", "allocation", "keep")
COUNTS = {"calibration_windows": CALIBRATION_WINDOWS, "evaluation_windows": EVALUATION_WINDOWS}  # of older rows


@dataclass(frozen=True)
class Row:
    """One configuration."""

    calibration: str
    method: str
    layout: str
    allocation: str
    keep: float


def all_rows() -> Iterator[Row]:
    """The default first, then its other domains, then everything else; no row twice."""
    default = ("kfac", "pivot", "global")
    rest = [
        Row("wikitext2", method, layout, allocation, keep)
        for method, own in METHODS.items()
        if own.removal is None and own.worth != "importance"  # these need a task, or a LoRA
        for layout in LAYOUTS
        for allocation in dict.fromkeys([own.allocation, *(() if own.channels else SHARED_ALLOCATIONS)])
        for keep in KEEP
    ]
    rest += [Row("wikitext2", "kfac", "pivot", allocation, keep) for allocation in ALLOCATIONS for keep in KEEP]
    rows = [row for row in rest if (row.method, row.layout, row.allocation) == default]
    for name in ("wiki_passages", BUILTIN):
        rows += [Row(name, *default, keep) for keep in KEEP]
    yield from dict.fromkeys(rows + rest)


class Bench:
    """The model, its statistics and components, kept between rows that share them."""

    def __init__(
        self,
        model_folder: Path,
        shared: Path,
        calibration_windows: int = CALIBRATION_WINDOWS,
        evaluation_windows: int = EVALUATION_WINDOWS,
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.shared = shared
        self.counts = {"calibration_windows": calibration_windows, "evaluation_windows": evaluation_windows}
        self.layers = select_layers(self.model).chosen
        text = read_texts([shared / "data/wikitext2/test_raw.txt.gz"])[0]
        self.windows = spaced_windows(torch.tensor(token_ids(self.tokenizer, text)), WINDOW, evaluation_windows)
        self._group: tuple[str, str] | None = None
        self._components_of_others = set(default_cache_dir().glob("components-*"))

    def dense(self) -> dict[str, Any]:
        """Perplexity of the dense model."""
        return {"method": "dense", "keep": 1.0, **self.counts, **perplexity(self.model, self.windows).to_dict()}

    def measure(self, row: Row) -> dict[str, Any]:
        """Prune as `row` says, and measure."""
        if self._group != (row.calibration, row.method):
            self._forget_components()
            self._group = row.calibration, row.method
        config = EigenpruneConfig(
            keep=row.keep, method=row.method, layout=row.layout, allocation=row.allocation, rank_multiple=8
        )
        pruned = copy.deepcopy(self.model)
        report = prune_(
            pruned,
            config,
            tokenizer=self.tokenizer,
            **self.measured_on(row.calibration),
            cache_dir=default_cache_dir(),
            progress=False,
        )
        facts = {
            "kept": report.keep,
            "estimated_loss": sum(layer.loss for layer in report.layers if layer.loss is not None),
            "allocation_gap": report.settings.get("allocation_gap"),
            "seconds_of": report.seconds,
        }
        return {**vars(row), **self.counts, **facts, **perplexity(pruned, self.windows).to_dict()}

    def measured_on(self, calibration: str) -> dict[str, Any]:
        """What `prune_` is given of that calibration."""
        return {"windows": self.calibration_windows(calibration)}

    def _forget_components(self) -> None:
        """Those that have come since this run began: they take twice the bytes of the layers. One run at a time."""
        for folder in set(default_cache_dir().glob("components-*")) - self._components_of_others:
            shutil.rmtree(folder)

    def calibration_windows(self, calibration: str) -> Tensor:
        """[windows, 1024] token ids of the text of that name."""
        count = self.counts["calibration_windows"]
        return cut_windows(self.tokenizer, self.texts(calibration), count=count, window=WINDOW)

    def texts(self, calibration: str) -> list[str]:
        """The documents of that name."""
        if calibration == "wikitext2":
            most = max(CALIBRATION_WINDOWS, self.counts["calibration_windows"])
            return read_texts([self.shared / "data/wikitext2/train_samples.jsonl.gz"])[:most]
        if calibration == BUILTIN:
            return builtin_texts()
        return read_texts([self.shared / "data" / calibration / "train.jsonl.gz"])


def row_counts(row: dict[str, Any]) -> dict[str, int]:
    """How many windows a row was calibrated and measured on."""
    return {key: row.get(key, default) for key, default in COUNTS.items()}


def is_wanted(row: Row, options: argparse.Namespace) -> bool:
    """Whether the command line asks for `row`."""
    allocations = [METHODS[row.method].allocation if name == "own" else name for name in options.allocations]
    return (
        row.method in options.methods
        and row.keep in options.keep
        and row.calibration in options.calibration
        and row.layout in options.layouts
        and row.allocation in allocations
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: multiples of the dense perplexity by keep."""
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    keeps = sorted({row["keep"] for row in rows if row["method"] != "dense"}, reverse=True)
    lines = [
        f"Dense perplexity {dense:.3f}. Multiples of it:",
        "",
        "| calibration | method | layout | ranks | " + " | ".join(f"keep {keep:g}" for keep in keeps) + " |",
        "| --- " * (4 + len(keeps)) + "|",
    ]
    groups: dict[tuple[str, ...], dict[float, float]] = {}
    for row in rows:
        if row["method"] != "dense":
            groups.setdefault(tuple(row[k] for k in KEY[:-1]), {})[row["keep"]] = row["perplexity"] / dense
    for names, values in groups.items():
        cells = " | ".join(f"{values[keep]:.4g}" if keep in values else "" for keep in keeps)
        lines.append(f"| {' | '.join(names)} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the rows that are missing."""
    parser = command_line(__doc__, RESULTS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--keep", nargs="*", type=float, default=list(KEEP))
    parser.add_argument("--calibration", nargs="*", default=["wikitext2", "wiki_passages", BUILTIN])
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--allocations", nargs="*", default=list(ALLOCATIONS), help="names; `own`: each method's")
    parser.add_argument("--calibration-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--evaluation-windows", type=int, default=EVALUATION_WINDOWS)
    parser.add_argument("--this-commit", action="store_true", help="measure again what other commits have measured")
    options = parser.parse_args()
    rows = kept_rows(options.out)
    if options.table:
        print(table(rows))
        return
    shared = shared_or_exit()
    bench = Bench(get_smollm2(options.models), shared, options.calibration_windows, options.evaluation_windows)
    commit = environment()["commit"]
    now = [row for row in rows if row_counts(row) == bench.counts]
    now = [row for row in now if not options.this_commit or row["commit"] == commit]
    done = {tuple(row.get(key) for key in KEY) for row in now}
    if not any(row["method"] == "dense" for row in now):
        rows.append(keep_row(options.out, bench.dense()))
    for row in all_rows():
        if is_wanted(row, options) and tuple(vars(row).values()) not in done:
            rows.append(keep_row(options.out, bench.measure(row)))
            print(f"{row} perplexity {rows[-1]['perplexity']:.3f}", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
