# SPDX-License-Identifier: Apache-2.0
"""KEN (Mastromattei and Zanzotto, Findings of ACL 2024, arXiv 2402.03142): which entries of a row are kept.

A Gaussian kernel density of the row's values, with Scott's bandwidth, is taken at k points spaced evenly over their
range, and rounded; each point, by falling density, takes the nearest value that is not taken. As every point takes one,
the density decides on the order only: what is kept is an even cover of the range of values.

The authors' code marks what it resets by 0.0, and finds what it keeps by value: an entry that is zero is always reset,
equal values are kept or reset together, and a constant row cannot be done. Here a row keeps exactly k entries, the
lower index first among equal ones, and of a constant row the first k.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Match = Callable[[npt.NDArray[np.floating], Floats], Bools]

KERNEL_VALUES = 1 << 21  # kernel values in memory at once: 16 MB
SHORT = 256
SEARCHED = 1 << 16  # values searched by one vector operation: 512 kB, which stay in a second-level cache
FEW = 4  # rows that are searched faster than sorted: a vector operation on so few costs its call
SORTED = 1 << 18  # values matched at a time: fewer waste time on calls, more on cache misses


def ken(rows: Tensor, count: int) -> Tensor:
    """KEN to the letter: the mask [rows, m] of the `count` entries that each of `rows` [rows, m] keeps. O(m count)."""
    return _row_by_row(rows, count, SEARCHED, _match_by_density)


def ken_fast(rows: Tensor, count: int) -> Tensor:
    """KEN with the points visited from left to right, so that no density is needed. O(m log m).

    The two agree on 99.9 % of the entries of float32 rows of `SHORT` values or more; shorter rows, where the order
    tells, are done to the letter.
    """
    if rows.shape[1] < SHORT:
        return ken(rows, count)
    return _row_by_row(rows, count, SORTED, _match_in_order)


def _row_by_row(rows: Tensor, count: int, entries: int, match: Match) -> Tensor:
    height, width = rows.shape
    mask = torch.full((height, width), count >= width, dtype=torch.bool)
    if count <= 0 or count >= width:
        return mask
    constant = rows.amin(1) == rows.amax(1)
    mask[constant, :count] = True
    step = max(1, entries // width)
    for some in (~constant).nonzero()[:, 0].split(step):
        values = rows[some].numpy()
        mask[some] = torch.from_numpy(match(values, grid(values, count)))
    return mask


def grid(values: npt.NDArray[np.floating], count: int) -> Floats:
    """[rows, count] float64: points spaced evenly from the least to the greatest of `values` [rows, m]."""
    points = np.linspace(values.min(1).astype(np.float64), values.max(1).astype(np.float64), count, axis=1)
    return np.ascontiguousarray(points)


def rounded_density(values: npt.NDArray[np.floating], points: Floats) -> Floats:
    """Gaussian kernel density of each row of `values` [rows, m] at its `points` [rows, k], rounded to integers.

    Bandwidth `1.06 std m^(-1/5)`, with the population's standard deviation (Scott's rule of thumb).
    """
    values = values.astype(np.float64)
    width = 1.06 * values.std(1) * values.shape[1] ** -0.2
    scale = 1 / (values.shape[1] * width * np.sqrt(2 * np.pi))
    density = np.empty_like(points)
    step = max(1, KERNEL_VALUES // (values.shape[1] * points.shape[1]))
    for start in range(0, len(values), step):
        some = slice(start, start + step)
        distance = (points[some, :, None] - values[some, None, :]) / width[some, None, None]
        np.square(distance, out=distance)
        distance *= -0.5
        density[some] = np.exp(distance, out=distance).sum(2)
    rounded: Floats = np.round(density * scale[:, None])
    return rounded


def _match_by_density(values: npt.NDArray[np.floating], points: Floats) -> Bools:
    order = np.argsort(-rounded_density(values, points), axis=1, kind="stable")
    return _take_nearest(values, np.take_along_axis(points, order, 1))


def _take_nearest(values: npt.NDArray[np.floating], points: Floats) -> Bools:
    """Each point, in the order given, takes the nearest of the values that are left."""
    free = values.astype(np.float64)
    height = np.arange(len(free))
    distance = np.empty_like(free)
    mask = np.zeros(free.shape, np.bool_)
    for point in np.ascontiguousarray(points.T):
        np.subtract(free, point[:, None], out=distance)
        np.abs(distance, out=distance)
        nearest = distance.argmin(1)  # the first one
        mask[height, nearest] = True
        free[height, nearest] = np.inf
    return mask


def _match_in_order(values: npt.NDArray[np.floating], points: Floats) -> Bools:
    if len(values) <= FEW or points.shape[1] == 1:
        return _take_nearest(values, points)
    return _match_sorted(values, points)


def _match_sorted(values: npt.NDArray[np.floating], points: Floats) -> Bools:
    """Sort each row; each point takes the nearer of the free value below it and the free value from it on.

    With `position` the first sorted place that no point has reached, the free places are all from `position` on and
    those of a chain: `last` is the highest free place below it, and `below[place]` the next lower free one. A point
    with c values below it moves `position` up to c; the places it passes are free, and each is chained to the one
    before, so `below` has to be written only where the run before the place is broken.
    """
    height, width = values.shape
    order, ascending, tied = _sorted(values)
    # A place of sentinels on either side: infinitely far, so never the nearer one. All indices are flat.
    padded = np.full((height, width + 2), np.inf, values.dtype)
    padded[:, 1:-1] = ascending
    padded[:, 0] = -np.inf
    flat = padded.reshape(-1)
    first = np.arange(height) * (width + 2) + 1
    upto = np.ascontiguousarray((_values_up_to(ascending, points) + first[:, None]).T)
    below = np.arange(-1, flat.size - 1)
    below[first - 1] = first - 1  # the sentinel's own: there is nothing lower
    chosen = np.empty_like(upto)
    position, last = first, first - 1
    for i, point in enumerate(np.ascontiguousarray(points.T)):
        reached = np.maximum(position, upto[i])
        left = np.where(reached > position, reached - 1, last)
        take_right = point - flat.take(left) > flat.take(reached) - point
        chosen[i] = np.where(take_right, reached, left)
        position = reached + take_right
        last = np.where(take_right, left, below.take(left))
        below[position] = last
    taken = np.zeros(flat.size, np.bool_)
    taken[chosen] = True
    in_order = taken.reshape(height, width + 2)[:, 1:-1]
    in_order[tied] = _first_among_equals(ascending[tied], in_order[tied])
    mask = np.empty(values.size, np.bool_)
    mask[order] = in_order
    return mask.reshape(height, width)


def _sorted(values: npt.NDArray[np.floating]) -> tuple[Ints, npt.NDArray[np.floating], Bools]:
    """Flat indices that sort each row, the lower first among equal values; the sorted rows; which have equal ones."""
    starts = np.arange(0, values.size, values.shape[1])[:, None]
    flat = values.reshape(-1)
    order = np.argsort(values, axis=1) + starts  # several times faster than a stable one
    ascending = flat.take(order)
    tied = (ascending[:, 1:] == ascending[:, :-1]).any(1)
    order[tied] = np.argsort(values[tied], axis=1, kind="stable") + starts[tied]
    return order, ascending, tied


def _values_up_to(ascending: npt.NDArray[np.floating], points: Floats) -> Ints:
    """[rows, k]: how many of the sorted values of a row are at most its point.

    The points are evenly spaced, so a value's place among them is a division. Within rounding of a point it may count
    on either side: it is the nearest to that point either way.
    """
    height, count = points.shape
    low = points[:, :1]
    place = (ascending - low) * ((count - 1) / np.maximum(points[:, -1:] - low, np.finfo(np.float64).tiny))
    bins = np.ceil(place).astype(np.int64)
    np.clip(bins, 0, count - 1, out=bins)
    bins += np.arange(0, height * count, count)[:, None]
    counts: Ints = np.bincount(bins.reshape(-1), minlength=height * count).reshape(height, count).cumsum(1)
    return counts


def _first_among_equals(ascending: npt.NDArray[np.floating], taken: Bools) -> Bools:
    """The same number taken among equal values of a sorted row, but the first ones."""
    height, width = ascending.shape
    starts = np.ones((height, width), np.bool_)
    np.not_equal(ascending[:, 1:], ascending[:, :-1], out=starts[:, 1:])
    group = starts.reshape(-1).cumsum() - 1
    first = np.flatnonzero(starts)
    count = np.bincount(group, weights=taken.reshape(-1), minlength=len(first))
    rank = np.arange(starts.size) - first[group]
    earliest: Bools = (rank < count[group]).reshape(height, width)
    return earliest
