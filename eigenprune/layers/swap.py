# SPDX-License-Identifier: Apache-2.0
"""Put factored layers into a model, and turn them back to dense."""

from torch import nn

from eigenprune.layers.dense import dense_like
from eigenprune.layers.low_rank_linear import LowRankLinear
from eigenprune.layers.quantised import dequantize_


def replace_module_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` stands in `model`, in the same training mode."""
    new.train(model.get_submodule(name).training)
    model.set_submodule(name, new, strict=True)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The factored layers of `model`, by name in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def to_dense_(model: nn.Module) -> nn.Module:
    """Multiply every factored layer of `model` out, in place: `nn.Linear` or `Conv1D` again, as it was before.

    The model then computes the same function (up to rounding), at the size of the dense model. Quantised weights become
    floating point. Returns `model`.
    """
    dequantize_(model)
    for name, module in low_rank_layers(model).items():
        weight = module.weight.detach()
        dense = dense_like(weight.t() if module.conv1d else weight, module.bias, conv1d=module.conv1d)
        dense.requires_grad_(module.right.weight.requires_grad)
        if module.bias is not None:
            dense.get_parameter("bias").requires_grad_(module.bias.requires_grad)
        replace_module_(model, name, dense)
    return model
