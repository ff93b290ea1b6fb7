# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a pruned model beside its dense original: decoding and prefill, in turns within one run.

eigenprune prune MODEL --out pruned --keep 0.8
python benchmarks/bench_model.py pruned                       # SmolLM2-135M-Instruct as the dense one
python benchmarks/bench_model.py pruned --dense MODEL --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment
from get_smollm2 import get_smollm2
from transformers import AutoModelForCausalLM
from transformers.utils.logging import set_verbosity_error

from eigenprune.evaluate import Speed, compare_decode, compare_prefill, speed_ratio
from eigenprune.ops import extension_status

RESULTS = ROOT / "benchmarks" / "results" / "model_speed.jsonl"


def rows_for(dense: Path, pruned: Path, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both models side by side in one dtype."""
    folders = {"dense": dense, "pruned": pruned}
    models = {name: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for name, folder in folders.items()}
    kept = models["pruned"].num_parameters() / models["dense"].num_parameters()
    prompt = torch.randint(100, 1000, (options.prompt,), generator=torch.Generator().manual_seed(0))
    measured = {
        "decode": compare_decode(models, prompt, new_tokens=options.new_tokens, repeats=options.repeats),
        "prefill": compare_prefill(models, options.prefill, repeats=options.repeats),
    }
    return [row(what, speeds, dtype, kept) for what, speeds in measured.items()]


def row(what: str, speeds: dict[str, Speed], dtype: str, kept: float) -> dict[str, Any]:
    """One comparison: medians of both, and the ratio per turn."""
    ratio, low, high = speed_ratio(speeds["pruned"], speeds["dense"])
    return {
        "what": what,
        "dtype": dtype,
        "tokens": speeds["dense"].tokens,
        "whole_model_kept": kept,
        "dense_tokens_s": speeds["dense"].tokens_per_second,
        "pruned_tokens_s": speeds["pruned"].tokens_per_second,
        "ratio": ratio,
        "ratio_p20": low,
        "ratio_p80": high,
        "dense_samples": speeds["dense"].samples,
        "pruned_samples": speeds["pruned"].samples,
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path, help="folder of the pruned model")
    parser.add_argument("--dense", type=Path, help="folder of the dense model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=32, help="tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where SmolLM2 is kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    set_verbosity_error()
    dense = options.dense or get_smollm2(options.models)
    facts = environment() | {"kernels": extension_status().build.get("cpu_kernels")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        for dtype in options.dtypes:
            for found in rows_for(dense, options.pruned, dtype, options):
                file.write(json.dumps(found | facts) + "\n")
                print(
                    f"{dtype} {found['what']}: dense {found['dense_tokens_s']:.1f}, pruned "
                    f"{found['pruned_tokens_s']:.1f} tokens/s, ratio {found['ratio']:.3f} "
                    f"({found['ratio_p20']:.3f} to {found['ratio_p80']:.3f})"
                )


if __name__ == "__main__":
    main()
