# SPDX-License-Identifier: Apache-2.0
"""Train factored tiny models on two processes, and say what came of it.

python -m torch.distributed.run --nproc_per_node=2 -m tests.helpers.two_processes OUT.json
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.adapters import pruned_model
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import tiny_model, token_windows

KINDS, LAYOUTS, STEPS = ("llama", "gpt2"), ("pair", "pivot"), 3


def steps_(model: nn.Module, batch: Tensor) -> nn.Module:
    """A few steps on one batch, without dropout; returns `model`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def whole_batch() -> Tensor:
    """Of all processes together."""
    return token_windows(4, 16)


def in_process(kind: str, layout: str) -> dict[str, Tensor]:
    """What one process alone gets to."""
    return steps_(pruned_model(kind, layout), whole_batch()).state_dict()


def largest_difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Over all tensors, in units of each one's largest value."""
    return max(
        float((got[name].double() - tensor.double()).abs().max() / tensor.double().abs().max().clamp_min(1e-9))
        for name, tensor in wanted.items()
    )


def _sharded(model: nn.Module, mine: Tensor) -> dict[str, Tensor]:
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    steps_(model, mine)
    return {name: full(tensor) for name, tensor in model.state_dict().items()}


def full(tensor: Any) -> Tensor:
    """All of a tensor that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _trained_rank(folder: str) -> dict[str, str]:
    from transformers import Trainer, TrainingArguments

    from eigenprune.recover import TrainedRankPruning

    model = tiny_model("llama")
    arguments = TrainingArguments(
        folder,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in token_windows(16, 24)]
    callback = TrainedRankPruning(keep=0.6, every=2, nuclear=0.1)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    return state_hashes(model) | {"ranks": json.dumps(callback.ranks)}


def main() -> None:
    """Everything; the first process writes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    mine = whole_batch().chunk(2)[rank]
    found: dict[str, Any] = {}
    for kind in KINDS:
        for layout in LAYOUTS:
            wanted = in_process(kind, layout)
            parallel = DistributedDataParallel(pruned_model(kind, layout))
            steps_(parallel, mine)
            found[f"ddp-{kind}-{layout}"] = largest_difference(parallel.module.state_dict(), wanted)
            got = _sharded(pruned_model(kind, layout), mine)
            found[f"fsdp-{kind}-{layout}"] = largest_difference(got, wanted)
    with tempfile.TemporaryDirectory() as folder:
        states: list[Any] = [None, None]
        distributed.all_gather_object(states, _trained_rank(folder))
        found["trained-rank"] = states
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
