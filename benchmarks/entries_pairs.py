# SPDX-License-Identifier: Apache-2.0
"""Two real pairs of pre-trained and fine-tuned encoders, with labelled texts to test and calibrate on.

`reactions`: rxnfp-bert-mlm and rxnfp-bert-cls50, as they were published, on the superclasses of USPTO-50k; the labels
of the 50 outputs are mapped to the 10 superclasses. `questions`: all-minilm-l6-v2, fine-tuned here on the question
types of TREC (once; the result stays beside the other models). Both are for `benchmarks/entries.py`.

    python benchmarks/entries_pairs.py --models FOLDER      # only fine-tune
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, shared_folder
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from eigenprune.calibrate.collect import has_fast_bfloat16

CALIBRATION, GENERAL = 64, 64  # examples of a domain's and of the general set
BATCH = 25
RATE = 2e-4
TUNED = "all-minilm-l6-v2-trec"


@dataclass
class Pair:
    """A base model, what was fine-tuned from it, and what it is judged on."""

    name: str
    base: dict[str, Tensor]
    model: nn.Module
    tokenizer: Any
    test: list[tuple[str, int]]
    calibration: list[str]
    general: list[str]
    label_of_output: list[int]

    def examples(self, texts: list[str]) -> Iterator[dict[str, Tensor]]:
        """What the model is called with, one text at a time; without labels, so that they are drawn."""
        for text in texts:
            yield dict(self.tokenizer(text, return_tensors="pt", truncation=True, max_length=256))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines, gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode().splitlines()]


def reactions(models: Path, data: Path, items: int) -> Pair:
    """rxnfp: the general set are reactants and products without their reaction."""
    folder = data / "uspto50k"
    codes = json.loads((folder / "classes_rxnfp50.json").read_text(encoding="utf-8"))
    labels = [0] * len(codes)
    for code, output in codes.items():
        labels[output] = int(code.split(".")[0])
    held = [row["text"] for row in read_rows(folder / "validation.jsonl.gz")[: CALIBRATION + GENERAL]]
    return Pair(
        "reactions",
        AutoModelForMaskedLM.from_pretrained(models / "rxnfp-bert-mlm", dtype=torch.float32).state_dict(),
        AutoModelForSequenceClassification.from_pretrained(models / "rxnfp-bert-cls50", dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(models / "rxnfp-bert-cls50"),
        [(row["text"], row["label"]) for row in read_rows(folder / "test.jsonl.gz")[:items]],
        held[:CALIBRATION],
        [text.replace(">>", ".") for text in held[CALIBRATION:]],
        labels,
    )


def questions(models: Path, data: Path, items: int) -> Pair:
    """MiniLM on TREC: the general set are sentences of film reviews."""
    source, tuned = models / "all-minilm-l6-v2", models / TUNED
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=6, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    train = [(row["text"], row["label"]) for row in read_rows(data / "trec" / "train.jsonl.gz")]
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    if not (tuned / "model.safetensors").exists():
        fine_tune(base, tokenizer, train[CALIBRATION:])
        base.save_pretrained(tuned)
    polarity = next((data / "sentence_polarity").glob("test*"))
    return Pair(
        "questions",
        start,
        AutoModelForSequenceClassification.from_pretrained(tuned, dtype=torch.float32).eval(),
        tokenizer,
        [(row["text"], row["label"]) for row in read_rows(data / "trec" / "test.jsonl")[:items]],
        [text for text, _ in train[:CALIBRATION]],
        [row["text"] for row in read_rows(polarity)[:GENERAL]],
        list(range(6)),
    )


PAIRS = {"reactions": reactions, "questions": questions}


def fine_tune(model: Any, tokenizer: Any, rows: list[tuple[str, int]], steps: int = 100, batch: int = 32) -> None:
    """AdamW, 2e-4 at most, warm-up over a tenth of the steps and cosine after it, decay 0.01; no row is seen twice."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).split(batch)
    for step, some in enumerate(order[:steps], 1):
        rate = min(10 * step / steps, 1) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = RATE * rate
        inputs = tokenizer([rows[i][0] for i in some.tolist()], return_tensors="pt", padding=True)
        labels = torch.tensor([rows[i][1] for i in some.tolist()])
        with precision():
            loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(f"fine-tuning: step {step} of {steps}, loss {float(loss):.3f}", flush=True)
    model.eval()


def precision() -> AbstractContextManager[Any]:
    """bfloat16 products where this machine multiplies it in hardware, else the model's own type."""
    return torch.autocast("cpu", torch.bfloat16) if has_fast_bfloat16(torch.device("cpu")) else nullcontext()


@torch.inference_mode()
def predictions(pair: Pair) -> list[int]:
    """The label that the model gives to each test text; texts of like length go together."""
    encoded = [pair.tokenizer(text, truncation=True, max_length=256)["input_ids"] for text, _ in pair.test]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found = [0] * len(encoded)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        batch = pair.tokenizer.pad({"input_ids": [encoded[i] for i in some]}, return_tensors="pt")
        with precision():
            outputs = pair.model(**batch).logits.argmax(-1).tolist()
        for i, output in zip(some, outputs, strict=True):
            found[i] = pair.label_of_output[output]
    return found


def macro_f1(found: list[int], labels: list[int]) -> float:
    """Mean over the labels that occur of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in sorted(set(labels)):
        true = sum(a == b == label for a, b in zip(found, labels, strict=True))
        scores.append(2 * true / (found.count(label) + labels.count(label)))
    return sum(scores) / len(scores)


def main() -> None:
    """Fine-tune what has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the models are kept")
    options = parser.parse_args()
    shared = shared_folder()
    if shared is None:
        parser.error("no texts: EIGENPRUNE_SHARED names a folder that holds data/trec")
    pair = questions(options.models, shared / "data", 500)
    labels = [label for _, label in pair.test]
    found = predictions(pair)
    print(f"accuracy {sum(a == b for a, b in zip(found, labels, strict=True)) / len(labels):.4f}")


if __name__ == "__main__":
    main()
