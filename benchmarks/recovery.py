# SPDX-License-Identifier: Apache-2.0
"""What recovery without labels gets back: pruned SmolLM2-135M-Instruct before and after, in the protocol of quality.py.

Pruned by `--pruning` on the first 64 windows of WikiText-2 `train_samples`; recovered on the first `--windows`
of them (one in 16 held out for the divergence); perplexity on the 24 windows of quality.py, float32. All of it is kept
in a work folder on the way: the same command goes on after an interrupt.

    python benchmarks/recovery.py --keep 0.8 --method distil --windows 192 --rate 4e-5
    python benchmarks/recovery.py --keep 0.6 --pruning kfac-channels --rate 1.5e-4
    python benchmarks/recovery.py --table              # print the rows kept so far as a Markdown table
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from get_smollm2 import get_smollm2
from quality import CALIBRATION_WINDOWS, EVALUATION_WINDOWS, WINDOW
from result_rows import RESULTS_FOLDER, command_line, keep_row, kept_rows, shared_or_exit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenprune import EigenpruneConfig, perplexity, prune_, save_model
from eigenprune.calibrate import cut_windows, default_cache_dir, read_texts, token_ids
from eigenprune.evaluate import spaced_windows
from eigenprune.recover import RECOVERIES, recover_, teacher_targets

RESULTS = RESULTS_FOLDER / "recovery.jsonl"


class Work:
    """Models and measurements kept in a folder."""

    def __init__(self, folder: Path, models: Path, shared: Path) -> None:
        self.folder, self.base = folder, get_smollm2(models)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.rows = read_texts([shared / "data/wikitext2/train_samples.jsonl.gz"])
        text = read_texts([shared / "data/wikitext2/test_raw.txt.gz"])[0]
        self.evaluation = spaced_windows(torch.tensor(token_ids(self.tokenizer, text)), WINDOW, EVALUATION_WINDOWS)
        folder.mkdir(parents=True, exist_ok=True)

    def windows(self, count: int) -> Tensor:
        """The first tokens of the first `count` rows, [count, 1024]."""
        return cut_windows(self.tokenizer, self.rows[:count], count=count, window=WINDOW)

    def dense(self) -> Any:
        """The dense model, float32."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def pruned(self, keep: float, pruning: str) -> Any:
        """The model pruned by the method `pruning`, float32, made once."""
        folder = self.folder / f"{pruning}-{keep:g}"
        if not folder.exists():
            model = self.dense()
            config = EigenpruneConfig(keep=keep, method=pruning)
            prune_(model, config, windows=self.windows(CALIBRATION_WINDOWS))
            save_model(model, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def measured(self, name: str, model: Any) -> dict[str, Any]:
        """Perplexity of `model`, kept under `name`."""
        path = self.folder / f"perplexity-{name}.json"
        if not path.exists():
            path.write_text(json.dumps(perplexity(model, self.evaluation).to_dict()), encoding="utf-8")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def measure(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    windows = work.windows(options.windows)
    method = RECOVERIES[options.method]
    cache = work.folder / "recovery"
    dense: Any = work.dense() if method.blockwise else teacher_targets(work.dense(), windows, cache_dir=cache)
    model = work.pruned(options.keep, options.pruning)
    before = work.measured(f"{options.pruning}-{options.keep:g}", model)
    course = method.course
    if course is not None:
        course = replace(
            course,
            rate=options.rate or course.rate,
            passes=options.passes or course.passes,
            batch=options.batch or course.batch,
        )
    report = recover_(model, dense, windows, method=options.method, course=course, checkpoint_dir=cache)
    after = perplexity(model, work.evaluation).to_dict()
    if options.save:
        save_model(model, options.save, tokenizer=work.tokenizer)
    return {
        "keep": options.keep,
        "pruning": options.pruning,  # rows without this: kfac
        "windows": options.windows,
        "dense": work.measured("dense", work.dense())["perplexity"],
        "before": before["perplexity"],
        "after": after["perplexity"],
        "token_hash": after["token_hash"],
        "optimizer": "Muon",  # of matrices; rows without this are AdamW's
        **{f"recovery_{key}": value for key, value in report.to_dict().items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: multiples of the dense perplexity before and after."""
    lines = [
        "| keep | pruned by | recovery | optimizer | tokens read | rate | minutes | divergence | perplexity / dense |",
        "| --- " * 9 + "|",
    ]
    for row in sorted(rows, key=lambda row: (-row["keep"], row["after"])):
        lines.append(
            f"| {row['keep']:g} | {row.get('pruning', 'kfac')} | {row['recovery_method']} "
            f"| {row.get('optimizer', 'AdamW')} "
            f"| {row['recovery_tokens']:,} | {row['recovery_settings'].get('rate', '')} "
            f"| {row['recovery_seconds'] / 60:.1f} "
            f"| {row['recovery_before']:.4f} -> {row['recovery_after']:.4f} "
            f"| {row['before'] / row['dense']:.3f} -> {row['after'] / row['dense']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure one row, or print all."""
    parser = command_line(__doc__, RESULTS)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--pruning", default="kfac", help="the method by which it was pruned")
    parser.add_argument("--method", choices=sorted(RECOVERIES), default="distil")
    parser.add_argument("--windows", type=int, default=192, help="of 1024 tokens")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--passes", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--save", type=Path, help="folder for the recovered model")
    parser.add_argument("--work", type=Path, default=default_cache_dir() / "recovery-benchmark")
    options = parser.parse_args()
    if not options.table:
        shared = shared_or_exit()
        keep_row(options.out, measure(Work(options.work, options.models, shared), options))
    print(table(kept_rows(options.out)))


if __name__ == "__main__":
    main()
