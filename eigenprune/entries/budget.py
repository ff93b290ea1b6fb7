# SPDX-License-Identifier: Apache-2.0
"""Exactly so many of the highest scores: of a row, of a tensor, of a model. Equal scores: the lower index is kept."""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eigenprune.errors import BudgetError

# Scores of one tensor, block after block: [rows, m] float32, finite and not negative.
Scores = Callable[[str], Iterable[Tensor]]
HALF = 1 << 16


def share_of(keep: float, entries: int) -> int:
    """`keep` times `entries`, rounded, a half upwards."""
    return math.floor(keep * entries + 0.5)


def highest_of_rows(scores: Tensor, count: int) -> Tensor:
    """The mask [rows, m] of the `count` highest `scores` [rows, m] of each row; all where `count` is m or more."""
    rows, width = scores.shape
    if count >= width or count <= 0:
        return torch.full((rows, width), count > 0, dtype=torch.bool)
    values = scores.numpy()
    threshold = np.partition(values, width - count, axis=1)[:, width - count, None]
    mask = values > threshold
    equal = values == threshold
    missing = count - mask.sum(1, keepdims=True)
    crowded = (equal.sum(1, keepdims=True) > missing)[:, 0]
    if crowded.any():  # more equal scores than places
        equal[crowded] &= equal[crowded].cumsum(1) <= missing[crowded]
    return torch.from_numpy(mask | equal)


class Threshold:
    """The score from which on entries of a group of tensors are kept, and how many of those that have just that score.

    The `count` highest of all scores, found in two passes over them that count only (a radix selection on the bits of
    float32), so that a model's scores are never in memory together. Masks are asked for in the order of the tensors.
    """

    def __init__(self, names: Iterable[str], scores: Scores, count: int) -> None:
        self._scores = scores
        names = list(names)
        high = self._histogram(names, lambda keys: keys >> 16)
        self._high, above = _bucket(high, count)
        low = self._histogram(names, lambda keys: keys[keys >> 16 == self._high] & (HALF - 1))
        place, equal_above = _bucket(low, count - above)
        self._key = (self._high << 16) | place
        self._ties = count - above - equal_above  # how many of the score itself are kept, the first ones

    def _histogram(self, names: list[str], part: Callable[[npt.NDArray[np.int32]], npt.NDArray[np.int32]]) -> Tensor:
        total = np.zeros(HALF, np.int64)
        for name in names:
            for scores in self._scores(name):
                total += np.bincount(part(_keys(scores)), minlength=HALF)
        return torch.from_numpy(total)

    def mask(self, name: str, size: int) -> Tensor:
        """The flat mask of a tensor of `size` entries, bool; each call uses up places for equal scores."""
        mask, start = np.zeros(size, np.bool_), 0
        for scores in self._scores(name):
            keys = _keys(scores)
            part = mask[start : start + len(keys)]
            np.greater(keys, self._key, out=part)
            equal = np.flatnonzero(keys == self._key)[: self._ties]
            part[equal] = True
            self._ties -= len(equal)
            start += len(keys)
        return torch.from_numpy(mask)


def highest_of_all(
    sizes: Mapping[str, int], scores: Scores, keep: float, least: float, put: Callable[[str, Tensor], None]
) -> None:
    """Keep the share `keep` of all entries, those of the highest scores, and of each tensor at least a share `least`.

    A tensor that would fall below its least gets its own highest scores, and the others share what is left: repeated
    until none falls below.

    Args:
        sizes: {tensor: entries}, in order.
        scores: of a tensor, the same at each call.
        keep: in [0, 1].
        least: in [0, keep].
        put: takes a tensor's name and its flat mask.

    Raises:
        BudgetError: the least shares alone are more than the budget.
    """
    floors = {name: share_of(least, size) for name, size in sizes.items()}
    budget = share_of(keep, sum(sizes.values()))
    if sum(floors.values()) > budget:
        raise BudgetError(f"a least share of {least} in every tensor is more than keep={keep}: lower it")
    free = dict(sizes)
    while free:
        rest = budget - sum(floor for name, floor in floors.items() if name not in free)
        threshold = Threshold(free, scores, rest)
        poor = (
            [] if least == 0 else [name for name in free if int(threshold.mask(name, free[name]).sum()) < floors[name]]
        )
        if not poor:
            break
        for name in poor:
            del free[name]
    for name in sizes:
        if name not in free:
            put(name, Threshold([name], scores, floors[name]).mask(name, sizes[name]))
    if free:
        threshold = Threshold(free, scores, rest)  # its places for equal scores are not used up yet
        for name in free:
            put(name, threshold.mask(name, free[name]))


def _keys(scores: Tensor) -> npt.NDArray[np.int32]:
    """Integers in the order of `scores`: of floats that are not negative, the bits themselves."""
    keys: npt.NDArray[np.int32] = scores.float().reshape(-1).numpy().view(np.int32)
    return keys


def _bucket(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bucket that the `count`-th highest lies in, and how many lie above it; past all buckets for a count of 0."""
    if count <= 0:
        return HALF // 2 - 1, 0  # above the key of every finite float
    above = histogram.flip(0).cumsum(0).flip(0)  # in this bucket or a higher one
    place = int((above >= count).nonzero().max())
    return place, int(above[place] - histogram[place])
