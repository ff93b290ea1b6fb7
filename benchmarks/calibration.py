# SPDX-License-Identifier: Apache-2.0
"""Perplexity of pruned SmolLM2-135M-Instruct against the source and the number of its calibration windows.

Protocol of `quality.py` (default method; evaluation on 24 windows of 1024 tokens of the raw WikiText-2 test text,
float32), with calibration on the first n windows of each source: text that the model writes itself (one sample of 64
windows, and one of 40, the default), WikiText-2 train, `wiki_passages`, and the text that ships with Python. Keep 0.8
for the curve, and 0.9 and 0.6 besides for the default, 40 sampled windows. Statistics are means over windows, so those
of n windows are made of those of fewer ones and of the windows that are added.

Rows go to a JSONL file as they are measured; rows that are there already are not measured again.

    python benchmarks/calibration.py                             # all rows, about two hours on 2 cores
    python benchmarks/calibration.py --sources sampled --windows 40 --keep 0.9 0.8 0.6
    python benchmarks/calibration.py --sources wikitext2 --windows 1 2 4 8 16 32 64
    python benchmarks/calibration.py --table                     # print the rows kept so far as a Markdown table
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

from get_smollm2 import get_smollm2
from quality import WINDOW, Bench, Row
from result_rows import RESULTS_FOLDER, command_line, keep_row, kept_rows, shared_or_exit
from torch import Tensor

from eigenprune.calibrate import (
    BUILTIN,
    SAMPLED,
    Sampling,
    Statistics,
    collect_statistics,
    cut_windows,
    default_cache_dir,
    read_texts,
    sample_windows,
    windows_hash,
)

SOURCES = (SAMPLED, "wikitext2", "wiki_passages", BUILTIN)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128)
SAMPLED_WINDOWS = (40, 64)  # the first ones of these samples are taken
DEFAULT_WINDOWS = 40
RESULTS = RESULTS_FOLDER / "calibration.jsonl"
KEY = ("source", "calibration_windows", "keep")


class CurveBench(Bench):
    """`quality.Bench` whose calibrations are named `source@windows`."""

    seconds: float = 0.0  # of the last sampling; about none where the cache had it
    statistics_seconds: float = 0.0  # of processor time, for the windows that the row before did not have
    grown: tuple[str, int, Statistics] | None = None  # (source, windows, statistics) of the row before

    def texts(self, calibration: str) -> list[str]:
        """The documents of that name; of WikiText-2 all rows, since the curve goes beyond the 64 of quality.py."""
        if calibration == "wikitext2":
            return read_texts([self.shared / "data/wikitext2/train_samples.jsonl.gz"])
        return super().texts(calibration)

    def statistics(self, calibration: str) -> Statistics:
        """Those of `source@n`: what the row before has, and the windows that are new."""
        source = calibration.partition("@")[0]
        windows = self.calibration_windows(calibration)
        known = self.grown
        if known is None or known[0] != source or known[1] > len(windows) or not self.begins(known, windows):
            known = None
        start = 0 if known is None else known[1]
        if start < len(windows):
            new = collect_statistics(self.model, windows[start:], self.layers, progress=False)
            self.grown = source, len(windows), new if known is None else joined(known[2], new)
        assert self.grown is not None
        named = replace(self.grown[2], facts=replace(self.grown[2].facts, texts_hash=windows_hash(windows)))
        self.grown = source, len(windows), named
        return named

    def measured_on(self, calibration: str) -> dict[str, Any]:
        """Statistics, with the seconds that the new windows took."""
        began = time.process_time()
        found = {"statistics": self.statistics(calibration)}
        self.statistics_seconds = time.process_time() - began
        return found

    def begins(self, known: tuple[str, int, Statistics], windows: Tensor) -> bool:
        """Whether the first of `windows` are those of the row before: texts that are short are cut anew for each n."""
        return known[2].facts.texts_hash == windows_hash(windows[: known[1]])

    def calibration_windows(self, calibration: str) -> Tensor:
        """[n, 1024] token ids of `source@n`."""
        source, _, count = calibration.partition("@")
        if source != SAMPLED:
            return cut_windows(self.tokenizer, self.texts(source), count=int(count), window=WINDOW)
        began = time.perf_counter()
        most = next(most for most in SAMPLED_WINDOWS if int(count) <= most)
        sampling = Sampling(windows=most, window=WINDOW)
        windows = sample_windows(self.model, self.tokenizer, sampling, cache_dir=default_cache_dir())
        self.seconds = time.perf_counter() - began
        return windows[: int(count)]


def joined(first: Statistics, second: Statistics) -> Statistics:
    """The statistics of all windows of both: means, weighed by their windows, which are of one length."""
    a, b = first.facts.windows, second.facts.windows
    tensors = {}
    for name, tensor in second.tensors.items():
        tensors[name] = first.tensors[name] * (a / (a + b)) + tensor * (b / (a + b))
    facts = replace(
        first.facts,
        windows=a + b,
        tokens=first.facts.tokens + second.facts.tokens,
        output_tokens=first.facts.output_tokens + second.facts.output_tokens,
        texts_hash="",
    )
    return Statistics(tensors, first.input_group, facts)


def wanted_rows() -> list[tuple[str, int, float]]:
    """(source, windows, keep), the default first."""
    rows = [(SAMPLED, DEFAULT_WINDOWS, keep) for keep in (0.8, 0.9, 0.6)]
    rows += [(source, count, 0.8) for source in SOURCES for count in WINDOWS]
    return [row for row in rows if row[0] != SAMPLED or row[1] <= max(SAMPLED_WINDOWS)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: multiples of the dense perplexity by source and windows, at each keep."""
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    lines = [f"Dense perplexity {dense:.3f}. Multiples of it:", "", "| source | windows | keep | multiple |"]
    lines.append("| --- | --- | --- | --- |")
    for row in rows:
        if row["method"] != "dense":
            cells = (row["source"], row["calibration_windows"], f"{row['keep']:g}", f"{row['perplexity'] / dense:.3f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the rows that are missing."""
    parser = command_line(__doc__, RESULTS)
    parser.add_argument("--sources", nargs="*", default=list(SOURCES))
    parser.add_argument("--windows", nargs="*", type=int, default=[*WINDOWS, DEFAULT_WINDOWS])
    parser.add_argument("--keep", nargs="*", type=float, default=[0.9, 0.8, 0.6])
    options = parser.parse_args()
    rows = kept_rows(options.out)
    if options.table:
        print(table(rows))
        return
    shared = shared_or_exit()
    bench = CurveBench(get_smollm2(options.models), shared)
    done = {tuple(row.get(key) for key in KEY) for row in rows}
    for source, count, keep in wanted_rows():
        wanted = source in options.sources and count in options.windows and keep in options.keep
        if not wanted or (source, count, keep) in done:
            continue
        row = Row(f"{source}@{count}", "kfac", "pivot", "global", keep)
        found = bench.measure(row) | {"calibration": source, "source": source, "calibration_windows": count}
        seconds = {
            "sampling_seconds": bench.seconds if source == SAMPLED else None,
            "statistics_cpu_seconds": bench.statistics_seconds,
        }
        rows.append(keep_row(options.out, found | seconds))
        print(f"{replace(row, calibration=source)} {count}: {rows[-1]['perplexity']:.3f}", file=sys.stderr)
    if not any(row["method"] == "dense" for row in rows):
        rows.append(keep_row(options.out, bench.dense()))
    print(table(rows))


if __name__ == "__main__":
    main()
