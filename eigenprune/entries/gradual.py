# SPDX-License-Identifier: Apache-2.0
"""`GradualMagnitude`: a callback of the transformers Trainer that prunes small weights to zero while a model trains."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from eigenprune.entries.packed import PackedMasks
from eigenprune.entries.rules import SCOPES
from eigenprune.entries.select import select_entries
from eigenprune.errors import ConfigError
from eigenprune.layers import select_layers


class GradualMagnitude(TrainerCallback):
    """Prune the smallest weights of the linear layers to zero, more of them every `every` steps, and train the rest.

    The kept share falls from 1 along a cubic curve, fast at first, as in Zhu and Gupta (2017, arXiv 1710.01878):
    `keep + (1 - keep) (1 - t)^3`, with t from 0 to 1 between the parts `begin` and `end` of training; then it stays.
    What is zero is set to zero again after each optimizer step. Weights that are zero when training begins stay so,
    so a resumed run goes on as it was.

        from eigenprune.entries.gradual import GradualMagnitude  # loads the Trainer, which the rest here does not need

        trainer = Trainer(model, args, ..., callbacks=[GradualMagnitude(keep=0.5)])

    Args:
        keep: share of the linear weights that is left at the end, in [0, 1].
        every: optimizer steps between two prunings.
        begin, end: parts of training, 0 <= begin < end <= 1.
        scope: what each share is taken of: `row`, `layer` or `global`.
        least: with scope `global`, the share that every layer keeps at least.
        skip: regular expressions of layers to leave alone, as in `select_layers`: heads and embeddings always are.

    Attributes:
        kept: the share of the weights that is not pruned now.

    Raises:
        ConfigError: a setting is out of range; at the start of training also: no layer to prune, or sharded weights.
    """

    def __init__(
        self,
        keep: float,
        *,
        every: int = 100,
        begin: float = 0.0,
        end: float = 0.7,
        scope: str = "layer",
        least: float = 0.0,
        skip: Sequence[str] = (),
    ) -> None:
        if not 0 <= keep <= 1:
            raise ConfigError(f"keep={keep!r} must be in [0, 1]: the share of the weights that stays")
        if every < 1:
            raise ConfigError(f"every={every!r} must be at least 1 optimizer step")
        if not 0 <= begin < end <= 1:
            raise ConfigError(f"begin={begin!r}, end={end!r}: 0 <= begin < end <= 1 are parts of training")
        if scope not in SCOPES:
            raise ConfigError(f"scope {scope!r} is unknown; there are: {', '.join(SCOPES)}")
        if not 0 <= least <= keep or (least and scope != "global"):
            raise ConfigError(f"least={least!r} must be in [0, keep], and needs scope='global'")
        self.keep, self.every, self.begin, self.end = keep, every, begin, end
        self.scope, self.least, self.skip = scope, least, tuple(skip)
        self.kept = 1.0
        self._masks: dict[str, Tensor] = {}

    def keep_at(self, step: int, steps: int) -> float:
        """The share that stays after optimizer step `step` of `steps`."""
        part = min(1.0, max(0.0, (step / max(1, steps) - self.begin) / (self.end - self.begin)))
        return self.keep + (1 - self.keep) * (1 - part) ** 3

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        """Look at the model, and keep the zeros that it has."""
        weights = self._weights(model)
        if not weights:
            raise ConfigError("the model has no linear layer to prune")
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            raise ConfigError("the weights are sharded (FSDP): train with whole weights in each process (DDP)")
        self._masks = {name: weight != 0 for name, weight in weights.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        """Prune if it is time, and set what is pruned to zero."""
        weights = self._weights(model)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._prune(weights, self.keep_at(state.global_step, state.max_steps))
        self._apply_(weights)

    def _prune(self, weights: dict[str, Tensor], keep: float) -> None:
        """New masks. Pruned weights are zero, so they have the lowest scores and stay pruned."""
        self._apply_(weights)
        least = min(self.least, keep)
        chosen: PackedMasks = select_entries(
            {}, weights, "magnitude", keep, scope=self.scope, least=least, reset="zero", keep_whole=()
        )
        self._masks = {name: chosen[name].to(weight.device) & (weight != 0) for name, weight in weights.items()}
        entries = sum(weight.numel() for weight in weights.values())
        self.kept = sum(int(mask.sum()) for mask in self._masks.values()) / entries

    @torch.no_grad()
    def _apply_(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            weight.mul_(self._masks[name])

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights to prune, which share their memory with the model's, in model order."""
        layers = select_layers(model, self.skip).chosen
        return {name: cast(Tensor, module.weight).detach() for name, module in layers.items()}
