# SPDX-License-Identifier: Apache-2.0
"""Accuracy of fine-tuned encoders of which single entries are kept, by rule and kept share; bytes of the sparse delta.

Entries that are not kept go back to the base model's value (`base`), or to zero (`zero`). The classifier and the pooler
are kept whole, and so is what the base model does not have; `keep` is of all other entries, `kept` of all. Bytes are
those of the values that differ from where they would go back to, in float32, and of their places
(`eigenprune.entries.packing`); for `zero`, of the whole pruned model. A run is one row; rows that are there already are
not run again, so a stopped run goes on.

    python benchmarks/entries.py questions --out benchmarks/results/entries.jsonl             # some minutes
    python benchmarks/entries.py reactions --items 400 --out benchmarks/results/entries.jsonl  # 10 s a row
    python benchmarks/entries.py questions --table --out benchmarks/results/entries.jsonl     # prints, draws, runs none
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from entries_pairs import PAIRS, Pair, macro_f1, predictions
from environment import ROOT, environment, shared_folder
from torch import Tensor

from eigenprune.calibrate import EntryStatistics, collect_entry_statistics
from eigenprune.calibrate.collect import has_fast_bfloat16
from eigenprune.entries import RULES, merge_entries, select_entries
from eigenprune.entries.packing import packed_bytes, smaller_form
from eigenprune.entries.rules import SCOPES

SHARES = (0.75, 0.1, 0.25, 0.5, 0.05, 0.6, 0.9)
COLORS = ("#c0392b", "#888888", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22")


Collected = Callable[[], tuple[EntryStatistics, EntryStatistics]]


class Run(NamedTuple):
    """What one row measures."""

    rule: str
    scope: str
    reset: str
    keep: float


def runs() -> list[Run]:
    """All, the most wanted first."""
    plain = [(rule.name, rule.scope, "base") for rule in RULES.values() if rule.name != "ken" and not rule.needs]
    measured = [(rule.name, rule.scope, "base") for rule in RULES.values() if rule.needs]
    plain += [("delta", scope, "base") for scope in SCOPES if scope != RULES["delta"].scope]
    scopes = [("delta-fisher", "row", "base")]
    scopes += [("magnitude", "global", "base"), ("delta-fisher", "layer", "base"), ("random", "global", "base")]
    zero = [(name, RULES[name].scope, "zero") for name in ("magnitude", "wanda", "sap", "d-pruner", "icbs")]
    zero += [("magnitude", "global", "zero"), ("delta-fisher", "global", "zero")]
    literal = [("ken", "row", "base")]
    ordered = [Run("random", "row", "base", 1.0)]
    for group in (plain, measured, scopes, zero, literal):
        ordered += [Run(*kind, keep) for keep in SHARES for kind in group]
    return ordered


def delta_bytes(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], masks: Mapping[str, Tensor], run: Run) -> int:
    """Of the stored values and their places."""
    total = 0
    for name, tensor in tuned.items():
        if name not in masks or (run.reset == "base" and name not in base):
            total += tensor.numel() * tensor.element_size()
            continue
        differs = tensor != base[name] if run.reset == "base" else tensor != 0
        stored = int((masks[name] & differs).sum())
        total += stored * tensor.element_size()
        total += packed_bytes(smaller_form(tensor.numel(), stored), tensor.numel(), stored)
    return total


def measure(pair: Pair, tuned: dict[str, Tensor], run: Run, statistics: Collected) -> dict[str, Any]:
    """One row; the model holds the fine-tuned weights again afterwards."""
    first, second = statistics() if RULES[run.rule].needs else (None, None)
    start = time.perf_counter()
    masks = select_entries(pair.base, tuned, run.rule, run.keep, scope=run.scope, reset=run.reset, statistics=first,
                           general=second)  # fmt: skip
    seconds = time.perf_counter() - start
    merged = dict(merge_entries(pair.base if run.reset == "base" else None, tuned, masks))
    pair.model.load_state_dict(merged)
    found = predictions(pair)
    pair.model.load_state_dict(tuned)
    labels = [label for _, label in pair.test]
    entries = sum(tensor.numel() for name, tensor in tuned.items() if name in masks)
    row = {"pair": pair.name, **run._asdict(), "items": len(labels)}
    row |= {"kept": round(sum(masks.kept(name) for name in masks) / entries, 5), "entries": entries}
    row |= {"accuracy": sum(a == b for a, b in zip(found, labels, strict=True)) / len(labels)}
    row |= {"macro_f1": round(macro_f1(found, labels), 5)}
    row |= {"bytes": delta_bytes(pair.base, tuned, masks, run), "dense_bytes": 4 * entries}
    row |= {"select_seconds": round(seconds, 2), "predictions": "".join(chr(48 + label) for label in found)}
    row["products"] = "bfloat16" if has_fast_bfloat16(torch.device("cpu")) else "float32"
    return row | environment()


def collect(pair: Pair) -> tuple[EntryStatistics, EntryStatistics]:
    """Of the domain's texts, with input Grams, and of the general ones; labels are drawn."""
    domain = collect_entry_statistics(pair.model, pair.examples(pair.calibration), input_grams=True)
    return domain, collect_entry_statistics(pair.model, pair.examples(pair.general))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each rule, scope and form, a column for each share; accuracy in percent."""
    shares = sorted({row["keep"] for row in rows if row["keep"] < 1}, reverse=True)
    lines = [f"| rule | scope | the others | {' | '.join(f'{share:.0%}' for share in shares)} |"]
    lines.append("| --- " * (3 + len(shares)) + "|")
    kinds = dict.fromkeys((row["rule"], row["scope"], row["reset"]) for row in rows if row["keep"] < 1)
    for kind in kinds:
        cells = {row["keep"]: f"{100 * row['accuracy']:.1f}" for row in rows
                 if (row["rule"], row["scope"], row["reset"]) == kind}  # fmt: skip
        lines.append(f"| {' | '.join(kind)} | {' | '.join(cells.get(share, '') for share in shares)} |")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], width: int = 620, height: int = 380) -> str:
    """Accuracy against bytes (a logarithmic axis), of the rules in their own scope, as SVG; others go to the base."""
    chosen = [row for row in rows if row["reset"] == "base" and row["keep"] < 1]
    kinds = [rule.name for rule in RULES.values() if any(row["rule"] == rule.name for row in chosen)]
    sizes = [math.log10(row["bytes"]) for row in chosen]
    low, high = min(sizes), max(sizes)
    left, bottom, right = 46, height - 40, width - 130
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
             'font-size="12"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip

    def at(row: dict[str, Any]) -> str:
        x = left + (right - left) * (math.log10(row["bytes"]) - low) / (high - low)
        return f"{x:.1f},{bottom - (bottom - 16) * row['accuracy']:.1f}"

    for i in range(6):
        y = bottom - (bottom - 16) * i / 5
        parts.append(f'<path d="M{left},{y:.1f} H{right}" stroke="#dddddd"/><text x="8" y="{y:.1f}">{20 * i}%</text>')
        size = 10 ** (low + (high - low) * i / 5) / 1e6
        x = left + (right - left) * i / 5
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{size:.2g}</text>')
    for i, (kind, color) in enumerate(zip(kinds, COLORS, strict=False)):
        line = [row for row in chosen if row["rule"] == kind and row["scope"] == RULES[kind].scope]
        points = " ".join(at(row) for row in sorted(line, key=lambda row: row["bytes"]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 10}" y="{30 + 18 * i}" fill="{color}">{kind}</text>')
    dense = rows[0]["dense_bytes"] / 1e6
    words = f"{rows[0]['pair']}: accuracy against megabytes of the sparse delta (fine-tuned: {dense:.1f} MB)"
    parts.append(f'<text x="{left}" y="{height - 6}">{words}</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    """Run what is not there yet, or show what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the models are kept")
    parser.add_argument("--items", type=int, default=500, help="test texts, the first ones")
    parser.add_argument("--minutes", type=float, default=7.0, help="no row is begun after so long")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="rows I, I + N, ... only")
    parser.add_argument("--most", type=int, default=10_000, help="rows to run at most")
    parser.add_argument("--table", action="store_true", help="print the table and draw the picture, run nothing")
    parser.add_argument("--out", type=Path, required=True, help="rows are added to this file")
    options = parser.parse_args()
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    rows = [row for row in map(json.loads, lines) if row["pair"] == options.pair and row["items"] == options.items]
    if options.table:
        print(table(rows))
        options.out.with_name(f"entries_{options.pair}.svg").write_text(picture(rows), encoding="utf-8")
        return
    shared = shared_folder()
    if shared is None:
        parser.error("no texts: EIGENPRUNE_SHARED names a folder that holds data/trec")
    begun = time.monotonic()
    pair = PAIRS[options.pair](options.models, shared / "data", options.items)
    tuned = {name: tensor.clone() for name, tensor in pair.model.state_dict().items()}
    statistics = cache(lambda: collect(pair))  # only if a rule asks for them
    done = {Run(*(row[field] for field in Run._fields)): row for row in rows}
    part, parts = options.part
    for run in [run for run in runs()[part::parts] if run not in done][: options.most]:
        if time.monotonic() - begun > 60 * options.minutes:
            break
        row = measure(pair, tuned, run, statistics)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(*run, f"{100 * row['accuracy']:.1f} %, {row['bytes'] / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
