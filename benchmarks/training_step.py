# SPDX-License-Identifier: Apache-2.0
"""A training step (forward and backward) of a factored layer against two plain Linears of the same rank, and dense.

Shapes of SmolLM2-135M and larger; ranks of keep 0.7 in layout `pair`. All variants take turns, one step each; time is
the median of the turns with the 20th and 80th percentile. Peak memory is what torch's own allocator handed out during
one step, at its highest, as its profiler saw it, less what was there before: activations, gradients, workspace.

    python benchmarks/training_step.py --out benchmarks/results/training_step.jsonl      # some 3 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from eigenprune.layers import LowRankLinear

KEEP = 0.7
SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))  # (out, in)
TOKENS = (64, 512, 2048)
DTYPES = (torch.float32, torch.bfloat16)
SECONDS = 1.5  # of turns, for each row


def variants(out: int, into: int, dtype: torch.dtype) -> tuple[int, dict[str, nn.Module]]:
    """The rank, and the layers by name."""
    rank = int(KEEP * out * into / (out + into)) // 8 * 8
    torch.manual_seed(0)
    pivot = LowRankLinear(into, out, rank, layout="pivot", bias=False, dtype=dtype)
    pivot.pivots = torch.randperm(out)[:rank].sort().values.int()
    plain = nn.Sequential(nn.Linear(into, rank, bias=False, dtype=dtype), nn.Linear(rank, out, bias=False, dtype=dtype))
    return rank, {
        "two Linears": plain,
        "pair": LowRankLinear(into, out, rank, bias=False, dtype=dtype),
        "pivot": pivot,
        "dense": nn.Linear(into, out, bias=False, dtype=dtype),
    }


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """One step, with gradients of input and weights."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).backward(gradient)


def peak_bytes(layer: nn.Module, x: Tensor, gradient: Tensor) -> int:
    """The most that one step holds at once, above what was there."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(x).backward(gradient)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each variant."""
    rank, layers = variants(*shape, dtype)
    x = torch.randn(tokens, shape[1], dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, shape[0], dtype=dtype)
    for layer in layers.values():
        step(layer, x, gradient)
    times: dict[str, list[float]] = {name: [] for name in layers}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["dense"]) < 5:
        for name, layer in layers.items():
            start = time.perf_counter()
            step(layer, x, gradient)
            times[name].append(time.perf_counter() - start)
    rows = []
    for name, layer in layers.items():
        low, middle, high = torch.tensor(times[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        rows.append(
            {
                "layer": name,
                "out": shape[0],
                "in": shape[1],
                "rank": shape[1] if name == "dense" else rank,
                "tokens": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "turns": len(times[name]),
                "seconds": [low, middle, high],
                "peak_bytes": peak_bytes(layer, x, gradient),
                "parameters": sum(parameter.numel() for parameter in layer.parameters()),
            }
        )
    return rows


def main() -> None:
    """All shapes, and a table against two Linears."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of torch; default: its own")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("out x in, rank, tokens, dtype: time and peak memory over those of two Linears (pair, pivot, dense)")
    for shape in SHAPES:
        for tokens in TOKENS:
            for dtype in DTYPES:
                rows = measure(shape, tokens, dtype)
                plain, *others = rows
                ratios = "   ".join(
                    f"{row['seconds'][1] / plain['seconds'][1]:.2f}, {row['peak_bytes'] / plain['peak_bytes']:.2f}"
                    for row in others
                )
                print(
                    f"{shape[0]:5} x {shape[1]:4} {plain['rank']:4} {tokens:5} {plain['dtype']:9} {ratios}", flush=True
                )
                if options.out:
                    with options.out.open("a", encoding="utf-8") as out:
                        out.writelines(json.dumps(row | environment()) + "\n" for row in rows)


if __name__ == "__main__":
    main()
