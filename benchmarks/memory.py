# SPDX-License-Identifier: Apache-2.0
"""Peak memory of pruning SmolLM2-135M-Instruct while loading it, against the bound.

Bound: the dense model, four times its largest matrix, and the statistics (full float32 Grams). The statistics do not
depend on the number of windows, so two windows of 1024 tokens show the peak.

    python benchmarks/memory.py --out benchmarks/results/memory.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment
from get_smollm2 import get_smollm2
from transformers import AutoModelForCausalLM

from eigenprune.calibrate.inputs import shared_inputs
from eigenprune.layers import select_layers

WINDOWS, WINDOW = 2, 1024


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the dense model, its largest matrix and its statistics."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = select_layers(model).chosen
    groups = shared_inputs(model, torch.zeros(1, 4, dtype=torch.long), layers)
    inputs = sum(layers[name].weight.shape[1] ** 2 for name in set(groups.values()))
    outputs = sum(module.weight.shape[0] ** 2 for module in layers.values())
    return {
        "dense": sum(4 * parameter.numel() for parameter in model.parameters()),
        "largest": max(4 * parameter.numel() for parameter in model.parameters()),
        "statistics": 4 * (inputs + outputs),
    }


def peak(folder: Path, method: str) -> dict[str, int]:
    """Peaks above the interpreter with everything imported, in a process of its own."""
    command = [sys.executable, "-m", "tests.helpers.peak_memory", str(folder), method, "0.8", str(WINDOWS), str(WINDOW)]
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"EIGENPRUNE_CACHE": cache}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure the default and a data-free method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the model is kept")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    folder = get_smollm2(options.models)
    parts = sizes(folder)
    for method in ("kfac", "svd"):
        statistics = parts["statistics"] if method == "kfac" else 0
        bound = parts["dense"] + 4 * parts["largest"] + statistics
        row: dict[str, Any] = {"method": method, "bound": bound, **parts, **peak(folder, method)}
        print(f"{method}: resident {row['resident'] / 1e6:.0f} MB, anonymous {row['anonymous'] / 1e6:.0f} MB, "
              f"bound {bound / 1e6:.0f} MB")  # fmt: skip
        if options.out:
            with options.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row | environment()) + "\n")


if __name__ == "__main__":
    main()
