# SPDX-License-Identifier: Apache-2.0
"""Trained Rank Pruning against truncating a normally trained model, at equal ranks.

A Llama of 0.36 million parameters is trained from scratch on the bytes of WikiText-2 train samples: the same steps,
seed and batches each time, once as ever and then with the callback. The normally trained one is truncated to the ranks
that the callback ended with (plain SVD), and also pruned in the metric of `kfac` at the same budget, uniformly and
globally. Loss: nats per byte over the first 64 windows of the WikiText-2 test text.

With --task random, a smaller model (0.1 million parameters) learns 32 rows of random tokens by heart, which leaves no
rank unused; the loss is then that on the same rows.

    python benchmarks/trp.py --out benchmarks/results/trp.jsonl       # a few minutes on 2 cores
    python benchmarks/trp.py --task random --steps 150 --every 10    # some seconds
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from environment import environment, shared_folder
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from eigenprune import EigenpruneConfig, prune_
from eigenprune.calibrate import read_texts
from eigenprune.layers import low_rank_layers, replace_module_
from eigenprune.recover import TrainedRankPruning
from eigenprune.spectral import Metric, components, layer_of_factors

WINDOW, BATCH, LEARNING_RATE = 64, 16, 3e-3
# (budget, weight of the nuclear norm)
VARIANTS = ((0.5, 0.0), (0.25, 0.0), (0.12, 0.0), (0.12, 0.02))


def byte_windows(text: str, count: int) -> Tensor:
    """[count, WINDOW] int64."""
    raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return raw[: count * WINDOW].long().view(-1, WINDOW)


def texts() -> tuple[Tensor, Tensor]:
    """Windows to train and to test on."""
    shared = shared_folder()
    if shared is None:
        raise SystemExit("no texts: EIGENPRUNE_SHARED names a folder that holds data/wikitext2")
    data = shared / "data" / "wikitext2"
    training = byte_windows("\n".join(read_texts([data / "train_samples.jsonl.gz"])), 4096)
    return training, byte_windows(gzip.decompress((data / "test_raw.txt.gz").read_bytes()).decode(), 64)


def random_rows() -> Tensor:
    """[32, 24] tokens."""
    return torch.randint(0, 256, (32, 24), generator=torch.Generator().manual_seed(0))


def small_model(width: int) -> LlamaForCausalLM:
    """The same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=width // 32,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(windows: Tensor, steps: int, callbacks: list[Any]) -> tuple[LlamaForCausalLM, float]:
    """The trained model, and seconds."""
    model = small_model(96 if len(windows) > 32 else 64)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            warmup_steps=steps // 20,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            use_cpu=True,
            seed=0,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in windows]
        start = time.perf_counter()
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks).train()
    return model.eval(), time.perf_counter() - start


@torch.no_grad()
def loss(model: nn.Module, windows: Tensor) -> float:
    """Nats per byte."""
    return float(sum(model(input_ids=part, labels=part).loss * len(part) for part in windows.split(16)) / len(windows))


def truncated(model: nn.Module, ranks: dict[str, int], layout: str) -> nn.Module:
    """A copy with each layer at its rank, by plain SVD."""
    model = copy.deepcopy(model)
    for name, rank in ranks.items():
        if rank:
            module = model.get_submodule(name)
            found = components(module.weight.detach(), Metric(), rank)
            replace_module_(model, name, layer_of_factors(module, *found.truncated(rank), layout))
    return model


def pruned(model: nn.Module, keep: float, allocation: str, windows: Tensor) -> nn.Module:
    """A copy pruned in the metric of kfac."""
    model = copy.deepcopy(model)
    config = EigenpruneConfig(keep=keep, method="kfac", allocation=allocation)
    prune_(model, config, windows=windows, cache_dir=Path(tempfile.mkdtemp()), progress=False)
    return model


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss of every variant as bars, a panel for each task; needs matplotlib (`pip install '.[plots]'`)."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.get("task", "wikitext") for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.34 * max(5, len(rows) // len(tasks)) * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False).flatten()
    for panel, task in zip(panels, tasks, strict=True):
        mine = [row for row in rows if row.get("task", "wikitext") == task][::-1]
        colors = ["#c0392b" if row["model"].startswith("trained") else "#999999" for row in mine]
        bars = panel.barh([row["model"] for row in mine], [row["loss"] for row in mine], color=colors)
        panel.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        panel.margins(x=0.12)
        panel.set_title(
            {"random": "random tokens, learned by heart", "wikitext": "bytes of WikiText"}[task], fontsize=10
        )
        panel.set_xlabel("loss, nats per token")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Training towards low rank (red) against truncating a normally trained model", fontsize=11)
    figure.savefig(path)


def main() -> None:
    """All variants, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="steps between two truncations")
    parser.add_argument("--task", choices=("wikitext", "random"), default="wikitext")
    parser.add_argument("--keep", type=float, nargs="+", help="only these budgets")
    parser.add_argument("--out", type=Path, help="write the rows here")
    parser.add_argument("--picture", type=Path, help="only draw the rows of --out into this file (.svg, .png)")
    options = parser.parse_args()
    if options.picture:
        if not options.out:
            parser.error("--picture draws the rows that --out names")
        draw([json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()], options.picture)
        return
    warnings.simplefilter("ignore")
    training, test = texts() if options.task == "wikitext" else (random_rows(),) * 2
    facts = {
        "task": options.task,
        "steps": options.steps,
        "every": options.every,
        "batch": BATCH,
        "window": training.shape[1],
    } | environment()
    normal, seconds = train(training, options.steps, [])
    rows: list[dict[str, Any]] = []

    def add(name: str, model: nn.Module, **more: Any) -> None:
        row = {"model": name, "loss": loss(model, test), **more}
        rows.append(row | facts)
        ranks = sum(layer.rank for layer in low_rank_layers(model).values())
        print(f"{name:42} {row['loss']:.4f} nats per byte   sum of ranks {ranks or 'full'}", flush=True)
        if options.out:
            options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    add("normal, dense", normal, seconds=seconds)
    for keep, nuclear in VARIANTS:
        if options.keep and keep not in options.keep:
            continue
        callback = TrainedRankPruning(keep=keep, every=options.every, nuclear=nuclear)
        model, seconds = train(training, options.steps, [callback])
        add(f"trained rank, keep {keep:g}, nuclear {nuclear:g}", model, keep=keep, nuclear=nuclear, seconds=seconds)
        if nuclear == 0:
            add(f"normal, truncated to the same ranks, {keep:g}", truncated(normal, callback.ranks, "pivot"), keep=keep)
            for allocation in ("uniform", "global"):
                again = pruned(normal, keep, allocation, training[:512])
                add(f"normal, kfac {allocation}, keep {keep:g}", again, keep=keep, allocation=allocation)


if __name__ == "__main__":
    main()
