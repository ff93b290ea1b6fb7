# SPDX-License-Identifier: Apache-2.0
"""Tiny models pruned in one line, and all that a refused call must leave alone."""

from typing import Any

from torch import nn

from eigenprune import EigenpruneConfig, PruneReport, prune_
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import token_windows


def pruned_by(model: nn.Module, **settings: Any) -> PruneReport:
    """Prune `model` in place to 0.6 of its linear layers, unless `settings` of its config say otherwise."""
    config = EigenpruneConfig(**{"keep": 0.6} | settings)
    return prune_(model, config, windows=token_windows(), progress=False)


def picture(model: nn.Module) -> tuple[Any, ...]:
    """All that a refused call must leave alone: tensors, classes, gradient flags, modes, config."""
    return (
        state_hashes(model),
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        model.config.to_dict(),
    )
