# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a pruned model are trained, and a copy of it that has them in float32."""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from eigenprune.layers import low_rank_layers


def factors_and_vectors(model: nn.Module) -> list[str]:
    """Names of the weights of all layers that are factored or have lost channels, and of all biases and norms."""
    pruned = low_rank_layers(model) | narrowed_layers(model)
    factors = {id(p) for layer in pruned.values() for p in layer.parameters()}
    return [name for name, p in _numbers(model) if id(p) in factors or p.ndim <= 1]


def narrowed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that have lost hidden channels, by name, as the config says by which it is saved."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return {name: model.get_submodule(name) for name in getattr(config, "shapes", {})}


def vectors(model: nn.Module) -> list[str]:
    """Names of all biases and norms (PERP, arXiv 2312.15230): well below a hundredth of a model."""
    return [name for name, p in _numbers(model) if p.ndim <= 1]


def trainable_copy(model: nn.Module, names: Iterable[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A float32 copy of `model` in which just the parameters of those names require gradients, with these by name.

    Float32 parameters that are not trained are shared with `model`, not copied.
    """
    wanted = set(names)
    shared: dict[int, object] = {}
    for name, parameter in model.named_parameters():
        if name not in wanted and parameter.dtype == torch.float32:
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    copied = copy.deepcopy(model, shared)
    for name, parameter in copied.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
            parameter.grad = None
            parameter.requires_grad_(name in wanted)
    return copied, {name: parameter for name, parameter in copied.named_parameters() if name in wanted}


@torch.no_grad()
def adopt_(model: nn.Module, trained: nn.Module) -> None:
    """Give `model` the trained parameters, and the pivots, of its copy `trained`."""
    own = dict(model.named_parameters())
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            own[name].copy_(parameter)
    for name, layer in low_rank_layers(trained).items():
        if layer.layout == "pivot":
            model.get_submodule(name).pivots.copy_(layer.pivots)  # type: ignore[operator]


@torch.no_grad()
def round_(trained: nn.Module, like: nn.Module) -> None:
    """Round the trained parameters to the dtypes that those of the model `like` have."""
    own = dict(like.named_parameters())
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(own[name].dtype))


def _numbers(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point()]
