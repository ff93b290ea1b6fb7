# SPDX-License-Identifier: Apache-2.0
"""What the model itself does when one matrix is pruned, and what its blocks do: evidence for allocations."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.checkpointing import blocks_of
from eigenprune.calibrate.objective import has_head, is_causal, model_inputs
from eigenprune.layers import replace_module_

ROWS = 256  # tokens whose logits are compared in float32 at a time


def probe_ranks(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    factored: Callable[[str, int], nn.Module],
    ranks: Mapping[str, Sequence[int]],
    windows: Tensor,
    *,
    measure: str = "kl",
    file: Path | None = None,
    progress: bool = True,
) -> dict[str, dict[int, float]]:
    """Put one factored layer at a time into `model`, at each of its `ranks`, and measure; the model ends as it was.

    Args:
        model: dense, in memory.
        layers: its layers by name.
        factored: (name, rank) -> the layer to try.
        ranks: of each layer.
        windows: [windows, window] int64 token ids; few: every probe runs the model over all of them.
        measure: `kl`, the KL divergence from the dense model, or `loss`, the loss of a causal language model on the
            windows, both in nats per token. Models without logits give half the squared error of their hidden state.
        file: one JSON line for each probe, read first: a killed run goes on where it stopped.
        progress: show a bar on standard error.
    """
    done = _read(file)
    tasks = [(name, rank) for name, wanted in ranks.items() for rank in wanted if (name, rank) not in done]
    if tasks:
        windows = windows.to(next(model.parameters()).device)
        with _measuring(model):
            by_loss = measure == "loss" and is_causal(model)
            dense = [] if by_loss else [_outputs(model, ids.unsqueeze(0)) for ids in windows]
            for name, rank in tqdm(tasks, desc="probing", unit="rank", disable=not progress, leave=False):
                replace_module_(model, name, factored(name, rank))
                try:
                    done[name, rank] = _measured(model, windows, dense)
                finally:
                    replace_module_(model, name, layers[name])
                _append(file, name, rank, done[name, rank])
    return {name: {rank: done[name, rank] for rank in wanted} for name, wanted in ranks.items()}


def block_influence(model: nn.Module, windows: Tensor, layers: Sequence[str]) -> dict[str, float]:
    """1 - cosine of input and output of the block that each layer stands in, averaged over tokens; 1 outside of blocks.

    Blocks are the items of the outermost `ModuleList`s; `windows` [windows, window] int64.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = {names[block]: block for block in blocks_of(model)}
    totals = dict.fromkeys(blocks, 0.0)
    counts = dict.fromkeys(blocks, 0)

    def watch(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs.get("hidden_states")
            after = output[0] if isinstance(output, tuple) else output
            if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape:
                cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
                totals[name] += float((1 - cosine).sum())
                counts[name] += cosine.numel()

        return add

    handles = [block.register_forward_hook(watch(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        with _measuring(model):
            for ids in windows.to(next(model.parameters()).device):
                model(**model_inputs(model, ids.unsqueeze(0)))
    finally:
        for handle in handles:
            handle.remove()
    means = {name: totals[name] / counts[name] for name in blocks if counts[name]}
    return {layer: next((v for name, v in means.items() if layer.startswith(f"{name}.")), 1.0) for layer in layers}


def _measured(model: nn.Module, windows: Tensor, dense: Sequence[Tensor]) -> float:
    """Nats per token: how far from the `dense` outputs, or without these the loss on the windows."""
    total, tokens = 0.0, 0
    for at, ids in enumerate(windows):
        outputs = _outputs(model, ids.unsqueeze(0))
        if not dense:
            logp = outputs[:-1].float().log_softmax(-1)
            total -= float(logp.gather(1, ids[1:].unsqueeze(1)).double().sum())
            tokens += len(ids) - 1
        else:
            total += _distance(dense[at], outputs, has_head(model))
            tokens += len(outputs)
    return total / tokens


def _distance(dense: Tensor, pruned: Tensor, logits: bool) -> float:
    """Summed over tokens: KL(dense || pruned) of logits, half the squared error of hidden states; [tokens, width]."""
    total = 0.0
    for p, q in zip(dense.split(ROWS), pruned.split(ROWS), strict=True):
        if logits:
            logp, logq = p.float().log_softmax(-1), q.float().log_softmax(-1)
            total += float((logp.exp() * (logp - logq)).sum(-1).double().sum())
        else:
            total += 0.5 * float((p.float() - q.float()).square().double().sum())
    return total


def _outputs(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, else the last hidden state, [tokens, width]."""
    output = model(**model_inputs(model, ids))
    found: Tensor = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    return found.reshape(-1, found.shape[-1])


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _read(file: Path | None) -> dict[tuple[str, int], float]:
    """The probes on file; a line that was cut off by a kill is left out."""
    found: dict[tuple[str, int], float] = {}
    if file is not None and file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                name, rank, value = json.loads(line)
                found[str(name), int(rank)] = float(value)
            except (ValueError, TypeError):
                continue
    return found


def _append(file: Path | None, name: str, rank: int, value: float) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps([name, rank, value]) + "\n")
