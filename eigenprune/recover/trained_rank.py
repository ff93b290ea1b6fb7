# SPDX-License-Identifier: Apache-2.0
"""`TrainedRankPruning`: a callback of the transformers Trainer that trains a model towards low rank."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.quantizers.auto import AutoHfQuantizer

from eigenprune.calibrate import Statistics
from eigenprune.errors import ConfigError
from eigenprune.layers import dense_weight, factored_parameters, low_rank_layers, replace_module_, select_layers
from eigenprune.recover.rank_pruning import RankTarget, choose_ranks, low_rank_factors
from eigenprune.spectral import Metric, find_method, layer_metric, layer_of_factors


class TrainedRankPruning(TrainerCallback):
    """Train a dense model so that it can be factored at the end with little loss, and factor it then.

    Trained Rank Pruning (arXiv 2004.14566): every `every` optimizer steps each linear weight is replaced by its best
    approximation of a rank, chosen anew each time, and trained on at full rank in between. What the steps between two
    truncations would take off the nuclear norm by its subgradient, `learning rate x nuclear x every`, is taken off the
    singular values at the truncation, in one proximal step: as with decoupled weight decay, the optimizer's own scaling
    of gradients does not enter. No state is kept between two steps, so a resumed run is the unbroken one.

        trainer = Trainer(model, args, ..., callbacks=[TrainedRankPruning(keep=0.6)])
        trainer.train()
        trainer.save_model("small")          # factored; loads with plain `from_pretrained`

    Checkpoints during training are dense, and resumable as ever; at the end of training the model is factored in place.
    Counts optimizer steps, so it works with gradient accumulation; with several processes (DDP, accelerate) each does a
    part of the decompositions and sends the results to the others. Memory: float64 copies of the layer at work.

    Args:
        keep, energy, allocation, layout, rank_multiple: as in `RankTarget`.
        every: optimizer steps between two truncations.
        nuclear: weight of the nuclear norm in the loss; plain metric (`method="svd"`) only.
        ramp: the part of training, in [0, 1], over which a budget falls from 1 to `keep`. The rest trains at `keep`.
        method: a row of the method table: the metric in which weights are approximated.
        statistics: what the method needs, collected on the model before training. They are not renewed.
        skip: as in `EigenpruneConfig`.

    Attributes:
        ranks: {layer: rank} of the last truncation; 0 stands for a layer that stays dense.

    Raises:
        ConfigError: a setting is out of range or at odds with another; at the start of training also: the model is
            factored already, has no trainable layer to prune, or its weights are sharded (FSDP).
    """

    def __init__(
        self,
        *,
        keep: float | None = None,
        energy: float | None = None,
        every: int = 20,
        nuclear: float = 0.0,
        ramp: float = 0.5,
        method: str = "svd",
        statistics: Statistics | None = None,
        allocation: str | None = None,
        layout: str = "pivot",
        rank_multiple: int = 8,
        skip: Sequence[str] = (),
    ) -> None:
        self.method = find_method(method)
        self.target = RankTarget(keep, energy, allocation or self.method.allocation, layout, rank_multiple)
        if every < 1:
            raise ConfigError(f"every={every!r} must be at least 1 optimizer step")
        if not 0 <= ramp <= 1:
            raise ConfigError(f"ramp={ramp!r} must be in [0, 1]: the part of training over which the budget falls")
        if nuclear < 0 or (nuclear and method != "svd"):
            raise ConfigError("nuclear is a weight from 0 on, and needs method='svd', whose metric is the plain one")
        if statistics is None:
            layer_metric(self.method, None, "")  # refuses a method that needs them
        self.method_name, self.every, self.nuclear, self.ramp = method, every, nuclear, ramp
        self.statistics, self.skip = statistics, tuple(skip)
        self.ranks: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        """Look at the model before the first step."""
        if low_rank_layers(model):
            raise ConfigError("the model is factored already: train its factors as they are, or start from a dense one")
        layers = self._layers(model)
        if not layers:
            raise ConfigError("the model has no trainable linear layer to prune; adapters are not truncated")
        if any(isinstance(dense_weight(module), DTensor) for module in layers.values()):
            raise ConfigError("the weights are sharded (FSDP): train with whole weights in each process (DDP)")

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **rest: Any
    ) -> None:
        """Truncate after every `every`-th optimizer step."""
        if state.global_step % self.every == 0:
            layers = self._layers(model)
            self._choose(layers, self.keep_at(state.global_step, state.max_steps))
            self._truncate_(layers, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        """Factor the model at the target."""
        layers = self._layers(model)
        self._choose(layers, self.target.keep or 1.0)
        for number, (name, module) in enumerate(layers.items()):
            if not self.ranks[name]:
                continue
            left, right = self._factors(number, name, module, 0.0)
            replace_module_(model, name, layer_of_factors(module, left, right, self.target.layout))
        _make_savable_(model, self._settings(self._kept(layers)))

    def keep_at(self, step: int, steps: int) -> float:
        """The budget after `step` of `steps` optimizer steps: down from 1 along a line, then at the target."""
        progress = step / (self.ramp * steps) if self.ramp * steps > 0 else 1.0
        return 1 - (1 - (self.target.keep or 1.0)) * min(1.0, progress)

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        chosen = select_layers(model, self.skip).chosen
        return {
            name: module
            for name, module in chosen.items()
            if dense_weight(module).requires_grad and (self.statistics is None or name in self.statistics)
        }

    def _metric(self, name: str, device: torch.device) -> Metric:
        return layer_metric(self.method, self.statistics, name, device)

    def _choose(self, layers: dict[str, nn.Module], keep: float) -> None:
        """Set `ranks`; the first process decides."""
        ranks = torch.zeros(len(layers), dtype=torch.long)
        if _process() == 0:
            chosen = choose_ranks(
                layers, self.target, keep, lambda name: self._metric(name, dense_weight(layers[name]).device)
            )
            ranks = torch.tensor(list(chosen.values()))
        if _processes() > 1:
            ranks = ranks.to(dense_weight(next(iter(layers.values()))).device)
            distributed.broadcast(ranks, 0)
        self.ranks = dict(zip(layers, ranks.tolist(), strict=True))

    @torch.no_grad()
    def _truncate_(self, layers: dict[str, nn.Module], optimizer: Any) -> None:
        for number, (name, module) in enumerate(layers.items()):
            if not self.ranks[name]:
                continue
            shrink = self.nuclear * self.every * _learning_rate(optimizer, module) if self.nuclear else 0.0
            left, right = self._factors(number, name, module, shrink)
            dense_weight(module).copy_(left @ right)

    def _factors(self, number: int, name: str, module: nn.Module, shrink: float) -> tuple[Tensor, Tensor]:
        """The factors of one layer, made by one process for all."""
        weight, rank = dense_weight(module).detach(), self.ranks[name]
        owner = number % _processes()
        if _process() == owner:
            left, right = low_rank_factors(weight, self._metric(name, weight.device), rank, shrink)
        else:
            left = weight.new_empty(weight.shape[0], rank, dtype=torch.float64)
            right = weight.new_empty(rank, weight.shape[1], dtype=torch.float64)
        if _processes() > 1:
            left, right = left.contiguous(), right.contiguous()
            distributed.broadcast(left, owner)
            distributed.broadcast(right, owner)
        return left, right

    def _kept(self, layers: dict[str, nn.Module]) -> float:
        """The part of the parameters of these dense `layers` that stays at `ranks`."""
        kept = dense = 0
        for name, module in layers.items():
            m, n = dense_weight(module).shape
            dense += m * n
            kept += factored_parameters(self.ranks[name], m, n, self.target.layout) if self.ranks[name] else m * n
        return kept / dense

    def _settings(self, kept: float) -> dict[str, Any]:
        trained = {"every": self.every, "nuclear": self.nuclear, "ramp": self.ramp, "energy": self.target.energy}
        return {
            "method": self.method_name,
            "layout": self.target.layout,
            "allocation": self.target.allocation,
            "rank_multiple": self.target.rank_multiple,
            "skip": list(self.skip),
            "keep": self.target.keep or kept,
            # No base: nobody can make these weights again by pruning one.
            "provenance": {"trained_rank_pruning": trained, "keep": kept},
        }


def _make_savable_(model: nn.Module, settings: dict[str, Any]) -> None:
    """Give a transformers model the quantizer that saves it, found through transformers' own table."""
    modules = {name: [module.layout, module.rank] for name, module in low_rank_layers(model).items()}
    if not modules or not isinstance(model, PreTrainedModel):
        return
    config = {"quant_method": "eigenprune", "modules": modules} | settings
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _learning_rate(optimizer: Any, module: nn.Module) -> float:
    """The one at which this layer is trained."""
    weight = module.get_parameter("weight")
    for group in getattr(optimizer, "param_groups", ()):
        if any(parameter is weight for parameter in group["params"]):
            return float(group["lr"])
    raise ConfigError("the optimizer does not hold a layer's weight, so that its learning rate is unknown: nuclear=0")


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _process() -> int:
    return distributed.get_rank() if _processes() > 1 else 0
