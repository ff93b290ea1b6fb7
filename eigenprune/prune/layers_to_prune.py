# SPDX-License-Identifier: Apache-2.0
"""Which layers a run prunes, looked at before anything costs time."""

import torch
from torch import nn

from eigenprune.calibrate import Statistics
from eigenprune.errors import ConfigError, WeightError
from eigenprune.layers import Selection, dense_weight, is_quantised, select_layers


def layers_to_prune(model: nn.Module, skip: tuple[str, ...]) -> Selection:
    """The layers of `model`, all of them sound.

    Raises:
        ConfigError: there is none.
        WeightError: a weight is on the meta device, quantised, or not finite; the layer is named.
    """
    selection = select_layers(model, skip)
    require_layers(selection)
    for name, module in selection.chosen.items():
        _check_weight(name, module)
    return selection


def require_layers(selection: Selection) -> None:
    """Raise ConfigError if no layer is left, with the reasons."""
    if not selection.chosen:
        reasons = sorted(set(selection.skipped.values())) or "the model has no linear layer"
        raise ConfigError(f"no layer to prune: {reasons}")


def drop_unmeasured(selection: Selection, statistics: Statistics) -> None:
    """Take layers that `statistics` know nothing of out of the chosen ones."""
    for name in [name for name in selection.chosen if name not in statistics]:
        selection.skipped[name] = "did not run on the calibration text"
        del selection.chosen[name]
    require_layers(selection)


def _check_weight(name: str, module: nn.Module) -> None:
    weight = dense_weight(module)
    if weight.device.type == "meta":
        raise WeightError(
            f"{name} has no data on this machine (meta device, or offloaded to disk): prune the model in memory, "
            "save it, and offload when loading the pruned one"
        )
    if is_quantised(weight):
        raise WeightError(f"{name} is quantised by torchao: prune the model before it is quantised")
    if not weight.is_floating_point():
        raise WeightError(f"{name} is stored as {weight.dtype}: prune the model before it is quantised")
    finite = torch.isfinite(weight)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        count = int((~finite).sum())
        raise WeightError(f"{name} holds {count} NaN or infinite weights, the first at [{row}, {column}]")
