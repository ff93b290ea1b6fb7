# SPDX-License-Identifier: Apache-2.0
"""Input statistics where there is little or no text: those of random tokens, alone or mixed in (distill-rank, 2026)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenprune.calibrate.statistics import Statistics
from eigenprune.errors import ConfigError

PRIOR = "random-tokens"
RANK_OFFSET = 256.0  # r0: flattens the head of Zipf's law; about the single bytes that stand before all merges


def prior_windows(tokenizer: Any, vocabulary: int, *, count: int, window: int, seed: int) -> Tensor:
    """Random tokens, [count, window] int64: each drawn alone, with a chance of 1 / (id + r0).

    Tokenizers number their tokens by the order in which they were merged, the frequent first, so that this is Zipf's
    law read off the tokenizer. Special tokens are never drawn.

    Args:
        tokenizer: of the model; None draws from all ids.
        vocabulary: of the model: ids are below it.
        count: how many windows.
        window: tokens in a window.
        seed: of the draws.
    """
    chances = 1 / (torch.arange(vocabulary, dtype=torch.float64) + RANK_OFFSET)
    special = [] if tokenizer is None else [i for i in tokenizer.all_special_ids if 0 <= i < vocabulary]
    if len(special) < vocabulary:
        chances[special] = 0
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(chances, count * window, replacement=True, generator=generator).view(count, window)


@dataclass(frozen=True)
class BlendedStatistics(Statistics):
    """Statistics whose input Grams are mixed with those of a prior; everything else is that of the data.

    C = weight C_prior tr(C_data) / tr(C_prior) + (1 - weight) C_data.

    Attributes:
        prior: statistics of the same layers on other tokens.
        weight: of the prior, in [0, 1]; distill-rank takes a half.
    """

    prior: Statistics | None = None
    weight: float = 0.0

    def input_gram(self, layer: str) -> Tensor:
        """The mixed C, [in, in] float32, symmetric."""
        data = super().input_gram(layer)
        if self.prior is None or self.weight == 0 or layer not in self.prior:
            return data
        prior = self.prior.input_gram(layer)
        trace = float(prior.diagonal().double().sum())
        if trace <= 0:
            return data
        return data * (1 - self.weight) + prior * (self.weight * float(data.diagonal().double().sum()) / trace)


def blended(data: Statistics, prior: Statistics, weight: float) -> BlendedStatistics:
    """`data` with input Grams of which the part `weight` is that of `prior`.

    Raises:
        ConfigError: `weight` is not in [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"the prior's weight {weight!r} must be in [0, 1]")
    return BlendedStatistics(data.tensors, data.input_group, data.facts, prior, weight)
