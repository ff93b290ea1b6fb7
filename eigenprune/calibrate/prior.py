# SPDX-License-Identifier: Apache-2.0
"""Input statistics where there is little or no text: those of random tokens, alone or mixed in (distill-rank, 2026)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.calibrate.statistics import Statistics
from eigenprune.errors import ConfigError

PRIOR = "random-tokens"
RANK_OFFSET = 256.0  # r0: flattens the head of Zipf's law; about the single bytes that stand before all merges


def prior_windows(model: nn.Module, *, count: int, window: int, seed: int) -> Tensor:
    """Random tokens, [count, window] int64: each drawn alone, with a chance of 1 / (id + r0).

    Tokenizers number their tokens by the order in which they were merged, the frequent first, so that this is Zipf's
    law read off the vocabulary. What the config of `model` names as begin, end and padding is never drawn.

    Args:
        model: whose vocabulary it is.
        count: how many windows.
        window: tokens in a window.
        seed: of the draws.
    """
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    chances = 1 / (torch.arange(vocabulary, dtype=torch.float64) + RANK_OFFSET)
    chances[[token for token in _special_tokens(model) if 0 <= token < vocabulary]] = 0
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(chances, count * window, replacement=True, generator=generator).view(count, window)


def _special_tokens(model: nn.Module) -> list[int]:
    config: Any = getattr(model, "config", None)
    if config is None:
        return []
    text = config.get_text_config()
    named = (
        getattr(text, "bos_token_id", None),
        getattr(text, "eos_token_id", None),
        getattr(text, "pad_token_id", None),
    )
    lists = [value if isinstance(value, list | tuple) else [value] for value in named]
    return [token for tokens in lists for token in tokens if isinstance(token, int)]


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
