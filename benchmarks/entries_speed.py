# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of selecting the entries of a 110M model, rule by rule.

The tensors have the names and shapes of BERT-base (109.5 M parameters, float32), with **random values**: a pair of
normal weights and small changes. Each rule runs in a process of its own. `select_seconds` is for all tensors; `peak_mb`
is what the selection adds to the resident memory beside both models, looked at every 5 ms.

    OMP_NUM_THREADS=2 python benchmarks/entries_speed.py --out benchmarks/results/entries_speed.jsonl   # a minute
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from environment import environment
from torch import Tensor

from eigenprune.entries import select_entries

RULES = (
    ("ken-fast", "row"),
    ("random", "row"),
    ("magnitude", "row"),
    ("delta", "row"),
    ("delta", "global"),
    ("sap", "global"),
)
KEEP = 0.75
WIDTH, INNER, LAYERS, VOCABULARY, POSITIONS = 768, 3072, 12, 30522, 512


def shapes() -> dict[str, tuple[int, ...]]:
    """{name: shape} of a BERT-base with its pooler."""
    found: dict[str, tuple[int, ...]] = {}
    for name, rows in (("word", VOCABULARY), ("position", POSITIONS), ("token_type", 2)):
        found[f"embeddings.{name}_embeddings.weight"] = (rows, WIDTH)
    norms = ["embeddings.LayerNorm"]
    linears = {}
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linears[f"{layer}.attention.self.{part}"] = (WIDTH, WIDTH)
        linears[f"{layer}.attention.output.dense"] = (WIDTH, WIDTH)
        linears[f"{layer}.intermediate.dense"] = (INNER, WIDTH)
        linears[f"{layer}.output.dense"] = (WIDTH, INNER)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    linears["dense_at_the_end"] = (WIDTH, WIDTH)
    for name in norms:
        found |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def resident() -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


class Peak(threading.Thread):
    """The most resident memory until told to end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = resident(), threading.Event()

    def run(self) -> None:
        """Look every 5 ms."""
        while not self.ended.wait(0.005):
            self.most = max(self.most, resident())


def measure(rule: str, scope: str) -> dict[str, object]:
    """One row, in this process."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.04 * torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    tuned: dict[str, Tensor] = {n: w + 0.002 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    small = {"a": torch.randn(64, 300, generator=generator)}
    select_entries({"a": small["a"] + 1}, small, rule, KEEP, scope=scope)  # what is loaded once
    before, peak = resident(), Peak()
    peak.start()
    start, cpu = time.perf_counter(), time.process_time()
    masks = select_entries(base, tuned, rule, KEEP, scope=scope)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak.ended.set()
    peak.join()
    entries = sum(tensor.numel() for tensor in tuned.values())
    models = 2 * 4 * entries
    row = {"rule": rule, "scope": scope, "keep": KEEP, "entries": entries, "tensors": len(tuned)}
    row |= {"kept": sum(masks.kept(name) for name in masks) / entries}
    row |= {"select_seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
    row |= {"models_mb": round(models / 1e6, 1), "peak_mb": round((peak.most - before) / 1e6, 1)}
    row["over_both_models"] = round((peak.most - before) / models, 4)
    return row | environment()


def main() -> None:
    """Each rule in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="rows are added to this file")
    parser.add_argument("--one", nargs=2, metavar=("RULE", "SCOPE"), help="only this, as JSON, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    for rule, scope in RULES:
        command = [sys.executable, __file__, "--one", rule, scope]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = json.loads(line)
        print(f"{rule}, {scope}: {row['select_seconds']} s ({row['cpu_seconds']} s of CPU), "
              f"{row['peak_mb']} MB beside {row['models_mb']} MB", flush=True)  # fmt: skip
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line)


if __name__ == "__main__":
    main()
