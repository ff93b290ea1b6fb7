# SPDX-License-Identifier: Apache-2.0
"""A quantised weight in a file: two plain tensors, from which torchao's tensor is made again.

`X.weight_qdata` holds the integers, int8 [rows, columns], or for 4 bits two in a byte, uint8 [rows, ceil(columns / 2)],
the even column in the low half; `X.weight_scale` [rows, columns / group] what they are multiplied with, float32 for 8
bits and bfloat16 for 4. The zero point is always 0.
"""

import torch
from torch import Tensor, nn

from eigenprune.errors import CheckpointError
from eigenprune.layers import replace_module_
from eigenprune.layers.quantised import is_quantised, quantised_bits, quantised_linears
from eigenprune.quantize.tensors import SCALE_DTYPES, from_parts

NUMBERS, SCALE = "weight_qdata", "weight_scale"
NUMBER_DTYPES = {8: torch.int8, 4: torch.uint8}


def packed(numbers: Tensor) -> Tensor:
    """int8 [rows, columns] in -8..7 as uint8 [rows, ceil(columns / 2)], two's complement in each half."""
    if numbers.shape[1] % 2:
        numbers = torch.cat([numbers, numbers.new_zeros(len(numbers), 1)], 1)
    halves = numbers.view(torch.uint8) & 15
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def unpacked(stored: Tensor, columns: int) -> Tensor:
    """The inverse of `packed`."""
    halves = torch.stack([stored & 15, stored >> 4], -1).flatten(1)[:, :columns]
    return ((halves ^ 8).to(torch.int8) - 8).contiguous()


def check_savable(name: str, weight: Tensor) -> int:
    """The bits of the quantised `weight` of the module `name`.

    Raises:
        CheckpointError: it is of a kind that this package does not store.
    """
    bits = quantised_bits(weight)
    zero: Tensor | None = getattr(weight, "zero_point", None)
    offset = zero is not None and zero.device.type != "meta" and bool(zero.any())
    of_inputs = (
        getattr(weight, "act_quant_kwargs", None),
        getattr(weight, "act_pre_scale", None),
        getattr(weight, "activation_quantization", None),
    )
    if not bits or offset or any(setting is not None for setting in of_inputs):
        raise CheckpointError(
            f"{name} is quantised in a way that is not stored ({type(weight).__name__}): "
            "use eigenprune.quantize.quantize_, weight-only int8 or int4"
        )
    return bits


def stored_parts(name: str, weight: Tensor) -> dict[str, Tensor]:
    """What is written for the quantised `weight` of the module `name`: {tensor name: plain tensor}; errors as above."""
    bits = check_savable(name, weight)
    numbers: Tensor = weight.qdata  # type: ignore[attr-defined]
    scale: Tensor = weight.scale  # type: ignore[attr-defined]
    return {
        f"{name}.{NUMBERS}": (numbers if bits == 8 else packed(numbers)).contiguous(),
        f"{name}.{SCALE}": scale.to(SCALE_DTYPES[bits]).contiguous(),
    }


def stored_entry(weight: Tensor) -> list[int]:
    """[bits, group] of a quantised weight, as the config of a saved model has it."""
    scale: Tensor = weight.scale  # type: ignore[attr-defined]
    return [quantised_bits(weight), weight.shape[1] // scale.shape[1]]


class StoredWeight(nn.Module):
    """Stands for a quantised Linear while a checkpoint is loaded: its buffers have the names and shapes of the file.

    Raises:
        CheckpointError: the config lies about this layer.
    """

    weight_qdata: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, name: str, bits: int, group: int) -> None:
        super().__init__()
        if type(linear) is not nn.Linear:
            raise CheckpointError(
                f"the config says that {name} is quantised, but in this model it is a {type(linear).__name__}"
            )
        rows, columns = linear.out_features, linear.in_features
        if group > columns or columns % group:
            raise CheckpointError(f"the config gives {name} groups of {group}, and it has {columns} columns")
        self.in_features, self.out_features, self.bits = columns, rows, bits
        device, self.dtype = linear.weight.device, linear.weight.dtype
        width = columns if bits == 8 else (columns + 1) // 2
        self.register_buffer(NUMBERS, torch.zeros(rows, width, dtype=NUMBER_DTYPES[bits], device=device))
        self.register_buffer(SCALE, torch.zeros(rows, columns // group, dtype=SCALE_DTYPES[bits], device=device))
        self.register_parameter("bias", linear.bias)

    @property
    def weight(self) -> Tensor:
        """Of the right shape, without data: some models' `_init_weights` draws it anew, whatever was loaded."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def linear(self, name: str) -> nn.Linear:
        """The Linear that it stood for, once its buffers are filled.

        Raises:
            CheckpointError: a scale was read in another dtype, or holds NaN or infinity; or the layer is offloaded.
        """
        if self.weight_qdata.device.type == "meta" or hasattr(self, "_hf_hook"):
            raise CheckpointError(
                f"{name} is quantised, and quantised layers are not offloaded or split over devices: load the model "
                "onto one device, or store it without bits"
            )
        if self.weight_scale.dtype != SCALE_DTYPES[self.bits]:
            raise CheckpointError(f"this transformers changed the scales of {name} while reading: update it")
        if not torch.isfinite(self.weight_scale).all():
            raise CheckpointError(f"{name}.{SCALE} holds NaN or infinity")
        numbers = self.weight_qdata if self.bits == 8 else unpacked(self.weight_qdata, self.in_features)
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = from_parts(numbers, self.weight_scale, self.bits, self.dtype)
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.bias = self.bias  # type: ignore[assignment]
        return made


def finish_stored_(model: nn.Module) -> None:
    """Put the Linear that it stands for in the place of every `StoredWeight`; errors as `StoredWeight.linear`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, StoredWeight):
            replace_module_(model, name, module.linear(name))


def plain_state_(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, list[int]]:
    """Put the parts of every quantised weight of `model` in its place in the state dict `tensors`.

    Returns {module: [bits, group]}; errors as `check_savable`.
    """
    entries = {}
    for name, module in quantised_linears(model).items():
        weight = module.get_parameter("weight")
        tensors.update(stored_parts(name, weight))
        entries[name] = stored_entry(weight)
        del tensors[f"{name}.weight"]
    if any(map(is_quantised, tensors.values())):
        rest = min(name for name, tensor in tensors.items() if is_quantised(tensor))
        raise CheckpointError(f"{rest} is quantised, and only weights of Linears are stored in few bits")
    return entries
