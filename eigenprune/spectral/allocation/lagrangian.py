# SPDX-License-Identifier: Apache-2.0
"""One price per unit of cost for all matrices: the choice along the lower hulls of the options, and the rest filled."""

import torch
from torch import Tensor

from eigenprune.spectral.allocation.table import Table, fill


def priced_choice(table: Table, budget: float) -> Tensor:
    """A good choice within `budget`, [matrices]: at the least price that fits, then filled; mostly the best one."""
    return fill(table, _at_price(table, _price(table, budget)), budget, table.losses)


def _at_price(table: Table, price: float) -> Tensor:
    """The option of least loss + price x cost in every matrix, [matrices]; the cheaper of two equals."""
    total = table.losses + price * table.costs
    return torch.where(table.costs.isinf(), torch.inf, total).argmin(1)


def _price(table: Table, budget: float) -> float:
    """The least price per unit, in loss, at which the choice fits the budget."""
    if table.spent(_at_price(table, 0.0)) <= budget:  # everything worth having fits
        return 0.0
    low, high = 0.0, 1.0
    while table.spent(_at_price(table, high)) > budget:
        low, high = high, high * 4
        if high > 1e300:
            break
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high / 16
        if middle in (low, high) or high < 1e-300:
            break
        if table.spent(_at_price(table, middle)) > budget:
            low = middle
        else:
            high = middle
        if low > 0 and high / low < 1 + 1e-12:
            break
    return high
