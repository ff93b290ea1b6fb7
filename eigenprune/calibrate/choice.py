# SPDX-License-Identifier: Apache-2.0
"""Which windows of a pool to calibrate on: rows of one table.

A rule sees features of the windows (see `window_features`) and picks; what it needs is measured, and nothing else.
The rules come from work on training data, and choose what is *hard*, *typical* or *spread out*. Calibration is no
training, though: the statistics want an even mean over the text of the use, so `random` is the row to beat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenprune.errors import CalibrationError, ConfigError

ROUNDS = 100  # of k-means at most; some tens of windows settle in a few


@dataclass(frozen=True)
class Choice:
    """A rule.

    Attributes:
        needs: the features that it reads, of `FEATURES`.
        choose: (features, count, seed) to the indices of `count` windows, best first.
        source: where it is from.
    """

    needs: tuple[str, ...]
    choose: Callable[[Mapping[str, Tensor], int, int], list[int]]
    source: str


FEATURES = ("embedding", "el2n", "grand", "damage")


def choose_indices(rule: str, features: Mapping[str, Tensor], count: int, *, seed: int = 0) -> list[int]:
    """Indices of `count` windows of a pool, by a row of `CHOICES`; the same input gives the same choice.

    Args:
        rule: name of the row.
        features: `index [n]` or any other one that tells n, and those that the rule needs: `embedding [n, d]`;
            `el2n`, `grand`, `damage [n]`, all floating.
        count: how many, at most n.
        seed: of random draws.

    Raises:
        ConfigError: no such rule.
        CalibrationError: a feature is missing or not finite, or there are fewer windows than wanted.
    """
    choice = find_choice(rule)
    missing = [name for name in choice.needs if name not in features]
    if missing:
        raise CalibrationError(f"rule {rule!r} needs the features {', '.join(missing)} of the windows")
    for name in choice.needs:
        if not torch.isfinite(features[name]).all():
            raise CalibrationError(f"the feature {name} of window {_first_bad(features[name])} is NaN or infinite")
    total = len(next(iter(features.values())))
    if not 1 <= count <= total:
        raise CalibrationError(f"{count} windows of a pool of {total}: give more text, or ask for fewer")
    return choice.choose(features, count, seed)


def find_choice(rule: str) -> Choice:
    """The row of that name; ConfigError where there is none."""
    if rule not in CHOICES:
        raise ConfigError(f"choose_windows {rule!r} is unknown; there are: {', '.join(CHOICES)}")
    return CHOICES[rule]


def first(features: Mapping[str, Tensor], count: int, seed: int) -> list[int]:
    """The first ones, in the order of the text."""
    return list(range(count))


def at_random(features: Mapping[str, Tensor], count: int, seed: int) -> list[int]:
    """Drawn without replacement."""
    total = len(next(iter(features.values())))
    drawn: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return drawn


def highest(name: str) -> Callable[[Mapping[str, Tensor], int, int], list[int]]:
    """The rule that takes the windows with the largest value of a feature, the earlier one at equal values."""

    def choose(features: Mapping[str, Tensor], count: int, seed: int) -> list[int]:
        return _descending(features[name])[:count]

    return choose


def prototypes(features: Mapping[str, Tensor], count: int, seed: int) -> list[int]:
    """Of each of `count` clusters of directions, the window nearest to the centre.

    Sorscher et al., arXiv 2206.14486: with few examples the easy ones serve best, and easy are those near the centre of
    their k-means cluster of embeddings. There the nearest of all clusters together are kept; here one of each, so that
    no cluster is without any.
    """
    points = directions(features["embedding"])
    labels, centres = k_means(points, count)
    distance = (points - centres[labels]).square().sum(1)
    found = []
    for cluster in range(count):
        members = (labels == cluster).nonzero().flatten().tolist()
        found.append(min(members, key=lambda member: (float(distance[member]), member)))
    return found


def coverage(features: Mapping[str, Tensor], count: int, seed: int) -> list[int]:
    """Greedy k-centre: after the window nearest to the mean, always the one farthest from all that are chosen.

    Sener and Savarese, arXiv 1708.00489, algorithm 1: the largest distance of any window to a chosen one is at most
    twice the least possible.
    """
    points = directions(features["embedding"])
    found = [int((points - points.mean(0)).square().sum(1).argmin())]
    nearest = torch.full((len(points),), math.inf, dtype=points.dtype)
    while len(found) < count:
        nearest = torch.minimum(nearest, (points - points[found[-1]]).square().sum(1))
        nearest[found[-1]] = -math.inf  # also where all others are equal to a chosen one
        found.append(int(nearest.argmax()))
    return found


def damaged(features: Mapping[str, Tensor], count: int, seed: int) -> list[int]:
    """Windows where a pruned model differs most from the dense one: more of the clusters that were damaged more.

    PASER, arXiv 2502.12594: examples are clustered; a cluster's part of the budget is its mean damage (the divergence
    of Jensen and Shannon between the two models, a token) over the sum of all clusters'; in a cluster the most damaged
    come first, by damage over the cost of reading, which is the same for windows of equal length. Clusters are k-means
    over the model's own embeddings here, in place of its manifold learning and factorisation; its last step, which
    drops examples of conflicting concepts, has no counterpart in running text.
    """
    damage = features["damage"].double()
    total = len(damage)
    clusters = max(1, round(math.sqrt(total / 2)))
    labels, _ = k_means(directions(features["embedding"]), clusters)
    members = [[i for i in _descending(damage) if int(labels[i]) == cluster] for cluster in range(clusters)]
    weights = [float(damage[inner].mean()) for inner in members]
    parts = shares(weights, [len(inner) for inner in members], count)
    chosen = [i for inner, part in zip(members, parts, strict=True) for i in inner[:part]]
    return sorted(chosen, key=lambda i: (-float(damage[i]), i))


def shares(weights: Sequence[float], room: Sequence[int], count: int) -> list[int]:
    """`count` shared out in proportion to `weights`, no part above its `room`.

    Floors first, then, one at a time, to the part that is furthest below its share (the earlier one at equal distance).
    """
    total = sum(weights)
    wanted = [count * weight / total if total > 0 else count / len(weights) for weight in weights]
    parts = [min(math.floor(want), limit) for want, limit in zip(wanted, room, strict=True)]
    while sum(parts) < count:
        free = [i for i in range(len(parts)) if parts[i] < room[i]]
        parts[max(free, key=lambda i: (wanted[i] - parts[i], -i))] += 1
    return parts


def directions(embedding: Tensor) -> Tensor:
    """Rows less their mean, at length 1, float64: a model's embeddings share a large common part that says nothing."""
    centred = embedding.double() - embedding.double().mean(0)
    lengths = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    found: Tensor = centred / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return found


def k_means(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from centres as far apart as the greedy k-centre rule puts them; no cluster ends empty.

    Args:
        points: [n, d], floating.
        clusters: at most n.

    Returns:
        (labels [n] int64, centres [clusters, d]).
    """
    starts = [0]
    nearest = torch.full((len(points),), math.inf, dtype=points.dtype)
    while len(starts) < clusters:
        nearest = torch.minimum(nearest, (points - points[starts[-1]]).square().sum(1))
        nearest[starts[-1]] = -math.inf
        starts.append(int(nearest.argmax()))
    centres = points[starts].clone()
    labels = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        distance = torch.cdist(points, centres)
        found = distance.argmin(1)
        for cluster in range(clusters):  # an empty one takes the point that is worst off where others are left
            if not (found == cluster).any():
                alone = torch.bincount(found, minlength=clusters)[found] == 1
                found[distance.gather(1, found[:, None]).flatten().masked_fill(alone, -1).argmax()] = cluster
        if torch.equal(found, labels):
            break
        labels = found
        centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(clusters)])
    return labels, centres


def _descending(values: Tensor) -> list[int]:
    """Indices from the largest value on, the earlier one at equal values."""
    order: list[int] = torch.sort(values, descending=True, stable=True).indices.tolist()
    return order


def _first_bad(values: Tensor) -> int:
    return int((~torch.isfinite(values.flatten(1) if values.ndim > 1 else values[:, None])).any(1).nonzero()[0])


CHOICES: dict[str, Choice] = {
    "first": Choice((), first, "the order of the text"),
    "random": Choice((), at_random, "the baseline of all the papers below"),
    "damage": Choice(("embedding", "damage"), damaged, "PASER, arXiv 2502.12594"),
    "el2n": Choice(("el2n",), highest("el2n"), "EL2N, arXiv 2107.07075"),
    "grand": Choice(("grand",), highest("grand"), "GraNd, arXiv 2107.07075"),
    "prototypes": Choice(("embedding",), prototypes, "Sorscher et al., arXiv 2206.14486"),
    "coverage": Choice(("embedding",), coverage, "Sener and Savarese, arXiv 1708.00489"),
}
