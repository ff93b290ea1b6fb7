# SPDX-License-Identifier: Apache-2.0
"""What each rank of a matrix costs and what it loses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.errors import ConfigError
from eigenprune.layers import factored_parameters
from eigenprune.spectral.decompose import Spectrum

BUDGETS = ("parameters", "bytes", "flops", "latency")
Cost = Callable[[int], int]  # of a rank, 0 for dense, in the unit of the budget


@dataclass(frozen=True)
class Options:
    """The choices for one matrix, by rising cost; the last is the dense weight (rank 0 stands for it).

    Attributes:
        ranks: [k] int64; 0 is dense.
        costs: [k] int64, in the unit of the budget.
        losses: [k] float64, estimated rise of the loss (nats per token for a two-sided metric).
        whole: the same without the matrix altogether; 0 where unknown.
        bits: [k] int64, 0 for floating point; None where all of them are that.
    """

    ranks: Tensor
    costs: Tensor
    losses: Tensor
    whole: float = 0.0
    bits: Tensor | None = None


def parameter_cost(shape: tuple[int, int], layout: str) -> Cost:
    """The parameters of a weight `shape` [m, n] at each rank in `layout`."""
    m, n = shape
    return lambda rank: factored_parameters(rank, m, n, layout) if rank else m * n


def byte_cost(shape: tuple[int, int], layout: str, itemsize: int) -> Cost:
    """The bytes of a weight `shape` [m, n] of `itemsize` bytes a number; a pivot takes the 4 of its index besides."""
    parameters = parameter_cost(shape, layout)
    index = 4 if layout == "pivot" else 0
    return lambda rank: parameters(rank) * itemsize + rank * index


def flop_cost(shape: tuple[int, int], layout: str) -> Cost:
    """Floating point operations a token: a multiplication and an addition for every parameter."""
    parameters = parameter_cost(shape, layout)
    return lambda rank: 2 * parameters(rank)


def layer_cost(budget: str, shape: tuple[int, int], layout: str, itemsize: int) -> Cost:
    """The cost in the unit of `budget`, other than `latency`, which is measured (`evaluate.layer_times`).

    Raises:
        ConfigError: there is no such budget.
    """
    if budget == "bytes":
        return byte_cost(shape, layout, itemsize)
    if budget == "flops":
        return flop_cost(shape, layout)
    if budget != "parameters":
        raise ConfigError(f"budget {budget!r} is not counted; there are: parameters, bytes, flops")
    return parameter_cost(shape, layout)


def rank_options(
    shape: tuple[int, int],
    found: Spectrum,
    layout: str,
    rank_multiple: int,
    *,
    cost: Cost | None = None,
    min_keep: float = 0.0,
) -> Options:
    """Every multiple of `rank_multiple` at which the factors of a weight `shape` [m, n] are cheaper than the weight.

    Args:
        shape: (m, n).
        found: its spectrum.
        layout: `pair` or `pivot`.
        rank_multiple: the step between ranks.
        cost: of a rank, see `Cost`; None counts parameters. A rank that costs no less than a larger one is no choice.
        min_keep: ranks with fewer than this fraction of the parameters of the weight are no choice either.
    """
    m, n = shape
    parameters = parameter_cost(shape, layout)
    cost = cost or parameters
    dense = least = cost(0)
    ranks: list[int] = []
    costs: list[int] = []
    for rank in range(min(m, n) // rank_multiple * rank_multiple, 0, -rank_multiple):
        if parameters(rank) < min_keep * m * n:
            break
        price = cost(rank)
        if price < least and parameters(rank) < m * n:
            least = price
            ranks.append(rank)
            costs.append(price)
    lost = 0.5 * found.tail()  # Gauss-Newton: half the squared distance in the metric
    losses = lost[torch.tensor(ranks[::-1], dtype=torch.long)]
    return Options(
        ranks=torch.tensor([*ranks[::-1], 0]),
        costs=torch.tensor([*costs[::-1], dense]),
        losses=torch.cat([losses, losses.new_zeros(1)]),
        whole=float(lost[0]),
    )
