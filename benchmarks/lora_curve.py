# SPDX-License-Identifier: Apache-2.0
"""The same LoRA on SmolLM2-135M-Instruct dense and pruned to keep 0.7: loss by step.

Text: GSM8K train (questions with answers) for calibration and training; GSM8K test for the held-out loss, which counts
every token of the first problems. Both models see the same batches in the same order. Writes one row a model, and a
picture of the curves.

    python benchmarks/lora_curve.py --out benchmarks/results/lora_curve.jsonl   # some 15 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment, shared_folder
from get_smollm2 import PROVENANCE, get_smollm2
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
from transformers import TrainingArguments as Arguments

from eigenprune import EigenpruneConfig, prune_

KEEP, RANK, BATCH, LENGTH = 0.7, 8, 2, 128
TARGETS = ["q_proj", "v_proj", "down_proj"]
COLORS = {"dense": "#555555", "pruned": "#c0392b"}


def problems(path: Path) -> list[str]:
    """Questions with their answers."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in raw.decode().splitlines()]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: list[list[int]]) -> float:
    """Nats per token."""
    model.eval()
    total = count = 0.0
    for ids in tokens:
        batch = torch.tensor([ids])
        total += float(model(input_ids=batch, labels=batch).loss) * (len(ids) - 1)
        count += len(ids) - 1
    return total / count


def train(model: Any, tokenizer: Any, texts: list[str], steps: int) -> list[tuple[int, float]]:
    """(step, mean training loss since the row before)."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = Arguments(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-4,
            warmup_steps=10,
            logging_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[tokenizer(text + tokenizer.eos_token, truncation=True, max_length=LENGTH) for text in texts],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
    return [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]


def measure(kind: str, folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """The row of the dense or the pruned model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = problems(data / "train.jsonl")
    tokens = [tokenizer(text)["input_ids"] for text in problems(data / "test.jsonl.gz")[:20]]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row: dict[str, Any] = {"model": kind, "steps": steps, "batch": BATCH, "length": LENGTH, "lora_rank": RANK}
    row |= {"targets": TARGETS, "provenance": PROVENANCE, "held_out_tokens": sum(len(ids) - 1 for ids in tokens)}
    if kind == "pruned":
        report = prune_(model, EigenpruneConfig(keep=KEEP, windows=48, window=256), tokenizer=tokenizer, texts=texts,
                        progress=False)  # fmt: skip
        row |= {"keep": report.keep, "parameters": report.model_parameters, "bytes": report.model_bytes}
    row["held_out_before"] = held_out_loss(model, tokens)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    start = time.perf_counter()
    row["curve"] = train(adapted, tokenizer, texts, steps)
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["held_out_after"] = held_out_loss(adapted, tokens)
    row["held_out_merged"] = held_out_loss(adapted.merge_and_unload(), tokens)
    return row | environment()


def smooth(curve: list[tuple[int, float]], span: int = 10) -> list[tuple[int, float]]:
    """The mean of the last `span` rows, where there are as many."""
    return [
        (curve[i][0], sum(loss for _, loss in curve[i - span + 1 : i + 1]) / span) for i in range(span - 1, len(curve))
    ]


def picture(rows: list[dict[str, Any]], width: int = 560, height: int = 300) -> str:
    """The curves as SVG: each row thin, their running mean thick."""
    last = max(step for row in rows for step, _ in row["curve"])
    losses = [loss for row in rows for _, loss in row["curve"]]
    low, high = min(losses) - 0.05, max(losses) + 0.05
    left, bottom = 46, height - 34

    def at(step: float, loss: float) -> str:
        x = left + (width - left - 12) * step / last
        return f"{x:.1f},{bottom - (bottom - 12) * (loss - low) / (high - low):.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
             'font-size="12"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for i in range(5):
        loss = low + (high - low) * i / 4
        x, y = at(0, loss).split(",")
        parts.append(f'<path d="M{x},{y} H{width - 12}" stroke="#dddddd"/><text x="6" y="{y}">{loss:.2f}</text>')
        step = round(last * i / 4)
        parts.append(f'<text x="{at(step, low).split(",")[0]}" y="{bottom + 16}" text-anchor="middle">{step}</text>')
    for i, row in enumerate(rows):
        color = COLORS[row["model"]]
        for curve, look in (
            (row["curve"], 'stroke-width="1" opacity="0.35"'),
            (smooth(row["curve"]), 'stroke-width="2"'),
        ):
            points = " ".join(at(step, loss) for step, loss in curve)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" {look}/>')
        words = f"{row['model']}: held out {row['held_out_before']:.3f} -> {row['held_out_after']:.3f}"
        parts.append(f'<text x="{width - 240}" y="{26 + 18 * i}" fill="{color}">{words}</text>')
    parts.append(
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">step (loss: nats per token)</text></svg>'
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the model is kept")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write the rows here, and the picture beside them (.svg)")
    options = parser.parse_args()
    shared = shared_folder()
    if shared is None:
        parser.error("no texts: EIGENPRUNE_SHARED names a folder that holds data/gsm8k")
    folder, rows = get_smollm2(options.models), []
    for kind in ("dense", "pruned"):
        row = measure(kind, folder, shared / "data" / "gsm8k", options.steps)
        rows.append(row)
        print(f"{kind}: held out {row['held_out_before']:.4f} -> {row['held_out_after']:.4f} nats per token, merged "
              f"{row['held_out_merged']:.4f}, {row['seconds']:.0f} s", flush=True)  # fmt: skip
        if options.out:
            options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            options.out.with_suffix(".svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
