# SPDX-License-Identifier: Apache-2.0
"""A model with some of its components frozen at the mean input, any of which can come and go."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eigenprune.layers import dense_weight
from eigenprune.removal.removal import Removal
from eigenprune.spectral import (
    LayerView,
    SlicePieces,
    is_rotary,
    removed_output,
    slice_pieces,
    without_pieces,
)

CACHED_BYTES = 2 << 30  # of singular vectors; layers beyond are decomposed again when they are needed


class FrozenPieces:
    """Weights and biases of `model` as functions of masks: always computed from the base, so that undoing is exact.

    Freezing component i of a layer y = A x + b at the mean input gives y = (A - E_i) x + (b + E_i xbar): no example's
    own information passes it any more, at any length and with a key-value cache. A bias is created where the layer has
    none. Keys of a model without rotary positions get none: a constant added to all keys leaves attention as it was.

    Memory: a copy of the base weights of the layers that were touched, and up to CACHED_BYTES of singular vectors.

    Args:
        model: changed in place by `set_`.
        views: the layers that may change.
    """

    def __init__(self, model: nn.Module, views: Mapping[str, LayerView]) -> None:
        self.model, self.views = model, dict(views)
        self.masks: dict[str, Tensor] = {}
        self.deltas: dict[str, Tensor] = {}
        self._rotary = is_rotary(model)
        self._base: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._pieces: dict[str, list[SlicePieces]] = {}
        self._cached = 0

    def base_weight(self, name: str) -> Tensor:
        """The weight of a layer before anything was removed, [out, in]."""
        return self._base[name][0] if name in self._base else dense_weight(self.model.get_submodule(name)).detach()

    def pieces(self, name: str) -> list[SlicePieces]:
        """The components of a layer's base weight, slice by slice."""
        if name in self._pieces:
            return self._pieces[name]
        found = slice_pieces(self.base_weight(name), self.views[name])
        size = sum(part.vectors.numel() * part.vectors.element_size() for part in found)
        if self._cached + size <= CACHED_BYTES:
            self._pieces[name] = found
            self._cached += size
        return found

    def _kept(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Copies of the base weight [out, in] and bias of a layer, made before its first change."""
        if name not in self._base:
            module = self.model.get_submodule(name)
            bias = module.bias.detach().clone() if isinstance(module.bias, Tensor) else None
            self._base[name] = (dense_weight(module).detach().clone(), bias)
        return self._base[name]

    def empty_mask(self, name: str) -> Tensor:
        """[slices, largest rank] bool, nothing removed."""
        view = self.views[name]
        return torch.zeros(len(view.slices), max(view.ranks), dtype=torch.bool)

    def mask(self, name: str) -> Tensor:
        """A copy of what is removed of a layer."""
        return self.masks[name].clone() if name in self.masks else self.empty_mask(name)

    def delta(self, name: str, mask: Tensor, mean: Tensor) -> Tensor:
        """What the removed components give at the `mean` input, [out] float32."""
        view = self.views[name]
        found = removed_output(self.base_weight(name), view, self.pieces(name), mask, mean)
        if not self._rotary:
            for part in view.slices:
                if part.kind == "k":
                    found[part.start : part.stop] = 0
        return found.float()

    def set_(self, name: str, mask: Tensor, delta: Tensor) -> None:
        """Make the layer lack exactly what `mask` marks, with `delta` [out] float32 added to its bias."""
        module = self.model.get_submodule(name)
        if not bool(mask.any()):
            self.undo_(name)
            return
        weight, bias = self._kept(name)
        with torch.no_grad():
            dense_weight(module).copy_(without_pieces(weight, self.views[name], self.pieces(name), mask))
            _set_bias_(module, bias, delta if bool(delta.any()) else None)
        self.masks[name], self.deltas[name] = mask.clone(), delta.clone()

    def undo_(self, name: str) -> None:
        """Give the layer its base weight and bias back, bit for bit."""
        self.masks.pop(name, None)
        self.deltas.pop(name, None)
        if name not in self._base:
            return
        module = self.model.get_submodule(name)
        weight, bias = self._base.pop(name)
        with torch.no_grad():
            dense_weight(module).copy_(weight)
            _set_bias_(module, bias, None)

    def undo_all_(self) -> None:
        """Give every layer its base weight and bias back."""
        for name in list(self._base):
            self.undo_(name)

    def state(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{layer: (mask, delta)} of all layers that lack something."""
        return {name: (mask, self.deltas[name]) for name, mask in self.masks.items()}

    def restore_(self, state: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Bring a `state` back."""
        for name in [name for name in self.masks if name not in state]:
            self.undo_(name)
        for name, (mask, delta) in state.items():
            if name not in self.masks or not (
                torch.equal(self.masks[name], mask) and torch.equal(self.deltas[name], delta)
            ):
                self.set_(name, mask, delta)

    def removal(self) -> Removal:
        """What is removed now, in model order."""
        names = [name for name in self.views if name in self.masks]
        return Removal(
            masks={name: self.masks[name].clone() for name in names},
            kinds={name: self.views[name].kind for name in names},
            views={name: self.views[name].view for name in names},
            bias_deltas={name: self.deltas[name].clone() for name in names if bool(self.deltas[name].any())},
        )


def _set_bias_(module: nn.Module, base: Tensor | None, delta: Tensor | None) -> None:
    """bias = base + delta in float64, rounded once; no bias where both are None."""
    if base is None and delta is None:
        module.register_parameter("bias", None)
        return
    weight = dense_weight(module)
    value = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device) if base is None else base.double()
    value = value if delta is None else value + delta.to(value)
    if isinstance(module.bias, Tensor):
        module.bias.copy_(value)
    else:
        module.bias = nn.Parameter(value.to(weight.dtype), requires_grad=weight.requires_grad)
