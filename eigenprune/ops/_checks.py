# SPDX-License-Identifier: Apache-2.0
"""Input checks shared by the pure-torch kernels and the fake kernels; the twin of csrc/checks.h, same
messages.

They raise RuntimeError, as torch's own operators do, so that the compiled and the pure-torch kernel look
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def _pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> str:
    return f"{first_name} {_shape(first)}, {second_name} {_shape(second)}"


def check_factors(op: str, x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int) -> None:
    """Check what all linears share: x [..., in], right [rank, in], left [*, rank], bias [out_features].

    Raises:
        RuntimeError: naming the operator, the rule that was broken and the two shapes, dtypes or devices.
    """
    if x.dim() < 1:
        raise RuntimeError(f"{op}: x must have at least one dimension ({_pair('x', x, 'right', right)})")
    if right.dim() != 2 or left.dim() != 2:
        raise RuntimeError(f"{op}: right and left must be matrices ({_pair('right', right, 'left', left)})")
    if x.shape[-1] != right.shape[1]:
        raise RuntimeError(
            f"{op}: the last dimension of x must equal the columns of right ({_pair('x', x, 'right', right)})"
        )
    if left.shape[1] != right.shape[0]:
        raise RuntimeError(
            f"{op}: the columns of left must equal the rows of right ({_pair('right', right, 'left', left)})"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_features):
        raise RuntimeError(f"{op}: bias must be [{out_features}] ({_pair('left', left, 'bias', bias)})")
    _check_kind(op, x, (("right", right), ("left", left), ("bias", bias)))


def check_equal_lengths(
    op: str, right: Sequence[Any], left: Sequence[Any], pivots: Sequence[Any], bias: Sequence[Any]
) -> None:
    """Check that every list of a call with several layers has one entry a layer."""
    if not len(right) == len(left) == len(pivots) == len(bias):
        raise RuntimeError(
            f"{op}: right, left, pivots and bias must have one entry a layer "
            f"(they have {len(right)}, {len(left)}, {len(pivots)} and {len(bias)})"
        )


def check_pivot_shape(op: str, right: Tensor, pivots: Tensor, x: Tensor) -> None:
    """Check that pivots is int32 [rank] beside x; its values are checked by `check_pivot_values`."""
    if pivots.dim() != 1 or pivots.shape[0] != right.shape[0]:
        raise RuntimeError(f"{op}: pivots must be [rank] ({_pair('right', right, 'pivots', pivots)})")
    if pivots.dtype != torch.int32:
        raise RuntimeError(f"{op}: pivots must be torch.int32, not {pivots.dtype}")
    if pivots.device != x.device:
        raise RuntimeError(f"{op}: pivots and x must be on the same device ({pivots.device}, {x.device})")


def check_columns(op: str, name: str, tensor: Tensor, pivots: Tensor) -> None:
    """Check a tensor [..., columns] that pivots [rank] divide; their values are checked by `check_pivot_values`."""
    if tensor.dim() < 1 or pivots.dim() != 1:
        raise RuntimeError(
            f"{op}: {name} must have at least one dimension, and pivots one ({_pair(name, tensor, 'pivots', pivots)})"
        )
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise RuntimeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, not {tensor.dtype}")
    if pivots.dtype != torch.int32:
        raise RuntimeError(f"{op}: pivots must be torch.int32, not {pivots.dtype}")
    if pivots.device != tensor.device:
        raise RuntimeError(f"{op}: pivots and {name} must be on the same device")


def check_parts(op: str, z: Tensor, rest: Tensor, pivots: Tensor) -> None:
    """Check z [..., rank] and rest [..., out - rank], to be put together by pivots [rank]."""
    check_columns(op, "z", z, pivots)
    if z.dim() != rest.dim() or z.shape[:-1] != rest.shape[:-1] or z.shape[-1] != pivots.shape[0]:
        raise RuntimeError(
            f"{op}: z must be [..., rank], rest [..., out - rank] and pivots [rank] ({_pair('z', z, 'rest', rest)})"
        )
    if rest.dtype != z.dtype:
        raise RuntimeError(f"{op}: rest and z must have one dtype ({rest.dtype}, {z.dtype})")
    if rest.device != z.device:
        raise RuntimeError(f"{op}: rest and z must be on the same device")


def check_pivot_values(op: str, pivots: Tensor, out_features: int) -> None:
    """Check that pivots are distinct and in [0, out_features). Only on CPU: elsewhere it would stop the
    device."""
    if pivots.device.type != "cpu" or pivots.numel() == 0:
        return
    low, high = int(pivots.min()), int(pivots.max())
    if low < 0 or high >= out_features:
        value = low if low < 0 else high
        raise RuntimeError(f"{op}: pivot {value} is outside [0, {out_features})")
    counts = torch.bincount(pivots, minlength=out_features)
    if int(counts.max()) > 1:
        raise RuntimeError(f"{op}: pivot {int(counts.argmax())} is repeated")


def _check_kind(op: str, x: Tensor, others: tuple[tuple[str, Tensor | None], ...]) -> None:
    if x.dtype not in SUPPORTED_DTYPES:
        raise RuntimeError(f"{op}: x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise RuntimeError(f"{op}: {name} and x must have one dtype ({tensor.dtype}, {x.dtype})")
        if tensor.device != x.device:
            raise RuntimeError(f"{op}: {name} and x must be on the same device ({tensor.device}, {x.device})")
