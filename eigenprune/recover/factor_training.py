# SPDX-License-Identifier: Apache-2.0
"""How the two factors of a pruned layer are trained: together or in turns, with orthonormal rows or as they come."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from eigenprune.errors import ConfigError
from eigenprune.layers import LowRankLinear, is_quantised, low_rank_layers
from eigenprune.recover.optimizer_state import check_state, mapped_states


class FactorTraining(TrainerCallback):
    """Train the factors of a pruned model in turns, or keep the rows of `right` orthonormal, or both.

    Without this callback both factors train together, as any two linears do. All counts are of optimizer steps, and no
    state is kept between them, so a resumed run is the unbroken one.

        trainer = Trainer(model, args, ..., callbacks=[FactorTraining(alternate=50)])

    Args:
        alternate: for so many steps only `left` learns, then only `right` for as many, and so on, as in the update of
            SVD-LLM (arXiv 2403.07378). The gradient of the resting factor is dropped before the step, so that its
            weight, its optimizer state and its weight decay rest too. None trains both at once.
        orthonormal: after every so many steps, and at the end of training, `right` gets orthonormal rows and `left`
            takes up the rest (`orthonormalise_`). Layout `pair` only. None leaves the factors as they come.

    Raises:
        ConfigError: both are None, or one is below 1; at the start of training also: no factored layer, or, for
            orthonormal rows, a layer of layout `pivot`, or sharded weights (FSDP).
    """

    def __init__(self, *, alternate: int | None = None, orthonormal: int | None = None) -> None:
        if alternate is None and orthonormal is None:
            raise ConfigError("both factors train together by themselves: give alternate=, orthonormal= or both")
        for name, value in (("alternate", alternate), ("orthonormal", orthonormal)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value!r} must be at least 1 optimizer step")
        self.alternate, self.orthonormal = alternate, orthonormal

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        """Look at the model before the first step."""
        layers = low_rank_layers(model)
        if not layers:
            raise ConfigError("the model has no factored layer: prune it first")
        if self.orthonormal is not None:
            for name, layer in layers.items():
                _check_layer(layer, name)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        """Drop the gradients of the factors that rest."""
        if self.alternate is None:
            return
        resting = ("right", "left")[state.global_step // self.alternate % 2]
        for layer in low_rank_layers(model).values():
            layer.get_submodule(resting).weight.grad = None

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **rest: Any
    ) -> None:
        """Make rows orthonormal when it is time."""
        if self.orthonormal is not None and (
            state.global_step % self.orthonormal == 0 or state.global_step == state.max_steps
        ):
            orthonormalise_(model, optimizer=optimizer)


@torch.no_grad()
def orthonormalise_(model: nn.Module, *, optimizer: Any = None) -> nn.Module:
    """Give `right` [rank, in] of every factored layer orthonormal rows, in place, and leave the weights as they are.

    With right^T = Q T (T upper triangular with a positive diagonal), right becomes Q^T and left becomes left T^T, in
    float64. T is near the identity where the rows are nearly orthonormal, and the optimizer's state goes along, so that
    training goes on as if nothing had happened. Rows that depend on others (T singular) are left as they are.

    Args:
        model: holds layers of layout `pair`.
        optimizer: of torch, or wrapped by accelerate.

    Returns:
        `model`.

    Raises:
        ConfigError: a layer of layout `pivot`, whose rows are rows of the weight; sharded weights; or an optimizer
            whose state cannot be carried along. Nothing is changed.
    """
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        _check_layer(layer, name)
        check_state(optimizer, layer, name)
    for layer in layers.values():
        _orthonormalise_layer_(layer, optimizer)
    return model


def _check_layer(layer: LowRankLinear, name: str) -> None:
    if layer.layout != "pair":
        raise ConfigError(f"{name} has the layout pivot, whose rows are rows of the weight: prune with layout='pair'")
    if is_quantised(layer.right.weight):
        raise ConfigError(f"{name} is quantised, and integers are not trained: train first, then quantise")
    if isinstance(layer.right.weight, DTensor):
        raise ConfigError(f"{name} is sharded (FSDP): train with whole weights in each process (DDP)")


def _orthonormalise_layer_(layer: LowRankLinear, optimizer: Any) -> None:
    left, right = layer.left.weight, layer.right.weight
    rows, triangle = torch.linalg.qr(right.double().t())  # [in, rank], [rank, rank]
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(triangle.dtype)
    rows, triangle = rows * signs, triangle * signs.unsqueeze(1)
    if triangle.shape[0] != triangle.shape[1] or not _is_regular(triangle):
        return
    identity = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    right_map = torch.linalg.solve_triangular(triangle.t(), identity, upper=False)
    states = mapped_states(optimizer, layer, triangle.t(), right_map)
    left.copy_(left.double() @ triangle.t())
    right.copy_(rows.t())
    for parameter, state in zip((left, right), states, strict=True):
        if state:
            optimizer.state[parameter].update(state)


def _is_regular(triangle: torch.Tensor) -> bool:
    diagonal = triangle.diagonal()
    return bool(diagonal.numel()) and bool(diagonal.min() > torch.finfo(torch.float32).eps * diagonal.max())
