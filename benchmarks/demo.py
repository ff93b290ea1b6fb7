# SPDX-License-Identifier: Apache-2.0
"""The whole way on a real model: get, measure, prune, save, reload in a new process, push and pull, compare.

python benchmarks/demo.py                                # SmolLM2-135M-Instruct, from a package index
python benchmarks/demo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --keep 0.7    # with a hub at hand
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment, shared_folder
from get_smollm2 import NAME, PROVENANCE, get_smollm2
from hub_round_trip import NEW_TOKENS, round_trip, told
from quality import RESULTS
from result_rows import kept_rows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from eigenprune import EigenpruneConfig, PruneReport, perplexity, prune_, save_model
from eigenprune.calibrate import BUILTIN, SAMPLED, SEPARATOR, builtin_texts, read_texts, token_ids
from eigenprune.calibrate.cache import model_fingerprint
from eigenprune.evaluate import Speed, compare_decode, compare_prefill, spaced_windows, speed_ratio
from eigenprune.report import summary_table

PROMPTS = ("The capital of France is", "Water boils when", "Before writing a program, it helps to")
WINDOW = 1024
EVALUATION_WINDOWS = 8
DEFAULT_WINDOWS = EigenpruneConfig().windows
HELD_OUT = 5  # without other text, every fifth topic of Python's reference is kept for evaluation

RELOAD = """
import sys
import eigenprune
from eigenprune.calibrate.cache import model_fingerprint
from transformers import AutoModelForCausalLM
print(model_fingerprint(AutoModelForCausalLM.from_pretrained(sys.argv[1])))
"""


@dataclass(frozen=True)
class Texts:
    """Calibration and evaluation documents, and what to call them."""

    calibration: list[str]
    calibration_name: str
    evaluation: str
    evaluation_name: str


@dataclass(frozen=True)
class Measured:
    """One column of the table."""

    parameters: int
    file_bytes: int
    perplexity: float
    sentences: list[str]


def texts() -> Texts:
    """WikiText-2 where the shared folder is at hand, else Python's language reference, parted in two."""
    shared = shared_folder()
    if shared is not None:
        folder = shared / "data" / "wikitext2"
        return Texts(
            read_texts([folder / "train_samples.jsonl.gz"])[:64],
            "WikiText-2 train",
            read_texts([folder / "test_raw.txt.gz"])[0],
            "WikiText-2 test",
        )
    topics = builtin_texts()
    calibration = [topic for i, topic in enumerate(topics) if i % HELD_OUT]
    return Texts(
        calibration, f"{BUILTIN} (ships with Python)", SEPARATOR.join(topics[::HELD_OUT]), f"{BUILTIN}, held out"
    )


def measure(model: Any, tokenizer: Any, windows: list[torch.Tensor], folder: Path) -> Measured:
    """Everything of a model but its speed."""
    return Measured(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        file_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        perplexity=perplexity(model, windows).perplexity,
        sentences=[continued(model, tokenizer, prompt) for prompt in PROMPTS],
    )


def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """`prompt` with greedy tokens after it, on one line."""
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def comparison(dense: Measured, pruned: Measured, decode: dict[str, Speed], prefill: dict[str, Speed]) -> Table:
    """Dense beside pruned."""
    table = Table(title="dense and pruned", show_lines=False)
    for name in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(name, justify="left" if not name else "right")

    def add(name: str, a: float, b: float, form: str) -> None:
        table.add_row(name, format(a, form), format(b, form), f"{b / a:.3f}")

    add("parameters", dense.parameters, pruned.parameters, ",d")
    add("bytes on disk", dense.file_bytes, pruned.file_bytes, ",d")
    add("perplexity", dense.perplexity, pruned.perplexity, ".2f")
    for name, speeds in (("decode, tokens/s", decode), ("prefill, tokens/s", prefill)):
        ratio, low, high = speed_ratio(speeds["pruned"], speeds["dense"])
        values = [f"{speeds[key].tokens_per_second:.1f}" for key in ("dense", "pruned")]
        table.add_row(name, *values, f"{ratio:.2f} ({low:.2f} to {high:.2f})")
    return table


def default_text_cost(keep: float) -> str | None:
    """What it costs to give no text, from the rows that quality.py and calibration.py have kept."""
    rows = kept_rows(RESULTS) + kept_rows(RESULTS.with_name("calibration.jsonl"))
    dense = next((row["perplexity"] for row in rows if row["method"] == "dense"), None)
    found = {
        row["calibration"]: row["perplexity"]
        for row in rows
        if (row["method"], row.get("layout"), row.get("allocation"), row["keep"]) == ("kfac", "pivot", "global", keep)
        and row.get("calibration_windows", DEFAULT_WINDOWS) == DEFAULT_WINDOWS
    }
    if dense is None or not {"wikitext2", SAMPLED} <= found.keys():
        return None
    return (
        f"At keep {keep:g}, WikiText-2 perplexity is {found['wikitext2'] / dense:.3f} x dense when calibrated on its "
        f"own training text, and {found[SAMPLED] / dense:.3f} x when no text is given and the model writes its own "
        "(benchmarks/results/quality.jsonl, calibration.jsonl)."
    )


def reloads_equal(folder: Path, model: Any) -> bool:
    """Whether a new process that only imports eigenprune loads the very same tensors from `folder`."""
    command = [sys.executable, "-c", RELOAD, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1] == model_fingerprint(model)


def pulled_equal(folder: Path, model: Any, pruned: Measured, console: Console) -> bool:
    """Whether the model in `folder`, pushed to a Hub and pulled again, is `model` and writes what it wrote."""
    pulled = round_trip(folder, PROMPTS[0])
    console.print(told(pulled), highlight=False)
    same = pulled.fingerprint == model_fingerprint(model) and pulled.text == pruned.sentences[0]
    console.print(f"The pulled model is bit-equal and writes the same: {'yes' if same else 'NO'}")
    return same


def write_figures(
    path: Path,
    dense: Measured,
    pruned: Measured,
    decode: dict[str, Speed],
    prefill: dict[str, Speed],
    report: PruneReport,
    more: dict[str, Any],
) -> None:
    """All figures as JSON."""
    figures = {"dense": vars(dense), "pruned": vars(pruned)} | more
    figures |= {"decode": [vars(s) for s in decode.values()], "prefill": [vars(s) for s in prefill.values()]}
    figures |= {"report": report.to_dict(), "environment": environment()}
    path.write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default: SmolLM2-135M-Instruct from a package index")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=ROOT / ".out")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    logging.set_verbosity_error()
    console, began = Console(), time.perf_counter()

    source = options.model or str(get_smollm2(ROOT / ".models"))
    console.print(f"[bold]1. Model[/]: {options.model or PROVENANCE}")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = texts()
    windows = spaced_windows(torch.tensor(token_ids(tokenizer, text.evaluation)), WINDOW, EVALUATION_WINDOWS)
    name = Path(options.model or NAME).name
    dense_folder, out = options.out / f"{name}-dense", options.out / f"{name}-keep{options.keep:g}"
    save_model(dense_model, dense_folder, overwrite=True)
    dense = measure(dense_model, tokenizer, windows, dense_folder)

    console.print(f"[bold]2. Prune[/] to keep {options.keep:g}, calibrated on: {text.calibration_name}")
    cost = default_text_cost(options.keep)
    if cost:
        console.print(cost)
    started = time.perf_counter()
    report = prune_(model, EigenpruneConfig(keep=options.keep), tokenizer=tokenizer, texts=text.calibration)
    prune_seconds = time.perf_counter() - started
    console.print(summary_table(report))
    save_model(model, out, tokenizer=tokenizer, report=report, overwrite=True)
    pruned = measure(model, tokenizer, windows, out)

    console.print(
        f"[bold]3. Compare[/]; perplexity on {text.evaluation_name}, {EVALUATION_WINDOWS} windows of {WINDOW}"
    )
    models = {"dense": dense_model, "pruned": model}
    prompt = windows[0][:64]
    decode = compare_decode(models, prompt, new_tokens=32, repeats=7)
    prefill = compare_prefill(models, tokens=256, repeats=7)
    console.print(comparison(dense, pruned, decode, prefill))
    for a, b in zip(dense.sentences, pruned.sentences, strict=True):
        console.print(f"  dense:  {a}\n  pruned: {b}", highlight=False)

    console.print(f"[bold]4. Reload[/] {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")
    equal = reloads_equal(out, model)
    console.print(
        f"A new process loads it with plain from_pretrained; state dict bit-equal: {'yes' if equal else 'NO'}"
    )

    console.print("[bold]5. Push, pull, generate[/]")
    same = pulled_equal(out, model, pruned, console)
    total = time.perf_counter() - began
    console.print(f"pruning {prune_seconds:.0f} s, everything {total:.0f} s")
    if options.json:
        seconds = {"prune_seconds": prune_seconds, "total_seconds": total}
        checks = {"reload_equal": equal, "pulled_equal": same}
        write_figures(options.json, dense, pruned, decode, prefill, report, seconds | checks)
    if not (equal and same):
        sys.exit("the reloaded or pulled model differs from the saved one")


if __name__ == "__main__":
    main()
