# SPDX-License-Identifier: Apache-2.0
"""Sums of outer products, the statistic everything here is made of."""

import torch
from torch import Tensor

# Columns of a block row. At 256 a Gram of width 1536 takes 58 % of the products and of the memory of the full square,
# and the blocks are still large enough for a full GEMM rate.
BLOCK = 256
ROUNDING = 1e-6  # of a mean norm: what float32 leaves of a gradient that is zero


class GramSum:
    """A sum of `rows.T @ rows` in float32, kept as the block rows of its lower triangle.

    Args:
        width: n of the [n, n] sum.
        device: where it lives.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        ends = [min(start + BLOCK, width) for start in range(0, width, BLOCK)]
        starts = range(0, width, BLOCK)
        self.blocks = [torch.zeros(end - start, end, device=device) for start, end in zip(starts, ends, strict=True)]

    def add(self, rows: Tensor) -> None:
        """Add `rows.T @ rows`; rows [tokens, n] float32."""
        for block in self.blocks:
            height, end = block.shape
            block.addmm_(rows[:, end - height : end].t(), rows[:, :end])

    def dense(self) -> Tensor:
        """The whole symmetric sum, [n, n]."""
        return unpack_gram(self.blocks)


def unpack_gram(blocks: list[Tensor]) -> Tensor:
    """The symmetric [n, n] matrix of which `blocks` are the block rows of the lower triangle."""
    width = blocks[-1].shape[1]
    full = blocks[0].new_zeros(width, width)
    for block in blocks:
        height, end = block.shape
        full[end - height : end, :end] = block
    upper = full.tril(-1).t()
    return full.tril_().add_(upper)


def clip_norms_(rows: Tensor, low: float, high: float) -> Tensor:
    """Scale each row of `rows` [tokens, n], in place, to a norm within [low, high] times the mean norm of all."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    mean = norms.mean()
    scale = norms.clamp(low * mean, high * mean) / norms.clamp_min(torch.finfo(rows.dtype).tiny)
    # A row that is zero up to rounding has no direction worth scaling.
    scale = torch.where(norms > ROUNDING * mean, scale, torch.ones_like(scale))
    outside = (scale != 1).nonzero().squeeze(1)  # few: scaling all rows would cost a pass over memory
    rows.index_copy_(0, outside, rows[outside] * scale[outside].unsqueeze(1))
    return rows
