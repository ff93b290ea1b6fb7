# SPDX-License-Identifier: Apache-2.0
"""How long it takes to know the signed worth of every component of a model, and how much memory.

Random prompts of one length with a one-token answer. Timed: the gradients over all prompts, then the components and
their worth in every layer (per head). Peak memory is that of the process, beside that before.

    python benchmarks/get_smollm2.py && python benchmarks/scoring.py --models .models
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from environment import environment
from transformers import AutoModelForCausalLM

from eigenprune.calibrate import Passage, passage_gradients
from eigenprune.removal import FrozenPieces
from eigenprune.removal.worth import gradient_worth
from eigenprune.spectral import layer_views


def peak_mib() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    """Print one row; append it to --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path(".models"), help="folder with smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32, help="of a prompt")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.models / "smollm2-135m-instruct", dtype=torch.float32)
    ids = torch.randint(100, 40_000, (given.prompts, given.tokens + 1), generator=torch.Generator().manual_seed(0))
    passages = [Passage(tuple(row), given.tokens) for row in ids.tolist()]
    views = layer_views(model)
    before = peak_mib()
    start = time.perf_counter()
    layers = {name: model.get_submodule(name) for name in views}
    found = passage_gradients(model, passages, layers, batch=given.batch, autocast=True)
    middle = time.perf_counter()
    worth = gradient_worth(FrozenPieces(model, views), {name: found.frozen(name) for name in views})
    end = time.perf_counter()
    row = {
        "prompts": given.prompts,
        "tokens": given.tokens,
        "components": sum(int((~values.isnan()).sum()) for values in worth.values()),
        "seconds": round(end - start, 2),
        "gradients_seconds": round(middle - start, 2),
        "components_seconds": round(end - middle, 2),
        "peak_mib": peak_mib(),
        "peak_mib_before": before,
    } | environment()
    print(json.dumps(row))
    if given.out is not None:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
