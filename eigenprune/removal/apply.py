# SPDX-License-Identifier: Apache-2.0
"""`apply_`: a base model and a `Removal` give the pruned model."""

import torch
from torch import nn

from eigenprune.errors import CheckpointError, ConfigError
from eigenprune.layers import dense_weight, is_dense
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.removal.removal import Removal
from eigenprune.spectral import LayerView, layer_view


def apply_(model: nn.Module, removal: Removal) -> nn.Module:
    """Remove from `model`, in place, what `removal` names; returns `model`.

    The components are found again from the weights, so `model` must be the base that the removal was made on. On one
    machine, build and thread count the weights are those of `remove_` bit for bit. Elsewhere singular vectors differ in
    float64 rounding; `remove_` takes no component whose singular value is too close to a neighbour's for the two to
    be told apart, so the weights differ by no more than the last bit of their dtype.

    Everything is checked before the first layer changes.

    Raises:
        CheckpointError: the removal does not fit the model.
        WeightError: a weight is not finite.
    """
    views = {name: _checked_view(model, removal, name) for name in removal.masks}
    for name, delta in removal.bias_deltas.items():
        if name not in views or delta.shape != (views[name].shape[0],) or not bool(torch.isfinite(delta).all()):
            raise CheckpointError(f"the removal's bias of {name} fits no layer that it prunes")
    frozen = FrozenPieces(model, views)
    for name in views:
        frozen.pieces(name)  # all that can fail, before anything changes
    for name, view in views.items():
        frozen.set_(name, removal.masks[name], removal.bias_deltas.get(name, torch.zeros(view.shape[0])))
    return model


def _checked_view(model: nn.Module, removal: Removal, name: str) -> LayerView:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the removal prunes {name}, which {type(model).__name__} does not have") from None
    if not is_dense(module):
        raise CheckpointError(f"the removal prunes {name}, which is a {type(module).__name__} here and no dense layer")
    shape = dense_weight(module).shape
    try:
        view = layer_view(model, name, (shape[0], shape[1]), removal.views[name])
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"the removal does not say how {name} is cut: {error}") from error
    mask = removal.masks[name]
    if view.kind != removal.kinds.get(name) or mask.dtype != torch.bool:
        raise CheckpointError(
            f"{name} is of kind {view.kind} here, and of kind {removal.kinds.get(name)} in the removal"
        )
    if tuple(mask.shape) != (len(view.slices), max(view.ranks)):
        raise CheckpointError(
            f"{name} has {len(view.slices)} slices of {max(view.ranks)} components here, and {list(mask.shape)} in the "
            "removal: it belongs to another model"
        )
    if any(bool(mask[i, rank:].any()) for i, rank in enumerate(view.ranks)):
        raise CheckpointError(f"the removal marks components that {name} does not have")
    return view
