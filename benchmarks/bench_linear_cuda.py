# SPDX-License-Identifier: Apache-2.0
"""Factored linears on a GPU against dense `F.linear` and against two `F.linear` calls.

Every contender is captured into a CUDA graph that walks through copies of its weights, more than the second-level
cache holds, so that they come from memory and no launch is timed from Python. The contenders take turns; a row
holds the median time of one call with its 20th and 80th percentile, and ratios taken turn by turn. `limit` is what
reading fewer bytes can give: dense bytes / kept bytes.

    python benchmarks/bench_linear_cuda.py --out benchmarks/results/linear_cuda.jsonl

At the end it prints, for each dtype, what `kDecodeRules` in csrc/cuda/decode_route.h should say.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment
from torch import Tensor

from eigenprune.ops import extension_status

SHAPES = ((576, 576), (1536, 576), (2048, 2048), (8192, 2048), (4096, 4096), (11008, 4096), (1024, 4096))  # (out, in)
KEEPS = (0.9, 0.8, 0.6, 0.4)
LAYOUTS = ("pair", "pivot")
BATCHES = (1, 4, 16, 64, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RULE_NAMES = {"float32": "Float", "bfloat16": "BFloat16", "float16": "Half"}
DECODE_MOST_ROWS = 16
MOST_COPIES = 1024

Call = Callable[[], Any]


def rank_for(keep: float, out: int, features: int, layout: str, multiple: int = 8) -> int:
    """The largest rank, a multiple of 8, whose factors hold at most `keep` of the parameters."""
    both, target = out + features, keep * out * features
    rank = target / both if layout == "pair" else (both - math.sqrt(both * both - 4 * target)) / 2
    return max(multiple, int(rank) // multiple * multiple)


def kept_parameters(rank: int, out: int, features: int, layout: str) -> int:
    return rank * (out + features - (rank if layout == "pivot" else 0))


def refusal() -> str | None:
    """Why there is nothing to measure here, or None."""
    if not torch.cuda.is_available():
        return "bench_linear_cuda: torch sees no CUDA device here; run it on a machine with an NVIDIA GPU."
    status = extension_status()
    if not status.build.get("cuda_architectures"):
        return (
            f"bench_linear_cuda: the extension has no CUDA kernels ({status.reason}) Build it with "
            "EIGENPRUNE_BUILD=cuda pip install --no-build-isolation --no-deps -e ."
        )
    return None


def contenders(x: Tensor, out: int, rank: int, layout: str, copies: int) -> dict[str, Callable[[int], Tensor]]:
    """Three functions of the copy's number: dense, two (F.linear calls, no scatter for pivot) and ours."""
    features, options = x.shape[1], {"device": x.device, "dtype": x.dtype}
    left_rows = out if layout == "pair" else out - rank
    dense = [torch.randn(out, features, **options) for _ in range(copies)]
    right = [torch.randn(rank, features, **options) for _ in range(copies)]
    left = [torch.randn(left_rows, rank, **options) for _ in range(copies)]
    ops = torch.ops.eigenprune
    if layout == "pair":

        def ours(i: int) -> Tensor:
            return ops.low_rank_linear(x, right[i], left[i], None)
    else:
        pivots = [torch.randperm(out, device=x.device)[:rank].to(torch.int32) for _ in range(copies)]

        def ours(i: int) -> Tensor:
            return ops.pivot_linear(x, right[i], left[i], pivots[i], None)

    return {
        "dense": lambda i: F.linear(x, dense[i]),
        "two": lambda i: F.linear(F.linear(x, right[i]), left[i]),
        "ours": ours,
    }


def captured(function: Callable[[int], Tensor], copies: int) -> Call:
    """Replays one call for each copy of the weights."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries load and choose their kernels outside the capture
        for _ in range(3):
            function(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            function(i)
    return graph.replay


def take_turns(calls: Mapping[str, Call], turns: int, divide: int) -> dict[str, list[float]]:
    """Microseconds of one call, `turns` samples for each; every turn times all of them."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 2:  # two for warmth
                samples[name].append(1000 * start.elapsed_time(end) / divide)
    return samples


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    ordered = sorted(values)
    cuts = statistics.quantiles(ordered, n=5, method="inclusive")
    return {"median": round(statistics.median(ordered), 4), "p20": round(cuts[0], 4), "p80": round(cuts[3], 4)}


def summarise(samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """Times, and how many times faster than each rival ours is, turn by turn."""
    row: dict[str, Any] = {f"{name}_us": spread(values) for name, values in samples.items()}
    for rival in ("dense", "two"):
        ratios = [other / own for other, own in zip(samples[rival], samples["ours"], strict=True)]
        row[f"against_{rival}"] = spread(ratios)
    return row


def rules(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """For each dtype the most rows up to which ours loses to two calls on no shape that was measured; 0 for never."""
    worst: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["batch"] <= DECODE_MOST_ROWS:
            batches = worst.setdefault(row["dtype"], {})
            batches[row["batch"]] = min(batches.get(row["batch"], math.inf), row["against_two"]["median"])
    found = {}
    for dtype, batches in worst.items():
        losing = [batch for batch, ratio in batches.items() if ratio < 1.0]
        winning = [batch for batch in batches if not losing or batch < min(losing)]
        found[dtype] = max(winning, default=0)
    return found


def machine() -> dict[str, object]:
    """The GPU, and what it reaches: bandwidth of a copy of 1 GiB, and the rate of a square product for each dtype."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    for name, dtype in DTYPES.items():
        square = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        calls[name] = lambda square=square: F.linear(square, square)
    times = {name: statistics.median(values) for name, values in take_turns(calls, 7, 1).items()}
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": round(2 * (1 << 30) / times["copy"] / 1e3),
        "product_tflops": {name: round(2 * 8192**3 / times[name] / 1e6, 1) for name in DTYPES},
    }


def measure(out: int, features: int, keep: float, layout: str, batch: int, dtype: str, turns: int) -> dict[str, Any]:
    """One row: the three contenders on one shape."""
    rank = rank_for(keep, out, features, layout)
    kept, size = kept_parameters(rank, out, features, layout), DTYPES[dtype].itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = min(MOST_COPIES, 2 + 2 * cache // (min(kept, out * features) * size))
    x = torch.randn(batch, features, device="cuda", dtype=DTYPES[dtype])
    functions = contenders(x, out, rank, layout, copies)
    samples = take_turns({name: captured(function, copies) for name, function in functions.items()}, turns, copies)
    row = {"out": out, "in": features, "keep": keep, "layout": layout, "rank": rank, "batch": batch, "dtype": dtype}
    return row | {"copies": copies, "limit": round(out * features / kept, 4)} | summarise(samples)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--turns", type=int, default=15, help="samples of each contender (default: 15)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure, print the rule."""
    options = parse()
    os.environ["EIGENPRUNE_CUDA_DECODE"] = "1"  # read at the first call on a GPU
    reason = refusal()
    if reason is not None:
        raise SystemExit(reason)
    facts = environment() | machine()
    print(json.dumps(facts, indent=2))
    rows: list[dict[str, Any]] = []
    cases = [(o, i, k, p) for o, i in SHAPES for k in options.keeps for p in LAYOUTS]
    for dtype in options.dtypes:
        for batch in options.batches:
            for out, features, keep, layout in cases:
                row = measure(out, features, keep, layout, batch, dtype, options.turns)
                rows.append(row)
                print(f"{dtype:9} batch {batch:3} {out:5} x {features:4} keep {keep} {layout:5}: "
                      f"{row['ours_us']['median']:8.2f} us, {row['against_dense']['median']:.2f}x dense "
                      f"(limit {row['limit']:.2f}), {row['against_two']['median']:.2f}x two calls")  # fmt: skip
                if options.out:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row | facts) + "\n")
    print("\nkDecodeRules in csrc/cuda/decode_route.h, from these rows:")
    for dtype, most in rules(rows).items():
        print(f"    {{ScalarType::{RULE_NAMES[dtype]}, {most}}},")


if __name__ == "__main__":
    main()
