# SPDX-License-Identifier: Apache-2.0
"""Which entries of a row go together at the least loss: swaps in blocks, on a quadratic model of the loss.

The iterative Combinatorial Brain Surgeon (iCBS, Rosenberg et al., arXiv 2411.17796) minimises `r^T Q r` over choices r
of entries to give up, a block of them at a time, where entries that cancel one another are seen, which no score of
single entries can. Its Q is an empirical Fisher matrix; here, row by row, `Q = (d d^T) * C` with d the change of the
entries and C the second moment of the layer's inputs: the squared error of the output, as SparseGPT has it.
"""

import torch
from torch import Tensor

from eigenprune.entries.blocks import Block
from eigenprune.entries.budget import highest_of_rows
from eigenprune.entries.scores import Context
from eigenprune.errors import CalibrationError

BLOCK = 32  # candidates of a block, half of them kept so far, half given up
SWAPS = 64  # blocks of a row, one swap each


def icbs(block: Block, count: int, context: Context) -> Tensor:
    """The mask [rows, m] of `count` entries a row. Tensors that are no linear's weight go by size of change alone.

    Raises:
        CalibrationError: no statistics, or none with input Grams.
    """
    change = block.tuned - block.base
    if context.statistics is None or not context.statistics.input_gram:
        raise CalibrationError(
            "rule 'icbs' needs statistics with input Grams: collect_entry_statistics(input_grams=True)"
        )
    gram = context.statistics.input_gram.get(block.name)
    if gram is None:
        return highest_of_rows(change.abs(), count)
    return best_swaps(change.double(), gram.cpu().double(), count)


def best_swaps(change: Tensor, gram: Tensor, count: int, block: int = BLOCK, swaps: int = SWAPS) -> Tensor:
    """Swap kept and given-up entries of each row while that lowers `(d*r) C (d*r)^T`, r the given-up ones.

    Starts from the `count` entries of the largest `d_j^2 C_jj`. Every step looks at a block, the entries whose giving
    up or return promises most, and makes the best swap in it; rows where there is none are done.

    Args:
        change: d, [rows, m] float64.
        gram: C, [m, m] float64, symmetric positive semi-definite.
        count: kept entries a row.
        block: candidates a step.
        swaps: steps at most.
    """
    rows, width = change.shape
    own = change.square() * gram.diagonal()
    kept = highest_of_rows(own, count)
    if count <= 0 or count >= width:
        return kept
    sides = (min(block // 2, width - count), min(block // 2, count))
    output = (change * ~kept) @ gram  # C (d * r): moves with every swap
    every = torch.arange(rows)
    for _ in range(swaps):
        slope = 2 * change * output
        # What a return saves, and what a giving up costs, each alone.
        saved, back = (slope - own).masked_fill(kept, -torch.inf).topk(sides[0], 1)
        cost, away = (slope + own).masked_fill(~kept, torch.inf).topk(sides[1], 1, largest=False)
        both = (
            change.gather(1, back)[:, :, None]
            * change.gather(1, away)[:, None, :]
            * gram[back[:, :, None], away[:, None, :]]
        )
        gain = (saved[:, :, None] - cost[:, None, :] + 2 * both).reshape(rows, -1)
        best, place = gain.max(1)
        better = best > 1e-12 * own.sum(1)  # a gain within rounding could be undone by the next swap
        if not better.any():
            break
        row = every[better]
        i = back[row, place[better] // sides[1]]
        j = away[row, place[better] % sides[1]]
        kept[row, i], kept[row, j] = True, False
        output[row] += change[row, j, None] * gram[j] - change[row, i, None] * gram[i]
    return kept
