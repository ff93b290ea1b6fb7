# SPDX-License-Identifier: Apache-2.0
"""The change that fine-tuning made, at equal bytes: single entries, low rank, or both together.

Base rxnfp-bert-mlm, fine-tuned rxnfp-bert-cls50 (folders with these names in $EIGENPRUNE_MODELS). Every matrix of
encoder and embeddings is approximated; vectors, pooler and classifier are kept whole in all three, and not counted.
Bytes go where they help most: for each matrix a grid of options (rank, stored entries), the choice over all matrices by
one price for a byte, least summed squared error. Values are float32; places of entries are counted as a delta file
stores them. Accuracy: superclass of the first reactions of the USPTO-50k test file ($EIGENPRUNE_SHARED); agreement:
with the fine-tuned model's own answers on them.

With --grid FILE the options, most of the work, are kept there for the next call.

    python benchmarks/delta_split.py --out benchmarks/results/delta_split.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path
from typing import Any

import torch
from environment import environment, shared_folder
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from eigenprune.entries.low_rank_sparse import most_stored, split_bytes, split_low_rank_sparse
from eigenprune.hub.weight_source import WeightSource

ITEM = 4
SHARES = (0.02, 0.05, 0.1, 0.2)
RANKS = (4, 8, 16, 32)
STORED = (0.01, 0.03, 0.08, 0.2)
KINDS = {
    "sparse": lambda rank, _stored: rank == 0,
    "low rank": lambda _rank, stored: stored == 0,
    "low rank + sparse": lambda _rank, _stored: True,
}
Option = tuple[int, float, int, int]  # bytes, squared error, rank, stored


def options_of(change: Tensor) -> list[Option]:
    """(rank, stored) with bytes and squared error: each part alone finely, by its spectrum, and both on a grid."""
    shape = (change.shape[0], change.shape[1])
    entries = change.numel()
    errors: dict[tuple[int, int], float] = {}
    squares = change.double().square().flatten().sort(descending=True).values
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    errors |= {(0, stored): float(left[stored]) for stored in range(0, entries, max(1, entries // 200))}
    energies = torch.linalg.svdvals(change.double()).square()
    left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    errors |= {(rank, 0): float(left[rank]) for rank in range(min(shape) + 1)}
    for rank in (rank for rank in RANKS if rank < min(shape)):
        for share in STORED:
            stored = round(share * entries)
            errors[rank, stored] = split_low_rank_sparse(change, rank, stored, rounds=3).error ** 2
    sizes = {(rank, stored): split_bytes(shape, rank, stored, ITEM) for rank, stored in errors}
    return [(sizes[plan], errors[plan], *plan) for plan in sorted(errors) if sizes[plan] <= ITEM * entries]


def kept_options(changes: dict[str, Tensor], path: Path | None) -> dict[str, list[Option]]:
    """`options_of` all changes, read from `path` where that is there, and else written to it."""
    if path is not None and path.exists():
        return {name: [tuple(o) for o in found] for name, found in json.loads(path.read_text()).items()}  # type: ignore[misc]
    found = {name: options_of(change) for name, change in tqdm(changes.items(), desc="options", disable=None)}
    if path is not None:
        path.write_text(json.dumps(found))
    return found


def choose(options: dict[str, list[Option]], budget: int, kind: str) -> dict[str, Option]:
    """One option a matrix, within `budget` bytes together: the lowest price for a byte that stays within it."""
    allowed = {name: [o for o in found if KINDS[kind](o[2], o[3])] for name, found in options.items()}
    low, high = 0.0, 1.0
    for _ in range(200):
        price = (low + high) / 2 if low else high
        chosen = {name: min(found, key=lambda o: o[1] + price * o[0]) for name, found in allowed.items()}
        if sum(option[0] for option in chosen.values()) > budget:
            low, high = price, high if high > price else 2 * price
        else:
            high = price
            if low == 0:
                low = high / 2**40
    return {name: min(found, key=lambda o: o[1] + high * o[0]) for name, found in allowed.items()}


def spend_rest(chosen: dict[str, Option], shapes: dict[str, tuple[int, int]], budget: int, kind: str) -> dict[str, Any]:
    """What the grid left of the budget goes into more entries of every sparse part, in proportion to its bytes."""
    used = sum(option[0] for option in chosen.values())
    if kind == "low rank" or used == 0:
        return {name: (rank, stored) for name, (_, _, rank, stored) in chosen.items()}
    grown = {}
    for name, (size, _, rank, stored) in chosen.items():
        own = int(size * budget / used) - split_bytes(shapes[name], rank, 0, ITEM)
        grown[name] = (rank, max(stored, most_stored(shapes[name], own, ITEM)))
    return grown


def reactions(count: int) -> tuple[list[str], list[int]]:
    """The first reactions of the test file, and their superclass, 1 to 10."""
    shared = shared_folder()
    if shared is None:
        raise SystemExit("no reactions: EIGENPRUNE_SHARED names a folder that holds data/uspto50k")
    with gzip.open(shared / "data" / "uspto50k" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def superclass_of_output() -> Tensor:
    """int64 [50]: the first number of the class code of each output."""
    shared = shared_folder()
    classes = json.loads(((shared or Path()) / "data" / "uspto50k" / "classes_rxnfp50.json").read_text())
    return torch.tensor([int(code.split(".")[0]) for code, _ in sorted(classes.items(), key=lambda item: item[1])])


@torch.no_grad()
def answers(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """int64 [texts]: the output with the highest score, of 50."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    found = torch.zeros(len(texts), dtype=torch.int64)
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=512, return_tensors="pt")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        found[rows] = model(**inputs).logits.argmax(-1)
    return found


def main() -> None:
    """One row for each kind and share of bytes, and one for the fine-tuned model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("EIGENPRUNE_MODELS", ".models")))
    parser.add_argument("--reactions", type=int, default=250)
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.models / "rxnfp-bert-cls50"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts, labels = reactions(options.reactions)
    superclass, wanted = superclass_of_output(), torch.tensor(labels)
    own = answers(model, tokenizer, texts)
    facts = environment() | {"reactions": len(texts)}

    def say(row: dict[str, Any]) -> None:
        line = json.dumps(row | facts)
        print(line, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    if options.out is None or not options.out.exists():
        say({"kind": "fine-tuned", "share": 1.0, "accuracy": float((superclass[own] == wanted).double().mean())})
    base = WeightSource(options.models / "rxnfp-bert-mlm")
    parameters = dict(model.named_parameters())
    names = [n for n, p in parameters.items() if n in base and p.ndim == 2 and "pooler" not in n]
    changes = {name: parameters[name].detach() - base[name] for name in names}
    shapes = {name: (change.shape[0], change.shape[1]) for name, change in changes.items()}
    grid = kept_options(changes, options.grid)
    total = sum(float(change.double().square().sum()) for change in changes.values())
    dense = ITEM * sum(change.numel() for change in changes.values())
    for share in options.shares:
        for kind in KINDS:
            plan = spend_rest(choose(grid, int(share * dense), kind), shapes, int(share * dense), kind)
            error = 0.0
            for name in names:
                split = split_low_rank_sparse(changes[name], *plan[name])
                error += split.error**2
                parameters[name].data = base[name] + split.dense()
            found = answers(model, tokenizer, texts)
            say(
                {
                    "kind": kind,
                    "share": share,
                    "bytes": sum(split_bytes(shapes[name], *plan[name], ITEM) for name in names),
                    "dense_bytes": dense,
                    "relative_error": (error / total) ** 0.5,
                    "accuracy": float((superclass[found] == wanted).double().mean()),
                    "agreement": float((found == own).double().mean()),
                    "low_rank_bytes": sum(split_bytes(shapes[name], plan[name][0], 0, ITEM) for name in names),
                }
            )


if __name__ == "__main__":
    main()
