# SPDX-License-Identifier: Apache-2.0
"""Which layers read the same input, found by running the model once."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eigenprune.calibrate.objective import model_inputs
from eigenprune.errors import CalibrationError


def shared_inputs(model: nn.Module, ids: Tensor, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Each layer that runs, in `layers` order, with the first layer that reads the very same input: {layer: group}.

    Layers that do not run on text (a vision tower, say) are left out.

    Args:
        ids: [1, window] int64 on the model's device.

    Raises:
        CalibrationError: the model cannot run on token ids alone.
    """
    # The tensors are held until the end, so that no address is used twice.
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in layers.items()
    ]
    try:
        with torch.no_grad():
            model(**model_inputs(model, ids))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CalibrationError(
            f"{type(model).__name__} does not run on {ids.shape[1]} token ids alone ({error}); "
            "statistics need a model of text and windows no longer than its positions"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[str, str] = {}
    leader: dict[tuple[object, ...], str] = {}
    for name in layers:
        if name in seen:
            key = tuple((x.data_ptr(), x.shape, x.stride(), x._version) for x in seen[name])
            groups[name] = leader.setdefault(key, name)
    return groups
