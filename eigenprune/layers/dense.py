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
