# SPDX-License-Identifier: Apache-2.0
"""Autocast for the operators, with the dtype that the caller chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eigenprune.ops._library import implement

_AUTOCAST_KEYS = (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"))


def has_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`; torch's own question raises for the meta device."""
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def register_autocast(name: str, operator: Callable[..., Any]) -> None:
    """Make `operator` cast its floating point inputs under autocast, by the rule of torch's own linear.

    torch.library.register_autocast fixes one dtype at registration; a training loop chooses its own.
    """
    for device_type, key_name in _AUTOCAST_KEYS:
        implement(name, _autocast_kernel(operator, device_type, key_name), key_name)


def cast_arguments(arguments: Sequence[Any], device_type: str) -> tuple[Any, ...]:
    """Cast what autocast would cast for a linear, in lists too; everything else, None included, is passed through."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(_cast(argument, device_type, dtype) for argument in arguments)


def _autocast_kernel(operator: Callable[..., Any], device_type: str, key_name: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key_name))

    def kernel(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*cast_arguments(arguments, device_type))

    return kernel


def _cast(argument: Any, device_type: str, dtype: torch.dtype) -> Any:
    if isinstance(argument, list | tuple):
        return [_cast(item, device_type, dtype) for item in argument]
    # torch casts every floating point tensor of the device but float64 (autocast_mode.h, is_eligible).
    eligible = (
        isinstance(argument, Tensor)
        and argument.is_floating_point()
        and argument.dtype != torch.float64
        and argument.device.type == device_type
    )
    return argument.to(dtype) if eligible else argument
