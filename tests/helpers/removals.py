# SPDX-License-Identifier: Apache-2.0
"""A removal from a tiny model, made without looking for it."""

import torch
from transformers import PreTrainedModel

from eigenprune.removal import FrozenPieces, Removal
from eigenprune.spectral import layer_views

EVERY = 5  # of the components


def some_removal(model: PreTrainedModel, kinds: tuple[str, ...] = ("q", "k", "down")) -> Removal:
    """Every fifth component of these kinds, frozen at a random mean input; `model` is left without them."""
    frozen = FrozenPieces(model, layer_views(model, kinds=kinds))
    generator = torch.Generator().manual_seed(3)
    for name, view in frozen.views.items():
        mask = frozen.empty_mask(name)
        for index, rank in enumerate(view.ranks):
            mask[index, 1:rank:EVERY] = True
        frozen.set_(name, mask, frozen.delta(name, mask, torch.randn(view.shape[1], generator=generator)))
    return frozen.removal()
