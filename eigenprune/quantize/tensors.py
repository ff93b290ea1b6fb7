# SPDX-License-Identifier: Apache-2.0
"""From a floating-point weight to a tensor of torchao, and from its parts back to it.

torchao does the quantising (`quantize_`) and the computing. int8 is symmetric with a scale a row, its
`Int8WeightOnlyConfig`; int4 is symmetric with a scale for each group of 32 in a row, its `IntxWeightOnlyConfig`: plain
PyTorch on every device, where torchao's `Int4WeightOnlyConfig` needs a GPU and, by the packing, another package.
"""

import torch
from torch import Tensor, nn

from eigenprune.errors import ConfigError, WeightError
from eigenprune.layers.quantised import BITS, group_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that torchao quantises
INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009 - the stubs of torch lack it
SCALE_DTYPES = {8: torch.float32, 4: torch.bfloat16}  # on disk


def require_torchao(why: str) -> None:
    """Check that torchao can be imported; `why` is the start of the message if not.

    Raises:
        ConfigError: it cannot.
    """
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{why} needs torchao, which cannot be imported ({error}): pip install 'eigenprune[quantize]'"
        ) from error


def check_bits(bits: object) -> None:
    """Raise ConfigError if `bits` is not 8 or 4."""
    if isinstance(bits, bool) or bits not in BITS:
        raise ConfigError(f"bits {bits!r} is unknown; there are: {', '.join(map(str, BITS))}")


def quantised_weight(weight: Tensor, bits: int) -> Tensor:
    """`weight` [rows, columns] quantised by torchao, of the same shape and dtype.

    Raises:
        ConfigError: unknown bits, a dtype that torchao does not quantise, or there is no torchao.
        WeightError: the weight is on the meta device.
    """
    check_bits(bits)
    require_torchao(f"quantising to {bits} bits")
    if weight.dtype not in DTYPES:
        raise ConfigError(f"a weight of {weight.dtype} cannot be quantised: torchao takes float32, bfloat16, float16")
    if weight.device.type == "meta":
        raise WeightError("a weight has no data on this machine: quantise the model in memory")
    from torchao.quantization import quantize_

    rows, columns = weight.shape
    holder = nn.Linear(columns, rows, bias=False, device="meta")
    holder.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(holder, _recipe(bits, columns))
    # Scales in the dtype of the weight, as `from_parts` makes them: a reloaded layer computes the same bits.
    return holder.weight.detach() if bits == 8 else holder.weight.detach().to(weight.dtype)


def _recipe(bits: int, columns: int) -> object:
    """torchao's configuration for a weight with that many columns."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if bits == 8:
        return Int8WeightOnlyConfig(set_inductor_config=False)
    return IntxWeightOnlyConfig(
        weight_dtype=INT4, granularity=PerGroup(group_size(bits, columns)), scale_dtype=SCALE_DTYPES[4]
    )


def from_parts(numbers: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The tensor of torchao that is made of int8 `numbers` [rows, columns] and `scale` [rows, columns / group]."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    zero = torch.zeros_like(scale, dtype=torch.int8)
    group = numbers.shape[1] // scale.shape[1]
    made: Tensor
    if bits == 8:
        made = Int8Tensor(numbers, scale, [1, group], dtype, zero_point=zero)
    else:
        made = IntxUnpackedToInt8Tensor(numbers, scale.to(dtype), zero, INT4, (1, group), dtype, None)
    return made
