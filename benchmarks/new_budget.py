# SPDX-License-Identifier: Apache-2.0
"""How long another budget takes where the statistics of SmolLM2-135M-Instruct are in the cache: seconds by stage.

Protocol. The calibration windows of quality.py. Statistics and components are made first, where they are not in the
cache yet, by pruning once; this run is kept too. Then for every other keep a fresh model is loaded and pruned, and the
whole of `prune_` is timed.

    python benchmarks/new_budget.py
    python benchmarks/new_budget.py --method kfac-channels --layouts pivot
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from environment import ROOT, environment, shared_folder
from get_smollm2 import get_smollm2
from quality import Bench
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, prune_
from eigenprune.calibrate import default_cache_dir

KEEP = (0.8, 0.9, 0.6)  # the first makes what is not there yet
RESULTS = ROOT / "benchmarks" / "results" / "new_budget.jsonl"


def main() -> None:
    """Prune at every keep, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="*", type=float, default=list(KEEP))
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--layouts", nargs="*", default=["pivot", "pair"])
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the model is kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shared = shared_folder()
    if shared is None:
        sys.exit("new_budget.py needs the texts of the shared folder: set EIGENPRUNE_SHARED")
    folder = get_smollm2(options.models)
    windows = Bench(folder, shared).calibration_windows("wikitext2")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as out:
        for layout in options.layouts:
            for keep in options.keep:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                had = len(list(default_cache_dir().glob("components-*/*.safetensors")))
                began = time.perf_counter()
                config = EigenpruneConfig(keep=keep, layout=layout, method=options.method)
                report = prune_(model, config, windows=windows, restore_on_error=False, progress=False)
                row = {
                    "method": options.method,  # rows without this: kfac
                    "layout": layout,
                    "keep": keep,
                    "total_seconds": time.perf_counter() - began,
                    "components_in_cache_before": had,
                    "seconds": report.seconds,
                    "allocation_gap": report.settings.get("allocation_gap"),
                    "kept": report.keep,
                }
                out.write(json.dumps(row | environment()) + "\n")
                out.flush()
                print({key: value for key, value in row.items() if key != "kept"}, file=sys.stderr)


if __name__ == "__main__":
    main()
