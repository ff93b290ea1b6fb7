# SPDX-License-Identifier: Apache-2.0
"""Pair factors to pivot factors: rows of the weight itself, and the mix of them that gives the others."""

import torch
from torch import Tensor

LARGEST_MIX = 2.0  # entries of the mix beyond this are swapped away; a bound b costs at most b sqrt(rank) in rounding
MOST_SWAPS = 200
LEAST_STEP = 1e-6  # of an elimination, relative to a column's length: float64 keeps 10 digits, twice what is stored


def pivot_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store `left [m, r] @ right [r, n]` by `r` of its own rows (PIFA, arXiv 2501.19090): r (m + n - r) numbers.

    The rows are those that Gaussian elimination with row pivoting of `left` chooses, improved by the swaps of the
    maximum volume algorithm (Goreinov et al., 2010) until no entry of the mix exceeds 2 in size: then rounding the
    rows to a short dtype disturbs no other row by much.

    Args:
        left, right: float64.

    Returns:
        mix [m - r, r], rows [r, n], and pivots [r] int32, ascending: `W[pivots] = rows`, `W[others] = mix @ rows`.
    """
    m, rank = left.shape
    basis, factors, swaps = _factorised(left)
    order = _swapped_order(swaps, m)
    others, pivots = order[rank:], order[:rank]
    # basis[order] = L U: the mix is the lower part of L by its upper part, U drops out.
    lower = torch.linalg.solve_triangular(factors[:rank].t(), factors[rank:].t(), upper=True, unitriangular=True)
    mix = lower.t()
    if mix.numel() and float(mix.abs().max()) > LARGEST_MIX:
        pivots, others = _swap_large_entries(mix, pivots, others)
        # Once more from the clean basis: the updates of the swaps have added rounding.
        mix = torch.linalg.solve(basis[pivots].t(), basis[others].t()).t()
    pivots, columns = pivots.sort()
    rows = others.argsort()
    return mix[rows][:, columns], left[pivots] @ right, pivots.int()


def _factorised(left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A basis of the column space of `left` [m, r], with its LU factors and row interchanges.

    The choice and the mix depend on the column space only, and so does L: for `left = Q T` with T upper triangular, the
    elimination of `left` takes the same pivots as that of Q, and only U differs. So the columns themselves serve while
    no step of the elimination loses more than 6 digits to cancellation; else the Q of a QR, some times slower.
    """
    lengths = torch.linalg.vector_norm(left, dim=0)
    columns = left / lengths.clamp_min(torch.finfo(left.dtype).tiny)
    factors, swaps, _ = torch.linalg.lu_factor_ex(columns)
    if float(factors.diagonal().abs().min()) > LEAST_STEP:
        return columns, factors, swaps
    basis, _ = torch.linalg.qr(left)
    factors, swaps, _ = torch.linalg.lu_factor_ex(basis)
    return basis, factors, swaps


def _swapped_order(swaps: Tensor, m: int) -> Tensor:
    """The row order after LAPACK's row interchanges, [m] int64."""
    order = list(range(m))
    for i, j in enumerate((swaps - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order, device=swaps.device)


def _swap_large_entries(mix: Tensor, pivots: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange a pivot row with another row wherever the mix is larger than the bound, the largest first."""
    if mix.numel() == 0:
        return pivots, others
    mix, pivots, others = mix.clone(), pivots.clone(), others.clone()
    for _ in range(MOST_SWAPS):
        row, column = divmod(int(mix.abs().argmax()), mix.shape[1])
        entry = mix[row, column].clone()
        if entry.abs() <= LARGEST_MIX:
            break
        pivots[column], others[row] = others[row].clone(), pivots[column].clone()
        # Rank-one update of the mix for the exchanged basis (one step of Gauss-Jordan).
        old_row, old_column = mix[row].clone(), mix[:, column].clone()
        mix -= torch.outer(old_column, old_row) / entry
        mix[:, column] = old_column / entry
        mix[row] = -old_row / entry
        mix[row, column] = 1 / entry
    return pivots, others
