# SPDX-License-Identifier: Apache-2.0
"""Adapters: save what was removed in some kilobytes, apply it to the base with one call, undo it with another."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.errors import CheckpointError
from eigenprune.hub.adapter_file import Adapter, read_adapter, write_adapter
from eigenprune.hub.base_weights import BaseWeights, check_base
from eigenprune.hub.given_biases import forget_biases_, name_biases_
from eigenprune.layers import dense_weight, is_dense
from eigenprune.removal import Removal, apply_
from eigenprune.report import base_facts, versions


def save_adapter(
    removal: Removal,
    base: BaseWeights,
    path: str | Path,
    *,
    model: nn.Module | None = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save what was removed, as one safetensors file.

    Args:
        removal: of `remove_`'s report.
        base: `base_weights(model)`, taken before anything was removed.
        path: of the file, ending in `.safetensors`.
        model: pruned or not; for the name of its base. No local path is kept.
        provenance: plain JSON values to keep beside, such as the settings.
        overwrite: replace a file that is there.

    Raises:
        CheckpointError: nothing was removed, a layer was not among the hashed ones, the file is there already, or the
            disk refuses.
    """
    if not removal.count:
        raise CheckpointError("nothing was removed, so that there is nothing for an adapter")
    facts = {} if model is None else base_facts(model)
    adapter = Adapter(
        removal=removal,
        base=base.restricted(removal.masks),
        base_model=str(facts.get("base_model", "")),
        base_revision=facts.get("base_revision"),
        provenance={"versions": versions()} | (provenance or {}),
    )
    return write_adapter(adapter, path, overwrite=overwrite)


class AppliedAdapter:
    """A model with an adapter in it; `undo_` takes it out again, bit for bit.

    Holds a copy of the weights and biases of the layers that changed, until it is undone.

    Attributes:
        model: the one that was changed.
        adapter: what was applied.
        given: the layers that had no bias and have one now.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter
        self._kept: dict[str, tuple[Tensor, Tensor | None]] = {}
        modules = dict(model.named_modules())
        for name in adapter.removal.masks:
            module = modules.get(name)
            if module is None or not is_dense(module):
                continue  # `apply_` refuses it
            bias = module.bias
            held = bias.detach().clone() if isinstance(bias, Tensor) else None
            self._kept[name] = (dense_weight(module).detach().clone(), held)
        # Named in the config of a saved model, which else would be read back without them.
        self.given = [name for name in adapter.removal.bias_deltas if self._kept.get(name, (None, None))[1] is None]

    def undo_(self) -> nn.Module:
        """Put the weights and biases back as they were; returns the model.

        Raises:
            CheckpointError: it was undone already.
        """
        if not self._kept:
            raise CheckpointError("the adapter was undone already")
        with torch.no_grad():
            for name, (weight, bias) in self._kept.items():
                module = self.model.get_submodule(name)
                dense_weight(module).copy_(weight)
                if bias is None:
                    module.register_parameter("bias", None)
                elif isinstance(module.bias, Tensor):
                    module.bias.copy_(bias)
        self._kept.clear()
        forget_biases_(self.model, self.given)
        return self.model


def apply_adapter_(model: nn.Module, adapter: Adapter | str | Path) -> AppliedAdapter:
    """Apply an adapter, or the file of one, to the base model that it was made for, in place.

    Args:
        model: dense, with the weights of that base, held in any floating type that changes none of their values.
        adapter: as read, or the path of its file.

    Returns:
        The applied adapter, whose `undo_` gives the base back.

    Raises:
        CheckpointError: the file is damaged, or the model is another one; what differs is named. Nothing has changed
            then.
        WeightError: a weight is not finite.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    check_base(model, adapter.base, adapter.base_model)
    applied = AppliedAdapter(model, adapter)
    apply_(model, adapter.removal)
    name_biases_(model, applied.given)
    return applied
