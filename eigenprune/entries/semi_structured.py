# SPDX-License-Identifier: Apache-2.0
"""2:4 sparsity: of every four neighbouring entries of a row two are zero, the one pattern that GPUs have kernels for.

Zeroing entries makes no model faster by itself: the weight stays a dense matrix, with zeros in it, that costs what it
cost before. On an NVIDIA GPU of compute capability 8.0 or newer, `compress_` hands 2:4 weights in half precision to
PyTorch's own sparse kernels (`torch.sparse.to_sparse_semi_structured`); elsewhere they stay dense, and it says so.
"""

import warnings

import torch
from torch import Tensor, nn

from eigenprune.errors import ConfigError, WeightError

OLDEST = (8, 0)  # compute capability
HALVES = (torch.float16, torch.bfloat16)


def two_of_four(scores: Tensor) -> Tensor:
    """bool [m, n]: in each group of four neighbours along the last axis, the two with the highest scores.

    Args:
        scores: [m, n], n a multiple of 4: `weight.abs()`, or with Wanda (arXiv 2306.11695) times the norm of the
            input. The lower index where two are equal.

    Raises:
        WeightError: it is no matrix, n is no multiple of 4, or a score is NaN.
    """
    if scores.ndim != 2 or scores.shape[1] % 4:
        raise WeightError(f"2:4 sparsity needs [m, n] with n a multiple of 4, not {tuple(scores.shape)}")
    if scores.isnan().any():
        raise WeightError("a score for 2:4 sparsity is NaN")
    groups = scores.reshape(-1, 4)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, :2]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, order, True).view(scores.shape)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether each group of four neighbours of a matrix has at least two zeros."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def compress_(model: nn.Module) -> dict[str, str]:
    """Give every `nn.Linear` of `model` with a 2:4 weight to PyTorch's sparse kernels, where there are any.

    For inference: a compressed weight cannot be trained or saved as it is. `decompress_` undoes it.

    Returns:
        {layer name: `sparse`, or `dense: ` and the reason}, of all linear layers with a 2:4 weight.

    Raises:
        ConfigError: no linear layer has a 2:4 weight: there is nothing to compress.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.device.type != "meta" and is_two_of_four(module.weight)
    }
    if not found:
        raise ConfigError("no linear layer of this model has a 2:4 weight: zero two of every four entries first")
    return {name: _compress_(module) for name, module in found.items()}


def decompress_(model: nn.Module) -> None:
    """Make every compressed weight of `model` an ordinary parameter again, with the same values."""
    for module in model.modules():
        if type(module) is nn.Linear and hasattr(module.weight, "to_dense") and _is_compressed(module.weight):
            module.weight = nn.Parameter(module.weight.detach().to_dense(), requires_grad=False)


def why_dense(weight: Tensor) -> str:
    """Why PyTorch's sparse kernels cannot have `weight`; empty where they may."""
    if weight.device.type != "cuda":
        return f"no sparse kernel for {weight.device.type}"
    if torch.cuda.get_device_capability(weight.device) < OLDEST:
        return "this GPU is older than compute capability 8.0"
    if weight.dtype not in HALVES:
        return f"the kernels want float16 or bfloat16, and this is {str(weight.dtype).removeprefix('torch.')}"
    return ""


def _compress_(module: nn.Linear) -> str:
    reason = why_dense(module.weight)
    if reason:
        return f"dense: {reason}"
    from torch.sparse import to_sparse_semi_structured

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the interface is a prototype
            compressed = to_sparse_semi_structured(module.weight.detach())
    except RuntimeError as error:  # a shape that the kernels do not have
        return f"dense: {str(error).strip().splitlines()[0]:.120}"
    module.weight = nn.Parameter(compressed, requires_grad=False)
    return "sparse"


def _is_compressed(weight: Tensor) -> bool:
    from torch.sparse import SparseSemiStructuredTensor

    return isinstance(weight, SparseSemiStructuredTensor) or isinstance(weight.data, SparseSemiStructuredTensor)
