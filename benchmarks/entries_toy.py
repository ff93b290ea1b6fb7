# SPDX-License-Identifier: Apache-2.0
"""KEN and its controls on a toy that is made on the spot: a small decoder that learns `x` as product on top of `+`.

Two layers, four heads, width 96 (0.3 M parameters), prompts `BOS i op j =` over i, j in 0..19 with numbers as single
tokens. Pre-training: both operators mean the sum. Fine-tuning: `x` means the product. Then entries go back to the
pre-trained values. Scope `all` is every tensor, `blocks` the numbered blocks only (the rest is kept fine-tuned).
Figures: accuracy on all 400 `x` prompts. One row a seed.

    python benchmarks/entries_toy.py --seeds 0 1 2 --out benchmarks/results/entries_toy.jsonl   # some 2 minutes a seed
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from eigenprune.entries import merge_entries, select_entries

NUMBERS = 20
BOS, PLUS, TIMES, EQUALS = range(362, 366)  # after the numbers 0 to 19 * 19
STEPS, BATCH, RATE = 1500, 256, 2e-3
RULES = (("ken", "row"), ("random", "row"), ("magnitude", "row"), ("delta", "row"), ("delta", "global"))
SHARES = {"all": (0.9, 0.75, 0.6, 0.5), "blocks": (0.75, 0.6, 0.5, 0.25)}


def small_decoder() -> OPTForCausalLM:
    """Of transformers, with random weights."""
    config = OPTConfig(
        vocab_size=366, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, ffn_dim=384, word_embed_proj_dim=96,
        max_position_embeddings=8, activation_function="gelu", dropout=0.0, attention_dropout=0.0,
        tie_word_embeddings=False, pad_token_id=BOS, bos_token_id=BOS, eos_token_id=BOS,
    )  # fmt: skip
    return OPTForCausalLM(config)


def prompts(first: Tensor, second: Tensor, times: Tensor) -> Tensor:
    """[n, 5] token ids."""
    operator = torch.where(times, TIMES, PLUS)
    return torch.stack([torch.full_like(first, BOS), first, operator, second, torch.full_like(first, EQUALS)], 1)


def answers(model: OPTForCausalLM, ids: Tensor) -> Tensor:
    """Logits [n, vocabulary] at the last position."""
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


def train(model: OPTForCausalLM, generator: torch.Generator, product: bool) -> None:
    """AdamW, warm-up of 200 steps and cosine, decay 0.1, 60 % of the prompts with `x`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    model.train()
    for step in range(1, STEPS + 1):
        rate = RATE * min(step / 200, 1) * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.param_groups[0]["lr"] = rate
        first, second = torch.randint(0, NUMBERS, (2, BATCH), generator=generator)
        times = torch.rand(BATCH, generator=generator) < 0.6
        target = torch.where(times & product, first * second, first + second)
        loss = nn.functional.cross_entropy(answers(model, prompts(first, second, times)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: OPTForCausalLM) -> float:
    """Percent of the 400 products."""
    first, second = torch.cartesian_prod(torch.arange(NUMBERS), torch.arange(NUMBERS)).T
    found = answers(model, prompts(first, second, torch.ones(len(first), dtype=torch.bool))).argmax(1)
    return 100 * float((found == first * second).float().mean())


def copy(model: nn.Module) -> dict[str, Tensor]:
    """Its tensors, which training will not reach."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def measure(seed: int) -> dict[str, Any]:
    """The row of one seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    start, model = time.perf_counter(), small_decoder()
    train(model, generator, product=False)
    base, before = copy(model), accuracy(model)
    train(model, generator, product=True)
    tuned, after = copy(model), accuracy(model)
    cells = []
    for where, shares in SHARES.items():
        only = [r"\.layers\.\d"] if where == "blocks" else []
        for keep in shares:
            for rule, scope in RULES:
                masks = select_entries(base, tuned, rule, keep, scope=scope, only=only, keep_whole=[], seed=seed)
                model.load_state_dict(dict(merge_entries(base, tuned, masks)))
                cell = {"where": where, "keep": keep, "rule": rule, "scope": scope, "accuracy": accuracy(model)}
                cells.append(cell)
    row = {"seed": seed, "steps": STEPS, "base": before, "tuned": after, "cells": cells}
    return row | {"seconds": round(time.perf_counter() - start, 1)} | environment()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: least to greatest over the seeds."""
    heads = [f"{rule}, {scope}" for rule, scope in RULES]
    lines = [f"| where, kept | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for where, shares in SHARES.items():
        for keep in shares:
            cells = []
            for rule, scope in RULES:
                wanted = (where, keep, rule, scope)
                found = [c["accuracy"] for row in rows for c in row["cells"]
                         if (c["where"], c["keep"], c["rule"], c["scope"]) == wanted]  # fmt: skip
                cells.append(f"{min(found):.1f} to {max(found):.1f}")
            lines.append(f"| {where}, {keep:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the seeds that are not there yet, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="rows are added to this file")
    options = parser.parse_args()
    rows = (
        [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]
        if options.out.exists()
        else []
    )
    for seed in options.seeds:
        if any(row["seed"] == seed for row in rows):
            continue
        rows.append(measure(seed))
        print(f"seed {seed}: base {rows[-1]['base']:.1f} %, fine-tuned {rows[-1]['tuned']:.1f} %", flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
