# SPDX-License-Identifier: Apache-2.0
"""The change that fine-tuning made to a weight, as a low-rank part plus single entries.

A change is neither: some of it lies along few directions, some in few entries. The two parts are fitted in turn, each
exactly, so that the error never grows (GoDec: Zhou and Tao, ICML 2011, without their random projections).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.entries.packing import packed_bytes, smaller_form
from eigenprune.errors import ConfigError, WeightError
from eigenprune.ops import truncated_svd

ROUNDS = 8


@dataclass(frozen=True)
class LowRankSparse:
    """`left @ right`, with `values` added at the row-major `numbers`.

    Attributes:
        left: [m, rank] float32.
        right: [rank, n] float32.
        numbers: int64 [stored], rising.
        values: float32 [stored].
        error: Frobenius norm of what is missing.
    """

    left: Tensor
    right: Tensor
    numbers: Tensor
    values: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Of the low-rank part."""
        return self.right.shape[0]

    @property
    def stored(self) -> int:
        """Entries of the sparse part."""
        return self.numbers.numel()

    def dense(self) -> Tensor:
        """float32 [m, n], both parts together."""
        whole = (self.left @ self.right).flatten()
        whole[self.numbers] += self.values
        return whole.view(self.left.shape[0], self.right.shape[1])


def split_bytes(shape: tuple[int, int], rank: int, stored: int, item: int) -> int:
    """Bytes of both parts with values of `item` bytes, places as a delta file stores them."""
    entries = shape[0] * shape[1]
    places = packed_bytes(smaller_form(entries, stored), entries, stored) if 0 < stored < entries else 0
    return item * (rank * sum(shape) + stored) + places


def most_stored(shape: tuple[int, int], budget: int, item: int) -> int:
    """How many entries the sparse part alone can have within `budget` bytes; -1 where the budget is below 0."""
    if budget < 0:
        return -1
    low, high = 0, shape[0] * shape[1]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if split_bytes(shape, 0, middle, item) <= budget else (low, middle - 1)
    return low


def split_low_rank_sparse(change: Tensor, rank: int, stored: int, *, rounds: int = ROUNDS) -> LowRankSparse:
    """Split `change` [m, n] into rank `rank` and `stored` single entries.

    In turn: the best low-rank part of what the entries leave, by the package's exact truncated SVD, then the largest
    entries of what that leaves, the lower index where two are equal. Stops early where a round gains less than a
    thousandth of the error.

    Args:
        change: tuned minus base, any floating dtype; worked on in float32.
        rank: from 0 to min(m, n).
        stored: from 0 to m n.
        rounds: at most.

    Raises:
        ConfigError: `change` is no matrix, or `rank` or `stored` is out of range.
        WeightError: it is not finite.
    """
    if change.ndim != 2 or not 0 <= rank <= min(change.shape) or not 0 <= stored <= change.numel() or rounds < 1:
        raise ConfigError(
            f"a change of shape {tuple(change.shape)} cannot be split into rank {rank} and {stored} entries"
        )
    whole = change.detach().float().cpu()
    if not torch.isfinite(whole).all():
        raise WeightError("the change of a weight holds NaN or infinity: it cannot be split")
    best = None
    sparse = torch.zeros_like(whole)
    for _ in range(rounds):
        left, right = _low_rank(whole - sparse, rank)
        rest = (whole - left @ right).flatten()
        numbers = _largest(rest.abs(), stored)
        values = rest[numbers]
        rest[numbers] = 0
        error = float(torch.linalg.vector_norm(rest, dtype=torch.float64))
        if best is not None and error >= best.error * 0.999:
            return best if best.error <= error else LowRankSparse(left, right, numbers, values, error)
        best = LowRankSparse(left, right, numbers, values, error)
        sparse = torch.zeros_like(whole).flatten().index_put_((numbers,), values).view_as(whole)
        if rank == 0 or stored == 0:
            break  # there is nothing to take turns with
    if best is None:
        raise ConfigError("rounds must be at least 1")
    return best


def split_within(change: Tensor, budget: int, ranks: Iterable[int], *, item: int = 4) -> LowRankSparse:
    """The split of `change` [m, n] with the least error among `ranks`, the rest of `budget` bytes spent on entries.

    Args:
        change: as `split_low_rank_sparse`.
        budget: bytes, counted as `split_bytes` counts.
        ranks: to try; 0 is sparse alone. Those that the budget cannot pay are left out.
        item: bytes of a stored value.

    Raises:
        ConfigError: no rank can be paid. And as `split_low_rank_sparse`.
    """
    shape = (change.shape[0], change.shape[1])
    found: list[LowRankSparse] = []
    for rank in ranks:
        stored = most_stored(shape, budget - split_bytes(shape, rank, 0, item), item)
        if stored >= 0 and rank <= min(shape):
            found.append(split_low_rank_sparse(change, rank, stored))
    if not found:
        raise ConfigError(f"{budget} bytes pay for none of the ranks of a {shape[0]} x {shape[1]} change")
    return min(found, key=lambda split: split.error)


def _largest(sizes: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest, rising; the lower number where two are equal. (Sorting takes much longer.)"""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    least = sizes.kthvalue(sizes.numel() - count + 1).values
    chosen = sizes > least
    equal = (sizes == least).nonzero().view(-1)
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.nonzero().view(-1)


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if rank == 0:
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])
    found = truncated_svd(matrix, rank, tolerance=0)
    root = found.S.sqrt()
    return found.U * root, root.unsqueeze(-1) * found.Vh
