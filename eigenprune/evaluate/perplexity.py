# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a causal language model over windows of token ids, and two ways to cut such windows."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.errors import CalibrationError, WeightError
from eigenprune.evaluate._mode import evaluation, input_device, vocabulary_size

# Rows of logits turned into float32 losses at a time: 128 x 49152 x 4 bytes is 25 MB.
_ROWS_PER_CHUNK = 128


@dataclass(frozen=True)
class Perplexity:
    """What was measured, and on which tokens; two results compare only if their `token_hash` is the same.

    perplexity: exp(loss); infinity where that overflows a float64.
    loss: mean negative log likelihood of a predicted token, in nats.
    tokens: how many tokens were predicted (each window's first one is not).
    windows: how many windows they came in.
    token_hash: SHA-256, in hex, over the token ids of the windows in order, as little-endian int64.
    seconds: wall time of the whole measurement.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    token_hash: str
    seconds: float

    def to_dict(self) -> dict[str, float | int | str]:
        """The fields by name, ready for JSON (a perplexity of infinity becomes JSON's `Infinity`)."""
        return dataclasses.asdict(self)


def contiguous_windows(ids: Tensor, window: int) -> list[Tensor]:
    """Cut `ids [n]` (integers) into consecutive windows that overlap by one token.

    Every token but the first is predicted exactly once. All windows have `window` tokens, except that the
    last may be shorter; they are views of `ids`. Raises `CalibrationError` for fewer than 2 tokens, a window
    below 2, or ids that are no integer vector.
    """
    _check_window(ids, window, at_least=2)
    return [ids[start : start + window] for start in range(0, len(ids) - 1, window - 1)]


def spaced_windows(ids: Tensor, window: int, count: int) -> list[Tensor]:
    """Take `count` windows of exactly `window` tokens at even spacing over `ids [n]` (integers).

    The first starts at 0, the last ends at the end of the text (a single one starts at 0). They overlap where
    `count * window > n`, and are views of `ids`. Raises `CalibrationError` for a text shorter than a window,
    a count below 1, a window below 2, or ids that are no integer vector.
    """
    _check_window(ids, window, at_least=window)
    if count < 1:
        raise CalibrationError(f"count is {count}: ask for at least one window")
    last = len(ids) - window
    starts = [index * last // max(count - 1, 1) for index in range(count)]
    return [ids[start : start + window] for start in starts]


def perplexity(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> Perplexity:
    """Predict tokens 2..n of each window from those before them, and average over all predicted tokens.

    model: called as `model(input_ids=[1, n], use_cache=False)`; the result has `.logits [1, n, vocabulary]`.
        It runs in evaluation mode without gradients; afterwards, also after an error, each module has its own
        mode back.
    windows: integer tensors `[n]` with n >= 2, as the two functions above make them; each is read on its own.
    progress: show a bar on standard error.
    device: where the ids go; by default the device of the model's first parameter. The model is not moved.

    Losses are taken in float32 and summed in float64; no second copy of the logits is made. Raises
    `CalibrationError` for no window, a window of fewer than 2 tokens or an id outside the vocabulary, and
    `WeightError`, naming the window, for logits that are not finite.
    """
    began = time.perf_counter()
    _check_windows(windows, vocabulary_size(model))
    where = input_device(model) if device is None else torch.device(device)
    total, tokens = 0.0, 0
    bar = tqdm(total=len(windows), desc="perplexity", file=sys.stderr, disable=not progress)
    with bar, evaluation(model):
        for index, window in enumerate(windows):
            total += _window_loss(model, window.to(where, torch.int64), f"window {index} of {len(windows)}")
            tokens += len(window) - 1
            bar.update()
            bar.set_postfix(perplexity=f"{_exp(total / tokens):.2f}")
    loss = total / tokens
    seconds = time.perf_counter() - began
    return Perplexity(_exp(loss), loss, tokens, len(windows), _token_hash(windows), seconds)


def _window_loss(model: nn.Module, window: Tensor, name: str) -> float:
    """Sum of the losses of tokens 2..n, in nats; `window [n]` lies where the model reads it."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]  # [n - 1, vocabulary], a view
    targets = window[1:].to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, len(targets), _ROWS_PER_CHUNK):
        rows = logits[start : start + _ROWS_PER_CHUNK].float()
        if not torch.isfinite(rows).all():
            raise WeightError(
                f"{name}: logits are NaN or infinite in positions {start} to {start + len(rows) - 1}; look"
                " for NaN or infinite weights, or for an overflow: run the model in float32 or bfloat16"
            )
        losses = nn.functional.cross_entropy(rows, targets[start : start + len(rows)], reduction="none")
        total += losses.double().sum()
    return float(total)


def _check_window(ids: Tensor, window: int, at_least: int) -> None:
    """Refuse ids that cannot be cut into windows of this length."""
    if window < 2:
        raise CalibrationError(f"window is {window}: it takes at least 2 tokens to predict one from another")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"token ids must be an integer vector [n], got {ids.dtype} of shape {list(ids.shape)}")
    if len(ids) < at_least:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, {at_least} are needed: give more text or a shorter window"
        )


def _check_windows(windows: Sequence[Tensor], vocabulary: int | None) -> None:
    """Refuse windows before any time is spent on the model."""
    if len(windows) == 0:
        raise CalibrationError("there is no window to evaluate: give a text of at least 2 tokens")
    for index, window in enumerate(windows):
        try:
            _check_window(window, window=2, at_least=2)
        except CalibrationError as error:
            raise CalibrationError(f"window {index} of {len(windows)}: {error}") from None
        low, high = int(window.min()), int(window.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            wrong = low if low < 0 else high
            raise CalibrationError(
                f"window {index} of {len(windows)}: token id {wrong} is outside the model's vocabulary"
                f" of {vocabulary}: use the tokenizer that belongs to this model"
            )


def _token_hash(windows: Sequence[Tensor]) -> str:
    """SHA-256 over the ids of all windows in order."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def _exp(loss: float) -> float:
    """`exp`, with infinity in place of an overflow."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf
