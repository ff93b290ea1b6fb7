# SPDX-License-Identifier: Apache-2.0
"""Perplexity of pruned SmolLM2-135M-Instruct: every method x layout x allocation at keep 0.9, 0.8, 0.6.

Protocol. Calibration: the first 1024 tokens of each of the first 64 rows of WikiText-2 `train_samples`; besides, the
default method on 64 windows of `wiki_passages` and of the text that ships with Python, to show what another
domain costs. Evaluation: 24 windows of 1024 tokens at even spacing over the raw WikiText-2 test text, no BOS, float32.

Rows go to a JSONL file as they are measured; rows that are there already are not measured again.

    python benchmarks/quality.py                      # all rows, about an hour on 2 cores
    python benchmarks/quality.py --methods kfac --keep 0.8
    python benchmarks/quality.py --table              # print the rows kept so far as a Markdown table
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment, shared_folder
from get_smollm2 import get_smollm2
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenprune.calibrate import (
    BUILTIN,
    Statistics,
    builtin_texts,
    collect_statistics,
    cut_windows,
    default_cache_dir,
    read_texts,
    token_ids,
)
from eigenprune.evaluate import perplexity, spaced_windows
from eigenprune.layers import dense_weight, low_rank_layers, replace_module_, select_layers
from eigenprune.prune import layer_of_components
from eigenprune.spectral import (
    METHODS,
    Components,
    allocate,
    components,
    factor_sequentially_,
    layer_metric,
    probed_scales,
    rank_options,
    scaled,
    spectrum,
)

KEEP = (0.9, 0.8, 0.6)
LAYOUTS = ("pivot", "pair")
ALLOCATIONS = ("global", "uniform")
WINDOW = 1024
CALIBRATION_WINDOWS = 64
EVALUATION_WINDOWS = 24
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
KEY = ("calibration", "method", "layout", "allocation", "keep")


@dataclass(frozen=True)
class Row:
    """One configuration."""

    calibration: str
    method: str
    layout: str
    allocation: str
    keep: float


def all_rows() -> Iterator[Row]:
    """The default first, then its other domains, then everything else."""
    rest = [Row("wikitext2", m, lo, a, k) for m in METHODS for lo in LAYOUTS for a in ALLOCATIONS for k in KEEP]
    yield from [row for row in rest if (row.method, row.layout, row.allocation) == ("kfac", "pivot", "global")]
    for name in ("wiki_passages", BUILTIN):
        yield from (Row(name, "kfac", "pivot", "global", keep) for keep in KEEP)
    yield from [row for row in rest if (row.method, row.layout, row.allocation) != ("kfac", "pivot", "global")]


class Bench:
    """The model, its statistics and components, kept between rows that share them."""

    def __init__(self, model_folder: Path, shared: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.shared = shared
        self.layers = select_layers(self.model).chosen
        text = read_texts([shared / "data/wikitext2/test_raw.txt.gz"])[0]
        self.windows = spaced_windows(torch.tensor(token_ids(self.tokenizer, text)), WINDOW, EVALUATION_WINDOWS)
        self._statistics: dict[str, Statistics] = {}
        self._parts: tuple[tuple[str, str], dict[str, Components], dict[str, Any]] | None = None

    def dense(self) -> dict[str, Any]:
        """Perplexity of the dense model."""
        return {"method": "dense", "keep": 1.0, **perplexity(self.model, self.windows).to_dict()}

    def measure(self, row: Row) -> dict[str, Any]:
        """Prune as `row` says, and measure."""
        parts, spectra = self._decomposed(row.calibration, row.method)
        options = {
            n: rank_options(tuple(dense_weight(m).shape), spectra[n], row.layout, 8) for n, m in self.layers.items()
        }
        method = METHODS[row.method]
        if method.probe:
            texts = self.calibration_windows(row.calibration)
            statistics = self._collected(row.calibration)
            scales = probed_scales(
                self.model, self.layers, options, method, statistics, texts, cache_dir=default_cache_dir()
            )
            options = scaled(options, scales)
        choices = allocate(options, row.keep, row.allocation)
        pruned = copy.deepcopy(self.model)
        began = time.perf_counter()
        ranks = {name: choice.rank for name, choice in choices.items() if choice.rank}
        if method.shift is not None:
            self._factor_sequentially(pruned, row, ranks)
        for name, module in self.layers.items():
            if name in ranks and name not in low_rank_layers(pruned):
                found = Components(parts[name].left.double(), parts[name].right.double())
                replace_module_(pruned, name, layer_of_components(module, found, choices[name].rank, row.layout))
        seconds = time.perf_counter() - began
        kept = sum(choice.cost for choice in choices.values())
        dense = sum(dense_weight(module).numel() for module in self.layers.values())
        facts = {
            "kept": kept / dense,
            "estimated_loss": sum(c.loss for c in choices.values()),
            "factor_seconds": seconds,
        }
        return {**vars(row), **facts, **perplexity(pruned, self.windows).to_dict()}

    def _factor_sequentially(self, pruned: nn.Module, row: Row, ranks: dict[str, int]) -> None:
        factor_sequentially_(
            pruned,
            select_layers(pruned).chosen,
            ranks,
            METHODS[row.method],
            self._collected(row.calibration),
            self.calibration_windows(row.calibration),
            row.layout,
            cache_dir=default_cache_dir(),
        )

    def _decomposed(self, calibration: str, method: str) -> tuple[dict[str, Components], dict[str, Any]]:
        if self._parts is None or self._parts[0] != (calibration, method):
            self._parts = None
            statistics = self._collected(calibration) if METHODS[method].statistics else None
            parts, spectra = {}, {}
            for name, module in self.layers.items():
                metric = layer_metric(METHODS[method], statistics, name)
                weight = dense_weight(module).detach()
                spectra[name] = spectrum(weight, metric)
                if METHODS[method].shift is not None:
                    continue  # made anew for every budget
                found = components(weight, metric)
                parts[name] = Components(found.left.float(), found.right.float())  # half the memory, and enough digits
            self._parts = ((calibration, method), parts, spectra)
        return self._parts[1], self._parts[2]

    def _collected(self, calibration: str) -> Statistics:
        if calibration not in self._statistics:
            windows = self.calibration_windows(calibration)
            self._statistics[calibration] = collect_statistics(
                self.model, windows, self.layers, cache_dir=default_cache_dir(), source=calibration
            )
        return self._statistics[calibration]

    def calibration_windows(self, calibration: str) -> Tensor:
        """[64, 1024] token ids of the text of that name."""
        return cut_windows(self.tokenizer, self.texts(calibration), count=CALIBRATION_WINDOWS, window=WINDOW)

    def texts(self, calibration: str) -> list[str]:
        """The documents of that name."""
        if calibration == "wikitext2":
            return read_texts([self.shared / "data/wikitext2/train_samples.jsonl.gz"])[:CALIBRATION_WINDOWS]
        if calibration == BUILTIN:
            return builtin_texts()
        return read_texts([self.shared / "data" / calibration / "train.jsonl.gz"])


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--allocations", nargs="*", default=list(ALLOCATIONS))
    parser.add_argument("--keep", nargs="*", type=float, default=list(KEEP))
    parser.add_argument("--calibration", nargs="*", default=["wikitext2", "wiki_passages", BUILTIN])
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the model is kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows kept so far, and measure nothing")
    options = parser.parse_args()
    rows = kept_rows(options.out)
    if options.table:
        print(table(rows))
        return
    shared = shared_folder()
    if shared is None:
        sys.exit("quality.py needs the texts of the shared folder: set EIGENPRUNE_SHARED")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(get_smollm2(options.models), shared)
    done = {tuple(row.get(key) for key in KEY) for row in rows}
    with options.out.open("a", encoding="utf-8") as out:

        def keep_row(row: dict[str, Any]) -> None:
            out.write(json.dumps(row | environment()) + "\n")
            out.flush()
            rows.append(row)

        if not any(row["method"] == "dense" for row in rows):
            keep_row(bench.dense())
        for row in all_rows():
            wanted = (
                row.method in options.methods
                and row.layout in options.layouts
                and row.allocation in options.allocations
                and row.keep in options.keep
                and row.calibration in options.calibration
            )
            if wanted and tuple(vars(row).values()) not in done:
                keep_row(bench.measure(row))
                print(f"{row} perplexity {rows[-1]['perplexity']:.3f}", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
