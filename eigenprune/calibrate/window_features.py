# SPDX-License-Identifier: Apache-2.0
"""What the rules of `choice` look at: numbers of a token window under a model, measured one window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.choice import FEATURES
from eigenprune.calibrate.collect import calibration_mode
from eigenprune.calibrate.objective import ROWS, is_causal, model_inputs, next_token_loss
from eigenprune.errors import CalibrationError


def window_features(
    model: nn.Module,
    windows: Tensor,
    names: Sequence[str],
    *,
    layers: Mapping[str, nn.Module] | None = None,
    pruned: nn.Module | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Features of windows.

    * `embedding [n, width]`: the last hidden state, averaged over the window.
    * `el2n [n]`: the length of the error vector `softmax(logits) - onehot(next token)`, averaged over tokens (Paul et
      al., arXiv 2107.07075; over tokens as in Marion et al., arXiv 2309.04564).
    * `grand [n]`: the length of the gradient of the mean token loss with respect to the weights of `layers` (Paul et
      al.), with the trained weights in place of many early ones. Each layer's gradient is made, measured, and dropped.
    * `damage [n]`: the divergence of Jensen and Shannon between the predictions of `model` and of `pruned`, in nats,
      averaged over tokens.

    Args:
        model: a causal language model of transformers; weights, gradient flags and mode are as before afterwards.
        windows: [n, window] int64.
        names: of `FEATURES`.
        layers: the linear layers whose gradient `grand` measures, by name.
        pruned: the model that `damage` compares with, on the same device.
        progress: show a bar on standard error.

    Returns:
        Float32 tensors on the CPU by name, and `index [n]`, which costs nothing.

    Raises:
        CalibrationError: a name is unknown, what it needs is not given, or the model is no causal language model.
    """
    unknown = set(names) - set(FEATURES)
    if unknown:
        raise CalibrationError(f"unknown features {sorted(unknown)}; there are: {', '.join(FEATURES)}")
    if "damage" in names and pruned is None:
        raise CalibrationError("damage is told by a pruned model: give a first, cheap one as pruned")
    if names and not is_causal(model):
        raise CalibrationError(f"{type(model).__name__} predicts no next token, which all features are about")
    if "grand" in names and not layers:
        raise CalibrationError("grand needs the layers whose gradient is measured")
    found: dict[str, list[Tensor]] = {name: [] for name in dict.fromkeys(names)}
    forward = [name for name in found if name != "grand"]
    with tqdm(total=len(windows), desc="looking at windows", unit="window", disable=not progress, leave=False) as bar:
        for ids in windows.to(next(model.parameters()).device).split(1):
            if forward:
                for name, value in _forward_features(model, ids, forward, pruned).items():
                    found[name].append(value)
            if "grand" in found:
                found["grand"].append(gradient_length(model, ids, layers or {}))
            bar.update()
    stacked = {name: torch.stack(values).float().cpu() for name, values in found.items()}
    return {"index": torch.arange(len(windows)).float()} | stacked


def _forward_features(
    model: nn.Module, ids: Tensor, names: Sequence[str], pruned: nn.Module | None
) -> dict[str, Tensor]:
    hidden: list[Tensor] = []
    with torch.no_grad(), calibration_mode(model, False), _read_by_head(model, hidden):
        output = model(**model_inputs(model, ids))
    found: dict[str, Tensor] = {}
    if "embedding" in names:
        found["embedding"] = hidden[0][0].float().mean(0)
    if "el2n" in names:
        found["el2n"] = error_length(output.logits[0, :-1], ids[0, 1:])
    if "damage" in names and pruned is not None:
        with torch.no_grad(), calibration_mode(pruned, False):
            other = pruned(**model_inputs(pruned, ids)).logits[0]
        found["damage"] = mean_divergence(output.logits[0], other)
    return found


@contextmanager
def _read_by_head(model: nn.Module, into: list[Tensor]) -> Iterator[None]:
    """While inside, what the language-model head reads is kept.

    Not `output_hidden_states`: transformers 5 leaves hooks in the model for that.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _module, args: into.append(args[0].detach()))
    try:
        yield
    finally:
        handle.remove()


def error_length(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of `|softmax(logits) - onehot(target)|`; logits [rows, vocabulary], targets [rows] int64."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, wanted in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
        error = rows.float().softmax(-1)
        error.scatter_add_(1, wanted[:, None], error.new_full((len(wanted), 1), -1.0))
        total += error.norm(dim=1).double().sum()
    return total / len(targets)


def mean_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Mean over rows of the Jensen-Shannon divergence of two predictions, in nats; logits [rows, vocabulary] each."""
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    for a, b in zip(first.split(ROWS), second.split(ROWS), strict=True):
        p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
        # log of the mean of both, without leaving logarithms
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        each = (p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)
        total += 0.5 * each.double().sum()
    return total / len(first)


def gradient_length(model: nn.Module, ids: Tensor, layers: Mapping[str, nn.Module]) -> Tensor:
    """Length of the gradient of the mean next-token loss on `ids [1, window]` with respect to the layers' weights."""
    lengths = _GradientLengths(layers)
    with calibration_mode(model, True), lengths.watching():
        loss = next_token_loss(model, ids, torch.Generator())
        lengths.recomputing = True  # checkpointed blocks run again in backward
        loss.backward()
    return lengths.squares.sqrt() / (ids.shape[1] - 1)


class _GradientLengths:
    """Hooks that sum the squared length of each layer's weight gradient, `|sum_t g_t x_t^T|^2`, and keep no gradient.

    A layer that runs more than once in a forward counts once for each run, not for their sum.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.squares = torch.zeros((), dtype=torch.float64)
        self.recomputing = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [layer.register_forward_hook(self._hook) for layer in self.layers.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not self.recomputing and output.requires_grad:
            output.register_hook(self._adder(args[0].detach()))

    def _adder(self, x: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                product: Any = gradient.flatten(0, -2).float().t() @ x.flatten(0, -2).float()
                self.squares += product.double().square().sum().cpu()

        return add
