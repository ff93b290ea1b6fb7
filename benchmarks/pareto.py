# SPDX-License-Identifier: Apache-2.0
"""Size against loss: SmolLM2-135M-Instruct dense, low rank, in few bits, and both; bytes and parameters on the x axis.

The protocol of quality.py: calibrated on the first 64 windows of WikiText-2 `train_samples`, perplexity on 24 windows
of 1024 tokens of its test text. Every model is saved in bfloat16 (what is not quantised), its weight files are counted,
and it is loaded again in float32 from there. Rows that are in the file already are not measured again.

    python benchmarks/pareto.py                                  # the rows that are missing, some minutes each
    python benchmarks/pareto.py --only 'int8'                    # rows whose name has a match
    python benchmarks/pareto.py --table --evaluation-windows 6   # the rows kept so far as a Markdown table
    python benchmarks/pareto.py --picture pareto.svg --evaluation-windows 6   # and as a picture (needs matplotlib)
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from environment import shared_folder
from get_smollm2 import get_smollm2
from quality import EVALUATION_WINDOWS, Bench
from result_rows import RESULTS_FOLDER, command_line, keep_row, kept_rows
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, perplexity, prune_, save_model
from eigenprune.calibrate import default_cache_dir
from eigenprune.layers import low_rank_layers, quantised_bits
from eigenprune.quantize import quantize_

RESULTS = RESULTS_FOLDER / "pareto.jsonl"
MOST_NATS = 2.0  # of the picture
STYLES = {  # family: (colour, marker)
    "dense": ("#222222", "s"),
    "pivot bf16": ("#2c6fbb", "o"),
    "pair bf16": ("#8ab6e0", "v"),
    "pivot int8": ("#c0392b", "o"),
    "pair int8": ("#e59866", "v"),
    "pivot int4": ("#2e8b57", "o"),
    "pair int4": ("#82c99d", "v"),
    "channels bf16": ("#16a085", "o"),
    "channels int8": ("#d4ac0d", "o"),
    "recovered bf16": ("#2c6fbb", "D"),
    "recovered int8": ("#c0392b", "D"),
    "ranks and bits together": ("#8e44ad", "*"),
}


@dataclass(frozen=True)
class Row:
    """One model: `layout` dense, pair, pivot, channels (pivot, by `kfac-channels`), or recovered: a pruned model that
    recovery.py has saved; `bits` 0 for bfloat16; `keep` a fraction of what `budget` counts.
    """

    layout: str
    bits: int | str
    keep: float = 1.0
    budget: str = "parameters"

    @property
    def family(self) -> str:
        """Rows that one line joins."""
        if self.bits == "auto":
            return "ranks and bits together"
        return "dense" if self.layout == "dense" else f"{self.layout} {'bf16' if self.bits == 0 else f'int{self.bits}'}"

    @property
    def name(self) -> str:
        """In the table."""
        if self.layout == "dense":
            return f"dense {'bf16' if self.bits == 0 else f'int{self.bits}'}"
        return f"{self.family}, keep {self.keep:g}{' of the bytes' if self.budget == 'bytes' else ''}"


ROWS = (  # in the order in which they are wanted
    Row("dense", 0),
    Row("dense", 8),
    Row("dense", 4),
    Row("pivot", 8, 0.8),
    Row("pivot", 0, 0.8),
    Row("pivot", 0, 0.6),
    Row("pivot", 4, 0.8),
    Row("pivot", 8, 0.6),
    Row("pivot", 4, 0.6),
    Row("pivot", 0, 0.4),  # the bytes of int8 at 0.8
    Row("pivot", "auto", 0.4, "bytes"),
    Row("pivot", "auto", 0.25, "bytes"),  # of float32 bytes: about a byte a parameter
    Row("pivot", "auto", 0.22, "bytes"),
    Row("pivot", "auto", 0.19, "bytes"),
    Row("pair", 8, 0.8),
    Row("pair", 4, 0.8),
    Row("pair", 0, 0.8),
    Row("pivot", 0, 0.5),  # the bytes of dense int8
    Row("pivot", 0, 0.3),  # the bytes of int8 at 0.6
    Row("pivot", 8, 0.9),
    Row("pivot", 0, 0.9),
    Row("channels", 8, 0.9),
    Row("channels", 8, 0.8),
    Row("channels", 8, 0.6),
    Row("channels", 0, 0.6),
    Row("recovered", 0, 0.8),
    Row("recovered", 8, 0.8),
    Row("recovered", 0, 0.6),
    Row("recovered", 8, 0.6),
)


class Models:
    """The dense model, and pruned ones in float32 that are kept in a folder: rows that differ in bits share them."""

    def __init__(self, bench: Bench, folder: Path, recovered: dict[float, Path]) -> None:
        self.bench, self.folder, self.recovered = bench, folder, recovered

    def of(self, row: Row) -> Any:
        """The model of `row`, in its bits or in float32."""
        if row.layout == "dense":
            model = copy.deepcopy(self.bench.model)
            return quantize_(model, int(row.bits), dense=True) if row.bits else model
        kept = self.folder / f"{row.layout}-{row.budget}-{row.keep:g}{'-auto' if row.bits == 'auto' else ''}"
        if row.layout == "recovered":
            kept = self.recovered[row.keep]
        elif not kept.exists():
            self._prune(row, kept)
        model = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
        # As `prune_` does with `bits`: what the allocation left dense too.
        return quantize_(model, dict.fromkeys(self.bench.layers, row.bits)) if row.bits in (4, 8) else model

    def _prune(self, row: Row, folder: Path) -> None:
        model = copy.deepcopy(self.bench.model)
        bits = "auto" if row.bits == "auto" else None
        channels = row.layout == "channels"
        config = EigenpruneConfig(
            keep=row.keep,
            method="kfac-channels" if channels else "kfac",
            layout="pivot" if channels else row.layout,
            budget=row.budget,
            bits=bits,
        )
        windows = self.bench.calibration_windows("wikitext2")
        report = prune_(model, config, windows=windows, cache_dir=default_cache_dir(), progress=False)
        save_model(model, folder, report=report)


def measure(models: Models, row: Row) -> dict[str, Any]:
    """Make the model of `row`, save it, load it again, and measure that."""
    model = models.of(row)
    model.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model")
        file_bytes = sum(file.stat().st_size for file in (Path(folder) / "model").glob("*.safetensors"))
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    factored = low_rank_layers(model)
    linears = {name: layer.right if name in factored else layer for name, layer in chosen_layers(models, model)}
    bits = [quantised_bits(linear.weight) or 16 for linear in linears.values()]
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "file_bytes": file_bytes,
        "factored": len(factored),
        "layers_by_bits": {str(one): bits.count(one) for one in sorted(set(bits))},
    }
    found = perplexity(model, models.bench.windows).to_dict()
    return {"name": row.name, "family": row.family, **vars(row), **models.bench.counts, **facts, **found}


def chosen_layers(models: Models, model: Any) -> Iterable[tuple[str, Any]]:
    """The layers of `model` that pruning counts, factored or not."""
    return ((name, model.get_submodule(name)) for name in models.bench.layers)


def at_equal_bytes(rows: list[dict[str, Any]], size: int, family: str) -> float | None:
    """Perplexity of `family` at that size, between its two neighbours: linear in bytes and in log perplexity."""
    points = sorted((row["file_bytes"], math.log(row["perplexity"])) for row in rows if row["family"] == family)
    for (low, at_low), (high, at_high) in pairwise(points):
        if low <= size <= high:
            return math.exp(at_low + (at_high - at_low) * (size - low) / (high - low))
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the largest first; the last column is what low rank alone has at the same bytes."""
    dense = next(row for row in rows if row["name"] == "dense bf16")
    lines = [
        f"Dense perplexity {dense['perplexity']:.3f} on {dense['evaluation_windows']} windows of 1024 tokens.",
        "",
        "| model | parameters | bytes of weight files | of dense | perplexity / dense | low rank bf16 at these bytes |",
        "| --- " * 6 + "|",
    ]
    frontier = [row | {"family": "bf16"} for row in rows if row["family"] == "pivot bf16" or row is dense]
    for row in sorted(rows, key=lambda row: -row["file_bytes"]):
        same = at_equal_bytes(frontier, row["file_bytes"], "bf16")
        beside = "" if same is None or row["bits"] == 0 else f"{same / dense['perplexity']:.3f}"
        size, loss = (row[key] / dense[key] for key in ("file_bytes", "perplexity"))
        counts = f"{row['parameters']:,} | {row['file_bytes']:,}"
        lines.append(f"| {row['name']} | {counts} | {size:.3f} | {loss:.3f} | {beside} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss above the dense model's, by bytes and by parameters; needs matplotlib (`pip install '.[plots]'`)."""
    from matplotlib.figure import Figure

    dense = next(row for row in rows if row["name"] == "dense bf16")
    beyond = [row["name"] for row in rows if math.log(row["perplexity"] / dense["perplexity"]) > MOST_NATS]
    rows = [row for row in rows if row["name"] not in beyond]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axes = (("file_bytes", "MB of weight files"), ("parameters", "million parameters"))
    for panel, (key, label) in zip(panels, axes, strict=True):
        for family, (color, marker) in STYLES.items():
            mine = sorted((row for row in rows if row["family"] == family), key=lambda row: row[key])
            sizes = [row[key] / 1e6 for row in mine]
            losses = [math.log(row["perplexity"] / dense["perplexity"]) for row in mine]
            line = "" if family == "dense" else "-"
            if not mine:
                continue
            panel.plot(sizes, losses, line, color=color, marker=marker, label=family, markersize=6, linewidth=1.2)
            for row, x, y in zip(mine, sizes, losses, strict=True):
                word = row["name"].removeprefix("dense ") if family == "dense" else f"{row['keep']:g}"
                panel.annotate(word, (x, y), (4, 5), textcoords="offset points", fontsize=7, color=color)
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nats per token above the dense model")
    panels[1].legend(fontsize=8, frameon=False)
    title = f"SmolLM2-135M-Instruct, {dense['evaluation_windows']} windows of WikiText-2: size against loss"
    note = f"\nnot drawn, above {MOST_NATS:g} nats: {', '.join(beyond)}" if beyond else ""
    figure.suptitle(f"{title} (lower left is better){note}", fontsize=10)
    figure.savefig(path, dpi=150)


def missing(options: argparse.Namespace, rows: Iterable[dict[str, Any]]) -> list[Row]:
    """The rows to measure: those that are not there on as many windows."""
    done = {row["name"] for row in rows if row["evaluation_windows"] == options.evaluation_windows}
    possible = (row for row in ROWS if row.layout != "recovered" or row.keep in dict(options.recovered))
    return [row for row in possible if row.name not in done and re.search(options.only, row.name)]


def recovered_model(text: str) -> tuple[float, Path]:
    """KEEP=FOLDER from the command line."""
    keep, _, folder = text.partition("=")
    return float(keep), Path(folder)


def main() -> None:
    """Measure the rows that are missing, or show those that are there."""
    parser = command_line(__doc__, RESULTS)
    parser.add_argument("--only", default="", help="regular expression of row names")
    parser.add_argument(
        "--evaluation-windows", type=int, default=EVALUATION_WINDOWS, help="of 1024 tokens, spaced evenly"
    )
    parser.add_argument(
        "--recovered",
        type=recovered_model,
        action="append",
        default=[],
        metavar="KEEP=FOLDER",
        help="a model of recovery.py --save; repeat for more",
    )
    parser.add_argument("--work", type=Path, default=default_cache_dir() / "pareto-benchmark", help="pruned models")
    parser.add_argument("--picture", type=Path, help="draw the rows kept so far into this file, and measure nothing")
    options = parser.parse_args()
    rows = [row for row in kept_rows(options.out) if row["evaluation_windows"] == options.evaluation_windows]
    if options.picture:
        draw(rows, options.picture)
        return
    wanted = [] if options.table else missing(options, rows)
    shared = shared_folder()
    if wanted and shared is None:
        sys.exit("pareto.py needs the texts of the shared folder: set EIGENPRUNE_SHARED")
    models = None
    if wanted and shared is not None:
        bench = Bench(get_smollm2(options.models), shared, evaluation_windows=options.evaluation_windows)
        models = Models(bench, options.work, dict(options.recovered))
    for row in wanted if models is not None else ():
        rows.append(keep_row(options.out, measure(models, row)))
        print(
            f"{row.name}: {rows[-1]['file_bytes']:,} bytes, {rows[-1]['perplexity']:.3f}", file=sys.stderr, flush=True
        )
    print(table(rows) if rows else f"no rows of {options.evaluation_windows} evaluation windows in {options.out}")


if __name__ == "__main__":
    main()
