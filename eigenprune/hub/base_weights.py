# SPDX-License-Identifier: Apache-2.0
"""Which weights an adapter was made for: a hash of all, and one of each layer it changes, to name what differs."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eigenprune.errors import CheckpointError

SHORT = 16  # hex digits of one layer's hash: it only names what differs, the whole hash decides
MOST_NAMED = 3


@dataclass(frozen=True)
class BaseWeights:
    """The identity of a model's weights, whatever floating type they are held in, as long as no value changes by it.

    Attributes:
        whole: SHA-256 in hex over names, shapes and values of all parameters and saved buffers.
        layers: {layer: the first digits of the SHA-256 over its own}.
    """

    whole: str
    layers: dict[str, str]

    def restricted(self, layers: Iterable[str]) -> "BaseWeights":
        """The same with only these layers named.

        Raises:
            CheckpointError: one was not in the model.
        """
        missing = [name for name in layers if name not in self.layers]
        if missing:
            raise CheckpointError(f"{missing[0]} is no layer of the model whose weights were hashed")
        return BaseWeights(self.whole, {name: self.layers[name] for name in layers})


def base_weights(model: nn.Module) -> BaseWeights:
    """The identity of `model` as it is now. Floats count by value: bfloat16 and the same numbers in float32 are one.

    Raises:
        CheckpointError: a parameter has no data here (meta device).
    """
    owned: dict[str, list[str]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name} has no data: load the whole model before its weights are hashed")
        owned.setdefault(name.rpartition(".")[0], []).append(f"{name} {_digest(tensor)}")
    lines = [line for name in sorted(owned) for line in owned[name]]
    layers = {name: _joined(own)[:SHORT] for name, own in owned.items()}
    return BaseWeights(_joined(lines), layers)


def check_base(model: nn.Module, expected: BaseWeights, base: str = "") -> None:
    """Check that `model` has the weights that an adapter was made for.

    Args:
        model: as it is now.
        expected: of the adapter, with the layers it changes.
        base: the name of the right model, where it is known.

    Raises:
        CheckpointError: it has others; what differs is named.
    """
    found = base_weights(model)
    if found.whole == expected.whole:
        return
    right = f"load {base}, in the dtype that its files have" if base else "load the model that it was made for"
    missing = [name for name in expected.layers if name not in found.layers]
    if missing:
        raise CheckpointError(f"the adapter is of another model: this one has no layer {_some(missing)}; {right}")
    other = [name for name, digest in expected.layers.items() if found.layers[name] != digest]
    if other:
        raise CheckpointError(
            f"the adapter is of other weights: {len(other)} of the {len(expected.layers)} layers that it changes "
            f"differ here, among them {_some(other)} (another model, another revision, a coarser dtype, or an adapter "
            f"applied already); {right}"
        )
    raise CheckpointError(
        "the adapter is of other weights: the layers that it changes are the same here, and others (embeddings, norms, "
        f"heads) differ; {right}"
    )


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.is_floating_point() and flat.dtype != torch.float64:
        flat = flat.float()  # exact from every shorter type
    digest = hashlib.sha256(f"{flat.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _joined(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED])
