# SPDX-License-Identifier: Apache-2.0
"""The dense layers that can be factored, and the one view of their weight that the package uses."""

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is the `Conv1D` of GPT-2: a linear layer that stores its weight as [in, out].

    Told by its name, so that nothing here has to import transformers.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_dense(module: nn.Module) -> bool:
    """Whether `module` is exactly an `nn.Linear` or a `Conv1D`; a subclass may compute something else."""
    return type(module) is nn.Linear or is_conv1d(module)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a dense layer as [out, in], a view of its parameter."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_conv1d(module) else weight


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a dense or factored layer."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = dense_weight(module)
    return weight.shape[0], weight.shape[1]


def dense_like(weight: Tensor, bias: Tensor | None, *, conv1d: bool) -> nn.Module:
    """A dense layer that holds `weight` [out, in] and `bias` [out].

    With `conv1d`, the layer is the `Conv1D` of transformers, so that a GPT-2 turned back to dense is stock again.
    """
    out_features, in_features = weight.shape
    module: nn.Module
    with torch.device("meta"):
        if conv1d:
            from transformers.pytorch_utils import Conv1D

            module = Conv1D(out_features, in_features)  # type: ignore[no-untyped-call]
        else:
            module = nn.Linear(in_features, out_features, bias=bias is not None)
    module.weight = nn.Parameter(weight.t().contiguous() if conv1d else weight.contiguous())
    if conv1d and bias is None:
        bias = weight.new_zeros(out_features)  # a Conv1D always has one
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return module


def with_shape(module: nn.Module, shape: tuple[int, int]) -> nn.Module:
    """A dense layer of `shape` (out, in), of the kind, dtype and device of `module`, with what fits of its values.

    Rows and columns beyond those of `module` are zero.
    """
    old = dense_weight(module).detach()
    rows, columns = min(shape[0], old.shape[0]), min(shape[1], old.shape[1])
    weight = old.new_zeros(shape)
    weight[:rows, :columns] = old[:rows, :columns]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    if bias is not None:
        bias = torch.cat([bias.detach()[:rows], bias.new_zeros(shape[0] - rows)])
    new = dense_like(weight, bias, conv1d=is_conv1d(module))
    new.requires_grad_(dense_weight(module).requires_grad)
    return new
