# SPDX-License-Identifier: Apache-2.0
"""Texts to equal windows of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eigenprune.errors import CalibrationError

SEPARATOR = "\n\n"


def cut_windows(tokenizer: Any, texts: Sequence[str], *, count: int = 64, window: int = 1024) -> Tensor:
    """Cut `count` windows of `window` tokens out of `texts`, without special tokens; the same texts give the same
    windows.

    Where at least `count` documents are as long as a window, the first tokens of the first `count` of them are taken,
    so that the windows come from as many documents as possible. Else all documents are joined with blank lines, cut
    into consecutive windows, and `count` of these are taken at even spacing (all of them where there are fewer).

    Args:
        tokenizer: a transformers tokenizer.
        texts: documents.
        count: how many windows at most.
        window: tokens in a window.

    Returns:
        [windows, window] int64, 1 <= windows <= count.

    Raises:
        CalibrationError: the texts hold less than one window.
    """
    if count < 1 or window < 2:
        raise CalibrationError(f"{count} windows of {window} tokens: at least 1 window of 2 tokens is needed")
    firsts = _first_windows(tokenizer, texts, count, window)
    if len(firsts) == count:
        return torch.tensor(firsts)
    ids = token_ids(tokenizer, SEPARATOR.join(text.strip() for text in texts if text.strip()))
    whole = len(ids) // window
    if whole == 0:
        raise CalibrationError(
            f"the texts hold {len(ids)} tokens, less than one window of {window}: "
            f"pass more text, or shorter windows (window={max(2, len(ids))} at most)"
        )
    rows = torch.tensor(ids[: whole * window]).view(whole, window)
    if whole <= count:
        return rows
    return rows[torch.linspace(0, whole - 1, count).round().long()]


def _first_windows(tokenizer: Any, texts: Sequence[str], count: int, window: int) -> list[list[int]]:
    """The first `window` tokens of the first `count` documents that have as many."""
    rows: list[list[int]] = []
    for text in texts:
        # A token stands for at least one byte, a quarter of a character, and no known vocabulary averages 32 characters
        # on prose: skip what is surely too short, and do not tokenise the rest of a long book for its first page.
        if 4 * len(text) < window:
            continue
        ids = token_ids(tokenizer, text[: 32 * window])
        if len(ids) >= window:
            rows.append(ids[:window])
        if len(rows) == count:
            break
    return rows


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text` with no special token added, and no warning that they exceed the model's length."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
