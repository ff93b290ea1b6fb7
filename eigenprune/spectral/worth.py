# SPDX-License-Identifier: Apache-2.0
"""What each rank of a matrix costs and what it loses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.layers import factored_parameters
from eigenprune.spectral.decompose import Spectrum


@dataclass(frozen=True)
class Options:
    """The choices for one matrix, by rising cost; the last is the dense weight (rank 0 stands for it).

    Attributes:
        ranks: [k] int64; 0 is dense.
        costs: [k] int64 parameters.
        losses: [k] float64, estimated rise of the loss (nats per token for a two-sided metric).
    """

    ranks: Tensor
    costs: Tensor
    losses: Tensor


def rank_options(shape: tuple[int, int], found: Spectrum, layout: str, rank_multiple: int) -> Options:
    """Every multiple of `rank_multiple` at which the factors of a weight `shape` [m, n] are smaller than the weight."""
    m, n = shape
    ranks = [
        rank
        for rank in range(rank_multiple, min(m, n) + 1, rank_multiple)
        if factored_parameters(rank, m, n, layout) < m * n
    ]
    costs = [factored_parameters(rank, m, n, layout) for rank in ranks]
    losses = (
        0.5 * found.tail()[torch.tensor(ranks, dtype=torch.long)]
    )  # Gauss-Newton: half the squared distance in the metric
    return Options(
        ranks=torch.tensor([*ranks, 0]),
        costs=torch.tensor([*costs, m * n]),
        losses=torch.cat([losses, losses.new_zeros(1)]),
    )
