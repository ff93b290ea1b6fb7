# SPDX-License-Identifier: Apache-2.0
"""Every matrix the same share of itself."""

import torch
from torch import Tensor

from eigenprune.spectral.allocation.table import Table, fill


def uniform_choice(table: Table, budget: float, keep: float) -> Tensor:
    """The option nearest below `keep` in every matrix, and what is left to those furthest below; [matrices]."""
    return shared_choice(table, budget, keep * table.dense)


def shared_choice(table: Table, budget: float, shares: Tensor) -> Tensor:
    """The option nearest below its share of the budget in every matrix, and the rest filled; [matrices].

    Args:
        shares: [matrices], the cost that each may have.
    """
    fits = table.costs <= shares.unsqueeze(1) * (1 + 1e-12)
    chosen = (fits.sum(1) - 1).clamp_min(0)
    if table.spent(chosen) > budget:  # small matrices whose smallest rank is above their share
        chosen = torch.zeros_like(chosen)
    # Fill by lowest share of the share after the upgrade: as if every matrix lost the square of what it is short of it.
    aim = torch.minimum(table.dense, shares / max(float(shares.sum() / table.dense.sum()), 1e-300)).clamp_min(1e-9)
    shortfall = (1 - table.costs / aim.unsqueeze(1)).clamp_min(0) ** 2 * aim.unsqueeze(1)
    limited = torch.where(_at_most_one_above(fits), shortfall, torch.inf)
    return fill(table, chosen, budget, limited)


def _at_most_one_above(fits: Tensor) -> Tensor:
    """`fits` with the first option above it added."""
    shifted = torch.cat([torch.ones_like(fits[:, :1]), fits[:, :-1]], 1)
    return fits | shifted
