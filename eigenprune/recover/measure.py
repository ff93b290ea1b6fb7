# SPDX-License-Identifier: Apache-2.0
"""How far a pruned model is from the dense one, on windows that it does not learn from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.calibrate.objective import has_head, model_inputs
from eigenprune.errors import CalibrationError
from eigenprune.recover.compute import computing, device_of
from eigenprune.recover.divergence import summed_divergence
from eigenprune.recover.targets import Targets, logits_of, teacher_targets

HELD_OUT = 16  # one window of so many is measured, and not learned from

Measure = Callable[[nn.Module], float]


def split_windows(count: int) -> tuple[list[int], list[int]]:
    """Indices of the windows to learn from, and of those to measure: every 16th, one at least.

    Raises:
        CalibrationError: fewer than two windows.
    """
    if count < 2:
        raise CalibrationError(f"{count} windows: one to learn from and one to measure are needed at least")
    held_out = range(min(HELD_OUT, count) - 1, count, HELD_OUT)
    return [index for index in range(count) if index not in held_out], list(held_out)


def divergence_from(targets: Targets, indices: Sequence[int]) -> Measure:
    """Mean divergence from the targets of the windows `indices`, in nats per position."""

    def measure(model: nn.Module) -> float:
        with torch.no_grad(), computing(model):
            losses = [float(window_divergence(model, targets, index)) for index in indices]
        return sum(losses) / len(losses)

    return measure


def window_divergence(model: nn.Module, targets: Targets, index: int) -> Tensor:
    """The mean divergence from the targets of one window, a float32 scalar to run backward from."""
    device = device_of(model)
    logits = logits_of(model, targets.windows[index : index + 1].to(device))
    wanted = (targets.log_probabilities[index].to(device), targets.classes[index].to(device))
    return summed_divergence(logits, *wanted) / len(logits)


def distance_from(dense: nn.Module, windows: Tensor) -> Measure:
    """The divergence from the prediction of `dense` on `windows`; without a head, from its last hidden state.

    The latter is the mean over tokens of the squared error over the squared length.
    """
    if has_head(dense):
        return divergence_from(teacher_targets(dense, windows, progress=False), range(len(windows)))
    with torch.no_grad(), computing(dense):
        wanted = [_last_hidden(dense, ids) for ids in windows.split(1)]

    def measure(model: nn.Module) -> float:
        with torch.no_grad(), computing(model):
            errors = [
                float(((_last_hidden(model, ids) - state).square().sum(-1) / state.square().sum(-1)).mean())
                for ids, state in zip(windows.split(1), wanted, strict=True)
            ]
        return sum(errors) / len(errors)

    return measure


def _last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    output: Any = model(**model_inputs(model, ids.to(device_of(model))))
    hidden: Tensor = output.last_hidden_state.float()
    return hidden
