# SPDX-License-Identifier: Apache-2.0
"""Leaving a model as it was when something fails."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from eigenprune.layers.dense import dense_weight
from eigenprune.layers.swap import replace_module_


@contextmanager
def undo_on_error(model: nn.Module, dense: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put the `dense` layers and the attributes of model and config back if anything fails, an interrupt included."""
    configs = (getattr(part, "config", None) for part in model.modules())
    owners = [model, *(config for config in configs if hasattr(config, "__dict__"))]
    attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
    try:
        yield
    except BaseException:
        for name, module in dense.items():
            replace_module_(model, name, module)
        for now, then in attributes:
            now.clear()
            now.update(then)
        raise


@contextmanager
def weights_kept(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put the weights and biases of `layers` back, bit for bit, if anything fails."""
    weights = {name: dense_weight(layer).detach().clone() for name, layer in layers.items()}
    biases = {name: dict(layer.named_parameters()).get("bias") for name, layer in layers.items()}
    values = {name: None if bias is None else bias.detach().clone() for name, bias in biases.items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, bias in biases.items():
                dense_weight(layers[name]).copy_(weights[name])
                layers[name].register_parameter("bias", bias)
                value = values[name]
                if bias is not None and value is not None:
                    bias.copy_(value)
        raise
