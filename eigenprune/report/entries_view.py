# SPDX-License-Identifier: Apache-2.0
"""Where the kept entries of a fine-tuned model lie, as arrays: after KEN_viz (arXiv 2402.03142), for all shapes.

A tensor is seen as a matrix: its first axis against all others, a vector as one row. Kept neighbours are counted among
the four beside, above and below an entry. Without its expectation under a random mask of the same density such a count
says nothing, so both are given together.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from eigenprune.errors import ConfigError

MOST_NEIGHBOURS = 4
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class NeighbourCounts:
    """How many kept neighbours the kept entries of a mask have.

    Attributes:
        shape: of the matrix.
        kept: number of kept entries.
        observed: [5] share of the kept entries with 0, 1, ..., 4 kept neighbours; all 0 where none is kept.
        expected: [5] the same, on average over all masks with as many kept entries.
    """

    shape: tuple[int, int]
    kept: int
    observed: tuple[float, ...]
    expected: tuple[float, ...]

    @property
    def density(self) -> float:
        """Kept share of the entries."""
        return self.kept / max(self.shape[0] * self.shape[1], 1)

    @property
    def observed_mean(self) -> float:
        """Kept neighbours of a kept entry, on average."""
        return sum(count * share for count, share in enumerate(self.observed))

    @property
    def expected_mean(self) -> float:
        """The same in a random mask."""
        return sum(count * share for count, share in enumerate(self.expected))


def as_matrix(tensor: Tensor) -> Tensor:
    """[rows, columns]: the first axis against all others, a vector or a number as one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def kept_values(tuned: Tensor, mask: Tensor) -> Tensor:
    """float32 [rows, columns]: the tuned value where `mask` is True, NaN (blank) where the entry is reset.

    Raises:
        ConfigError: the shapes differ.
    """
    if tuned.shape != mask.shape:
        raise ConfigError(f"a mask of {tuple(mask.shape)} for a tensor of {tuple(tuned.shape)}")
    return as_matrix(torch.where(mask, tuned.detach().float(), torch.nan))


def kept_neighbours(mask: Tensor) -> Tensor:
    """int8 [rows, columns]: how many of the up to four horizontal and vertical neighbours of each kept entry are kept;
    -1 where the entry is not kept.
    """
    kept = as_matrix(mask).to(torch.int8)
    counts = torch.zeros_like(kept)
    counts[1:] += kept[:-1]
    counts[:-1] += kept[1:]
    counts[:, 1:] += kept[:, :-1]
    counts[:, :-1] += kept[:, 1:]
    return torch.where(kept.bool(), counts, torch.full_like(counts, -1))


def count_neighbours(mask: Tensor) -> NeighbourCounts:
    """The counts of `kept_neighbours` as shares, beside those of a random mask.

    In a mask drawn from all that keep k of N entries, a kept entry with d neighbours has j kept ones with the
    hypergeometric probability C(k-1, j) C(N-k, d-j) / C(N-1, d); d is 4 inside, 3 at an edge, 2 in a corner, and fewer
    in a matrix of one row or column. The place of a kept entry is uniform, which weighs the cases.
    """
    matrix = as_matrix(mask)
    rows, columns = matrix.shape
    found = kept_neighbours(mask)
    kept = int(matrix.sum())
    observed = torch.bincount(found[found >= 0].to(torch.int64), minlength=MOST_NEIGHBOURS + 1).double()
    shares = (observed / max(kept, 1)).tolist()
    return NeighbourCounts((rows, columns), kept, tuple(shares), _expected(rows, columns, kept))


def _expected(rows: int, columns: int, kept: int) -> tuple[float, ...]:
    entries = rows * columns
    if kept == 0:
        return (0.0,) * (MOST_NEIGHBOURS + 1)
    places: dict[int, int] = {}
    for vertical, high in _neighbours_along(rows).items():
        for horizontal, wide in _neighbours_along(columns).items():
            places[vertical + horizontal] = places.get(vertical + horizontal, 0) + high * wide
    shares = [0.0] * (MOST_NEIGHBOURS + 1)
    for around, places_with in places.items():
        for count in range(around + 1):
            ways = comb(kept - 1, count) * comb(entries - kept, around - count)
            shares[count] += places_with / entries * (ways / comb(entries - 1, around))
    return tuple(shares)


def _neighbours_along(length: int) -> dict[int, int]:
    """{how many neighbours along an axis of `length`: how many places have so many}."""
    return {0: 1} if length == 1 else {1: 2, 2: length - 2} if length > 2 else {1: length}


def same_in_every_layer(names: Iterable[str], name: str) -> list[str]:
    """The `names` that differ from `name` in their numbers only, in the order of these; `name` itself among them."""
    pattern = re.compile(r"\d+".join(map(re.escape, NUMBER.split(name))))
    found = [other for other in names if pattern.fullmatch(other)]
    return sorted(found, key=lambda other: [int(number) for number in NUMBER.findall(other)])


def shrink(matrix: Tensor, most: int) -> Tensor:
    """float32 [at most `most`, at most `most`]: each cell the mean of its entries, blanks (NaN) left out; NaN where all
    are blank. A matrix that is small enough stays as it is.
    """
    rows, columns = (-(-side // most) for side in matrix.shape)
    if rows <= 1 and columns <= 1:
        return matrix.float()
    height, width = (-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns))
    padded = torch.full((height * rows, width * columns), torch.nan)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.view(height, rows, width, columns).permute(0, 2, 1, 3).reshape(height, width, -1).nanmean(-1)


def kept_share(mask: Tensor, most: int) -> Tensor:
    """float32 [at most `most`, at most `most`]: the kept share of each cell of the matrix."""
    return shrink(as_matrix(mask).float(), most)
