# SPDX-License-Identifier: Apache-2.0
"""Weights in few bits, as torchao's tensors hold them: told, counted and read without importing torchao."""

from torch import Tensor, nn

BITS = (8, 4)
SCALE_BYTES = {8: 4, 4: 2}  # on disk: torchao's int8 has float32 scales, and bfloat16 is enough for 16 levels
INT4_GROUPS = (32, 16, 8)


def is_quantised(tensor: Tensor | None) -> bool:
    """Whether `tensor` is one of torchao's: all of them name the plain tensors that they are made of."""
    return tensor is not None and hasattr(type(tensor), "tensor_data_names")


def plain_values(tensor: Tensor) -> Tensor:
    """`tensor` itself, or what a quantised one stands for, in its own floating dtype; no gradient flows back."""
    if not is_quantised(tensor):
        return tensor
    values: Tensor = tensor.dequantize()
    return values


def group_size(bits: int, columns: int) -> int:
    """How many neighbours in a row share a scale: the whole row in int8, and in int4 the largest group that fits."""
    if bits == 8:
        return columns
    return next((size for size in INT4_GROUPS if columns % size == 0), columns)


def quantised_bytes(bits: int, rows: int, columns: int) -> int:
    """What a weight [rows, columns] takes on disk in `bits` bits, its scales included."""
    if rows == 0 or columns == 0:
        return 0
    numbers = columns if bits == 8 else (columns + 1) // 2
    return rows * (numbers + SCALE_BYTES[bits] * (columns // group_size(bits, columns)))


def quantised_bits(tensor: Tensor) -> int:
    """8 or 4 for a quantised weight of those that this package makes, 0 for any other tensor."""
    name = type(tensor).__name__
    if name == "Int8Tensor":
        return 8
    return 4 if name == "IntxUnpackedToInt8Tensor" and str(getattr(tensor, "target_dtype", "")) == "torch.int4" else 0


def tensor_bytes(tensor: Tensor) -> int:
    """What `tensor` takes on disk."""
    if quantised_bits(tensor):
        return quantised_bytes(quantised_bits(tensor), *tensor.shape)
    return tensor.numel() * tensor.element_size()


def quantised_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` whose weight is quantised, by name in model order: factors, and dense layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_quantised(dict(module.named_parameters(recurse=False)).get("weight"))
    }


def dequantize_(model: nn.Module) -> nn.Module:
    """Make every quantised weight of `model` a floating-point parameter again, of the same values, in place."""
    for module in quantised_linears(model).values():
        module.weight = nn.Parameter(plain_values(module.get_parameter("weight")).detach())
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]  # of transformers, which then allows .half() and .float()
    return model
