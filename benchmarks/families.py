# SPDX-License-Identifier: Apache-2.0
"""Do the methods stand in the same order on models of other families? A masked language model and an encoder.

`rxnfp-bert-mlm` (BERT, 12 layers, chemical reactions): the divergence of its predictions for masked tokens from the
dense model's, and how many of them are right. `all-minilm-l6-v2` (BERT without a head, 6 layers, sentences): how far
the sentence embedding is from the dense model's, as 1 - cosine, and the accuracy on TREC questions of a logistic
regression that was fitted to the dense model's embeddings. Every method with its own allocation; all in float32.

Calibration: reactions of the commonest length of the validation file; 64 windows of 128 tokens of `wiki_passages`.
Evaluation: the first 500 reactions, or questions, of the test file. SmolLM2's rows are those of `quality.py`.

    python benchmarks/families.py --models FOLDER       # all rows, some minutes
    python benchmarks/families.py --table               # the rows kept so far, and how alike the orders are
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from entries_pairs import read_rows
from result_rows import RESULTS_FOLDER, command_line, keep_row, kept_rows, shared_or_exit
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from eigenprune import EigenpruneConfig, prune_
from eigenprune.calibrate import cut_windows
from eigenprune.errors import EigenpruneError
from eigenprune.spectral import METHODS

KEEP = (0.8, 0.6, 0.4)
EXAMPLES, PROBE_EXAMPLES, MASKED = 500, 2000, 0.15
BATCH = 25
RESULTS = RESULTS_FOLDER / "families.jsonl"
QUALITY = RESULTS_FOLDER / "quality.jsonl"
SMOLLM2 = "smollm2-135m-instruct"


def padded(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """Batches of texts of like length."""
    texts = sorted(texts, key=len)
    calls = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
    return [dict(tokenizer(call, return_tensors="pt", padding=True, truncation=True, max_length=512)) for call in calls]


class Reactions:
    """A masked language model of chemical reactions."""

    name = "rxnfp-bert-mlm"

    def __init__(self, models: Path, data: Path) -> None:
        self.model = AutoModelForMaskedLM.from_pretrained(models / self.name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(models / self.name)
        texts = [row["text"] for row in read_rows(data / "uspto50k" / "validation.jsonl.gz")]
        rows: list[list[int]] = tokenizer(texts)["input_ids"]
        commonest = Counter(map(len, rows)).most_common(1)[0][0]
        self.windows = torch.tensor([row for row in rows if len(row) == commonest])
        test = [row["text"] for row in read_rows(data / "uspto50k" / "test.jsonl.gz")[:EXAMPLES]]
        generator = torch.Generator().manual_seed(0)
        self.batches = [self._masked(tokenizer, batch, generator) for batch in padded(tokenizer, test)]
        self.dense = [self._predicted(self.model, batch) for batch in self.batches]

    @staticmethod
    def _masked(tokenizer: Any, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The batch with some tokens masked, and the true ones as labels; -100 elsewhere."""
        ids = batch["input_ids"]
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & ~special
        masked = ids.masked_fill(hidden, tokenizer.mask_token_id)
        return batch | {"input_ids": masked, "labels": ids.masked_fill(~hidden, -100)}

    @staticmethod
    @torch.no_grad()
    def _predicted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Log probabilities [masked tokens, vocabulary], float64."""
        logits = model(**{name: values for name, values in batch.items() if name != "labels"}).logits
        found: Tensor = logits[batch["labels"] >= 0].double().log_softmax(-1)
        return found

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Mean KL(dense || model) in nats, and accuracy, over all masked tokens."""
        divergence, right, count = 0.0, 0, 0
        for batch, dense in zip(self.batches, self.dense, strict=True):
            found = self._predicted(model, batch)
            divergence += float((dense.exp() * (dense - found)).sum())
            right += int((found.argmax(-1) == batch["labels"][batch["labels"] >= 0]).sum())
            count += len(found)
        return {"divergence": divergence / count, "accuracy": right / count, "tokens": count}


class Sentences:
    """A sentence encoder without a head."""

    name = "all-minilm-l6-v2"

    def __init__(self, models: Path, data: Path) -> None:
        self.model = AutoModel.from_pretrained(models / self.name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(models / self.name)
        texts = [row["text"] for row in read_rows(data / "wiki_passages" / "train.jsonl.gz")]
        self.windows = cut_windows(tokenizer, texts, count=64, window=128)
        train = sorted(read_rows(data / "trec" / "train.jsonl.gz")[:PROBE_EXAMPLES], key=lambda row: len(row["text"]))
        test = sorted(read_rows(data / "trec" / "test.jsonl")[:EXAMPLES], key=lambda row: len(row["text"]))
        self.batches = padded(tokenizer, [row["text"] for row in test])
        self.labels = torch.tensor([row["label"] for row in test])
        self.dense = self.embeddings(self.model, self.batches)
        fitted_on = self.embeddings(self.model, padded(tokenizer, [row["text"] for row in train]))
        self.probe = logistic_regression(fitted_on, torch.tensor([row["label"] for row in train]))

    @torch.no_grad()
    def embeddings(self, model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
        """[texts, width]: the mean over tokens, of length 1, as this model's card says."""
        found = []
        for batch in batches:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Distance from the dense embeddings, and what the dense model's probe makes of these."""
        found = self.embeddings(model, self.batches)
        right = (found @ self.probe[:-1] + self.probe[-1]).argmax(1) == self.labels
        distance = 1 - float((found * self.dense).sum(1).double().mean())
        return {"distance": distance, "accuracy": float(right.double().mean())}


def logistic_regression(x: Tensor, labels: Tensor) -> Tensor:
    """Weights [features + 1, classes], the last row the bias; a little decay, to convergence."""
    weights = torch.zeros(x.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights[:-1] + weights[-1], labels) + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def methods() -> list[str]:
    """All that need neither a task nor a LoRA."""
    return [name for name, own in METHODS.items() if own.removal is None and own.worth != "importance"]


def measure(bench: Reactions | Sentences, keep: float, method: str) -> dict[str, Any]:
    """One row; the reason where a method does not suit the model."""
    row: dict[str, Any] = {"model": bench.name, "method": method, "keep": keep}
    model = copy.deepcopy(bench.model)
    config = EigenpruneConfig(keep=keep, method=method, layout="pivot", allocation=METHODS[method].allocation)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = prune_(model, config, windows=bench.windows, progress=False)
    except EigenpruneError as error:
        return row | {"refused": str(error)}
    return row | {"kept": report.keep} | bench.measure(model)


def orders(rows: list[dict[str, Any]]) -> dict[tuple[str, float], dict[str, float]]:
    """(model, keep) to method to its loss: what a method is ranked by."""
    found: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        loss = row.get("divergence", row.get("distance"))
        if loss is not None and row["method"] != "dense":
            found.setdefault((row["model"], row["keep"]), {})[row["method"]] = loss
    for row in kept_rows(QUALITY):
        own = METHODS.get(row["method"])
        of_default = row.get("calibration") == "wikitext2" and row.get("layout") == "pivot"
        if own is not None and of_default and row["allocation"] == own.allocation:
            found.setdefault((SMOLLM2, row["keep"]), {})[row["method"]] = row["perplexity"]
    return found


def rank_correlation(a: dict[str, float], b: dict[str, float]) -> float:
    """Spearman's, over the methods that both have."""
    both = sorted(set(a) & set(b))
    ranks = [torch.tensor([side[name] for name in both]).double().argsort().argsort().double() for side in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the loss of every method by model, best first on SmolLM2; then how alike the orders are."""
    lines = []
    found = orders(rows)
    for keep in KEEP:
        of_model = {model: losses for (model, kept), losses in found.items() if kept == keep}
        names = sorted({name for losses in of_model.values() for name in losses})
        first = of_model.get(SMOLLM2, next(iter(of_model.values()), {}))
        names.sort(key=lambda name: first.get(name, math.inf))
        lines += ["", f"| keep {keep:g} | {' | '.join(of_model)} |", "| --- " * (1 + len(of_model)) + "|"]
        for name in names:
            cells = (f"{losses[name]:.4g}" if name in losses else "" for losses in of_model.values())
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
        for model, losses in of_model.items():
            if model != SMOLLM2 and SMOLLM2 in of_model and len(set(losses) & set(of_model[SMOLLM2])) > 2:
                alike = rank_correlation(losses, of_model[SMOLLM2])
                lines.append(f"\nRank correlation of {model} with {SMOLLM2}: {alike:.2f}.")
    return "\n".join(lines).strip()


def main() -> None:
    """Measure the rows that are missing, or print all."""
    parser = command_line(__doc__, RESULTS)
    parser.add_argument("--methods", nargs="*", default=methods(), choices=methods())
    parser.add_argument("--keep", nargs="*", type=float, default=list(KEEP))
    options = parser.parse_args()
    if not options.table:
        shared = shared_or_exit()
        benches = [kind(options.models, shared / "data") for kind in (Reactions, Sentences)]
        done = {(row["model"], row["method"], row["keep"]) for row in kept_rows(options.out)}
        wanted = [(bench, "dense", 1.0) for bench in benches]
        wanted += [(bench, name, keep) for bench in benches for name in options.methods for keep in options.keep]
        for bench, name, keep in wanted:
            if (bench.name, name, keep) in done:
                continue
            row = {"model": bench.name, "method": name, "keep": keep}
            row = row | bench.measure(bench.model) if name == "dense" else measure(bench, keep, name)
            print(row, flush=True)
            keep_row(options.out, row)
    print(table(kept_rows(options.out)))


if __name__ == "__main__":
    main()
