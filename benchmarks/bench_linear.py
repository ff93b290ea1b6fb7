# SPDX-License-Identifier: Apache-2.0
"""Factored linears beside dense ones on CPU: every shape x keep x layout x batch x dtype in one run.

First the machine itself: how fast it multiplies (`F.linear`, 2048^3) and reads memory. Then for every shape, in turns
within one loop: dense `F.linear`, two `F.linear` calls (layout pivot: with concatenation and reordering, as plain torch
must), and the operator. Up to 16 rows every call takes other weights, from a pool four times as large as the last-level
cache, as decoding does. A ratio is taken per turn; rows hold the median and the 20th and 80th percentile.

`limit`: dense parameters / kept parameters, the most that reading less, or multiplying less, can bring by itself.

    python benchmarks/bench_linear.py                       # all 560 rows, about 8 minutes on 2 idle cores
    python benchmarks/bench_linear.py --shapes 576x576 --keep 0.8 --batch 1
    python benchmarks/bench_linear.py --table               # sum up the rows kept so far
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import ROOT, environment
from torch import Tensor, nn

from eigenprune.layers import LowRankLinear, factored_parameters
from eigenprune.ops import extension_status, low_rank_linear, pivot_linear, pivot_linear_reference

SHAPES = ((576, 576), (1536, 576), (2048, 2048), (8192, 2048), (4096, 4096), (11008, 4096), (1024, 4096))
KEEP = (0.9, 0.8, 0.6, 0.4)
BATCH = (1, 4, 16, 64, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = ("pair", "pivot")
LEAST_POOL_BYTES = 256 << 20
MEMORY_BOUND_ROWS = 16
RESULTS = ROOT / "benchmarks" / "results" / "linear.jsonl"


def pool_bytes() -> int:
    """Four last-level caches: half of the pool goes by between two reads of a dense weight, or it would come from the
    cache, where the dense one, which every variant is compared with, is found more often than theirs."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="utf-8")
        cache = int(text.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        cache = 0
    return max(LEAST_POOL_BYTES, 4 * cache)


class Pool:
    """Random numbers from which weights are cut one after the other, so that each comes from memory, not a cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        count = pool_bytes() // dtype.itemsize
        self.numbers = torch.empty(count, dtype=dtype)
        for part in self.numbers.split(1 << 24):
            part.copy_(torch.randn(part.numel(), dtype=torch.float32) / 32)
        self._next = 0

    def matrix(self, rows: int, columns: int) -> Tensor:
        size = rows * columns
        if self._next + size > self.numbers.numel():
            self._next = 0
        start, self._next = self._next, self._next + size
        return self.numbers[start : start + size].view(rows, columns)


def rank_for(out: int, features: int, keep: float, layout: str) -> int:
    """The largest multiple of 8 whose factors take no more than `keep` of the dense parameters."""
    ranks = range(8, min(out, features) + 1, 8)
    return max(r for r in ranks if factored_parameters(r, out, features, layout) <= keep * out * features)


def plain_pivot(x: Tensor, right: Tensor, left: Tensor, pivots: Tensor) -> Tensor:
    """Layout pivot in torch's own operations."""
    return pivot_linear_reference(x, right, left, pivots)


def two_calls(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """Layout pair in torch's own operations."""
    return F.linear(F.linear(x, right), left)


Call = Callable[[], Any]


def factored_calls(
    pool: Pool, x: Tensor, out: int, rank: int, layout: str, copies: int
) -> tuple[list[Call], list[Call]]:
    """What is compared for one variant: plain torch and the operator, one call for each set of weights."""
    features = x.shape[-1]
    plain: list[Call] = []
    ours: list[Call] = []
    for _ in range(copies):
        right = pool.matrix(rank, features)
        if layout == "pair":
            left = pool.matrix(out, rank)
            plain.append(lambda right=right, left=left: two_calls(x, right, left))
            ours.append(lambda right=right, left=left: low_rank_linear(x, right, left))
        else:
            left = pool.matrix(out - rank, rank)
            pivots = torch.randperm(out)[:rank].sort().values.int()
            plain.append(lambda right=right, left=left, pivots=pivots: plain_pivot(x, right, left, pivots))
            ours.append(lambda right=right, left=left, pivots=pivots: pivot_linear(x, right, left, pivots))
    return plain, ours


def seconds(calls: list[Call]) -> float:
    """Mean time of one call."""
    began = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began) / len(calls)


def measure_shape(
    pool: Pool, dtype: str, shape: tuple[int, int], batch: int, keeps: list[float], turns: int
) -> Iterator[dict[str, Any]]:
    """Rows for all keeps and layouts of one shape, all measured in turns with the dense layer."""
    out, features = shape
    x = torch.randn(batch, features).to(DTYPES[dtype])
    dense_bytes = out * features * x.element_size()
    copies = max(2, pool_bytes() // 2 // dense_bytes) if batch <= MEMORY_BOUND_ROWS else 2
    weights = [pool.matrix(out, features) for _ in range(copies)]
    dense: list[Call] = [lambda weight=weight: F.linear(x, weight) for weight in weights]
    variants = [(keep, layout, rank_for(out, features, keep, layout)) for keep in keeps for layout in LAYOUTS]
    calls = [factored_calls(pool, x, out, rank, layout, copies) for _, layout, rank in variants]
    taken: list[tuple[list[float], list[float], list[float]]] = [([], [], []) for _ in variants]
    for turn in range(turns + 1):
        for (plain, ours), times in zip(calls, taken, strict=True):
            sample = seconds(dense), seconds(plain), seconds(ours)
            if turn:  # the first is the warm-up
                for series, value in zip(times, sample, strict=True):
                    series.append(value)
    for (keep, layout, rank), (base, plain_times, our_times) in zip(variants, taken, strict=True):
        kept = factored_parameters(rank, out, features, layout)
        yield {
            "kind": "shape", "dtype": dtype, "out": out, "in": features, "batch": batch, "keep": keep,
            "layout": layout, "rank": rank, "limit": out * features / kept,
            "dense_us": statistics.median(base) * 1e6,
            "dense_gb_s": dense_bytes / statistics.median(base) / 1e9,
            "dense_gflop_s": 2 * batch * out * features / statistics.median(base) / 1e9,
            "gb_s": kept * x.element_size() / statistics.median(our_times) / 1e9,
            "gflop_s": 2 * batch * kept / statistics.median(our_times) / 1e9,
            **ratios("vs_dense", base, our_times),
            **ratios("vs_two_calls", plain_times, our_times),
            "turns": turns,
        }  # fmt: skip


def ratios(name: str, base: list[float], ours: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the ratio per turn."""
    found = sorted(b / o for b, o in zip(base, ours, strict=True))
    low, high = math.floor(0.2 * (len(found) - 1)), math.ceil(0.8 * (len(found) - 1))
    return {name: statistics.median(found), f"{name}_p20": found[low], f"{name}_p80": found[high]}


def machine_rates() -> dict[str, Any]:
    """The floor: products per second and bytes per second of this machine now."""
    rates: dict[str, Any] = {"kind": "machine"}
    for name, dtype in DTYPES.items():
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        best = min(seconds([lambda a=a, b=b: F.linear(a, b)]) for _ in range(5))
        rates[f"{name}_gflop_s"] = 2 * 2048**3 / best / 1e9
    numbers = torch.ones(pool_bytes() // 4)
    rates["pool_bytes"] = pool_bytes()
    rates["read_gb_s"] = pool_bytes() / min(seconds([numbers.sum]) for _ in range(7)) / 1e9
    return rates


def call_overhead() -> Iterator[dict[str, Any]]:
    """Microseconds of a call that computes next to nothing: what Python and the dispatcher take."""
    x = torch.randn(1, 1, 16)
    modules: dict[str, nn.Module] = {"nn.Linear": nn.Linear(16, 16, bias=False)}
    modules |= {f"LowRankLinear {lay}": LowRankLinear(16, 16, 8, layout=lay, bias=False) for lay in LAYOUTS}
    for name, module in modules.items():
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                times = [seconds([lambda module=module: module(x)] * 1000) for _ in range(9)]
            yield {"kind": "overhead", "what": name, "mode": mode.__name__, "us": min(times) * 1e6}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ratios to dense over all shapes, by dtype, batch and keep, and every case below 1.0."""
    lines = [
        "| dtype | rows | keep | limit | vs dense: least, median | vs two calls: least, median |",
        "| --- " * 6 + "|",
    ]
    shapes = [row for row in rows if row["kind"] == "shape"]
    for dtype in DTYPES:
        for batch in BATCH:
            for keep in KEEP:
                some = [r for r in shapes if (r["dtype"], r["batch"], r["keep"]) == (dtype, batch, keep)]
                if not some:
                    continue
                dense, two = ([row[key] for row in some] for key in ("vs_dense", "vs_two_calls"))
                lines.append(
                    f"| {dtype} | {batch} | {keep} | {1 / keep:.2f} | {min(dense):.2f}, {statistics.median(dense):.2f} "
                    f"| {min(two):.2f}, {statistics.median(two):.2f} |"
                )
    slower = [r for r in shapes if r["vs_dense"] < 1]
    lines += ["", f"Below 1.0 of dense: {len(slower)} of {len(shapes)} rows."]
    lines += [
        f"- {r['dtype']} {r['out']}x{r['in']} keep {r['keep']} {r['layout']} {r['batch']} rows: "
        f"{r['vs_dense']:.3f} [{r['vs_dense_p20']:.3f}, {r['vs_dense_p80']:.3f}]"
        for r in slower
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=[f"{out}x{features}" for out, features in SHAPES])
    parser.add_argument("--keep", nargs="*", type=float, default=list(KEEP))
    parser.add_argument("--batch", nargs="*", type=int, default=list(BATCH))
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL; one run replaces the one before")
    parser.add_argument("--table", action="store_true", help="print the rows kept so far, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]))
        return
    status = extension_status()
    if not status.loaded:
        sys.exit(f"bench_linear.py measures the compiled operators, but {status.reason}")
    facts = environment() | {"kernels": status.build.get("cpu_kernels")}
    rows: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file, torch.inference_mode():

        def keep_row(row: dict[str, Any]) -> None:
            rows.append(row)
            file.write(json.dumps(row | facts) + "\n")
            file.flush()

        keep_row(machine_rates())
        for row in call_overhead():
            keep_row(row)
        for dtype in options.dtypes:
            pool = Pool(DTYPES[dtype])
            for shape in (tuple(int(side) for side in text.split("x")) for text in options.shapes):
                for batch in options.batch:
                    turns = options.turns if batch <= 64 else max(3, options.turns // 2)
                    for row in measure_shape(pool, dtype, shape, batch, options.keep, turns):
                        keep_row(row)
                    print(f"{dtype} {shape[0]}x{shape[1]} {batch} rows", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
