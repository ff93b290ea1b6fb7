# SPDX-License-Identifier: Apache-2.0
"""Where the columns of the pivot layout stand."""

from __future__ import annotations

import torch
from torch import Tensor


def source_positions(pivots: Tensor, out_features: int) -> Tensor:
    """For every output position, where its value stands in the row (pivots..., rest...).

    Args:
        pivots: [rank] integers, distinct, in [0, out_features).
        out_features: number of output positions.

    Returns:
        int64 [out_features], a permutation: i at position pivots[i], rank + k at the k-th position that is no
        pivot.
    """
    index = pivots.long()
    rank = index.shape[0]
    is_rest = torch.ones(out_features, dtype=torch.int64, device=index.device).index_fill(0, index, 0)
    source = is_rest.cumsum(0) + (rank - 1)
    return source.scatter(0, index, torch.arange(rank, device=index.device))


def row_positions(pivots: Tensor, out_features: int) -> Tensor:
    """The inverse of `source_positions`: (pivots..., rest...) as int64 [out_features]."""
    source = source_positions(pivots, out_features)
    return torch.empty_like(source).scatter(0, source, torch.arange(out_features, device=source.device))
