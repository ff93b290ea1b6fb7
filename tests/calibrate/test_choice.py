# SPDX-License-Identifier: Apache-2.0
"""Rules that choose windows, against what their papers say written out, on pools small enough to look at all of it."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from eigenprune.calibrate import CHOICES, FEATURES, choose_indices
from eigenprune.calibrate.choice import directions, k_means, shares
from eigenprune.errors import CalibrationError, ConfigError

WINDOWS = 12


def features(seed: int = 3, windows: int = WINDOWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.rand(windows, generator=generator) for name in FEATURES}
    return found | {"embedding": torch.randn(windows, 5, generator=generator), "index": torch.arange(float(windows))}


@pytest.mark.parametrize("rule", CHOICES)
@pytest.mark.parametrize("count", [1, 5, WINDOWS])
def test_every_rule_gives_that_many_different_windows_and_the_same_ones_again(rule: str, count: int) -> None:
    found = choose_indices(rule, features(), count)
    assert len(set(found)) == count
    assert set(found) <= set(range(WINDOWS))
    assert choose_indices(rule, features(), count) == found
    needed = {name: value for name, value in features().items() if name in (*CHOICES[rule].needs, "index")}
    assert choose_indices(rule, needed, count) == found


@pytest.mark.parametrize("rule", CHOICES)
def test_every_rule_copes_with_windows_that_are_all_alike(rule: str) -> None:
    alike = {name: torch.ones(WINDOWS, 5) if name == "embedding" else torch.zeros(WINDOWS) for name in FEATURES}
    assert len(set(choose_indices(rule, alike, 4))) == 4


def test_first_takes_the_order_of_the_text_and_random_its_seed() -> None:
    assert choose_indices("first", features(), 3) == [0, 1, 2]
    drawn = {tuple(sorted(choose_indices("random", features(), 3, seed=seed))) for seed in range(40)}
    assert len(drawn) > 20  # of 220 sets
    assert {i for some in drawn for i in some} == set(range(WINDOWS))


@pytest.mark.parametrize("rule", ["el2n", "grand"])
def test_scores_take_the_highest_and_the_earlier_of_equals(rule: str) -> None:
    pool = features()
    pool[rule] = torch.tensor([0.5, 0.9, 0.1, 0.9, 0.5, 0.7])
    assert choose_indices(rule, pool | {"index": torch.arange(6.0)}, 4) == [1, 3, 5, 0]


def test_coverage_is_greedy_and_within_twice_the_best_radius() -> None:
    for seed in range(5):
        pool = features(seed)
        points = directions(pool["embedding"])
        found = choose_indices("coverage", pool, 4)
        chosen = [min(range(WINDOWS), key=lambda i: float((points[i] - points.mean(0)).norm()))]
        while len(chosen) < 4:  # the algorithm as it is printed
            chosen.append(max(range(WINDOWS), key=lambda i: min(float((points[i] - points[j]).norm()) for j in chosen)))
        assert found == chosen

        distance = torch.cdist(points, points)
        best = min(
            float(distance[:, list(some)].min(1).values.max()) for some in itertools.combinations(range(WINDOWS), 4)
        )
        assert distance[:, found].min(1).values.max() <= 2 * best * (1 + 1e-12)


def test_prototypes_are_the_nearest_of_each_of_clusters_that_are_plain_to_see() -> None:
    """Three bundles of directions; the window of each that points closest to its bundle's mean direction."""
    generator = torch.Generator().manual_seed(1)
    axes = torch.eye(3).repeat_interleave(4, 0)
    points = axes + 0.05 * torch.randn(12, 3, generator=generator)
    found = choose_indices("prototypes", {"embedding": points}, 3)
    unit = directions(points)
    expected = []
    for bundle in range(3):
        members = list(range(4 * bundle, 4 * bundle + 4))
        centre = unit[members].mean(0)
        expected.append(min(members, key=lambda i: float((unit[i] - centre).norm())))
    assert sorted(found) == sorted(expected)


def test_k_means_ends_where_no_point_and_no_centre_would_move() -> None:
    points = features(windows=40)["embedding"].double()
    labels, centres = k_means(points, 6)
    assert torch.equal(labels, torch.cdist(points, centres).argmin(1))
    for cluster in range(6):
        torch.testing.assert_close(centres[cluster], points[labels == cluster].mean(0), rtol=0, atol=1e-12)


def test_damage_shares_out_by_the_mean_of_each_cluster_and_takes_the_worst_of_it() -> None:
    """Two bundles of four among eight windows (so sqrt(8/2) = 2 clusters); one was damaged three times as much."""
    generator = torch.Generator().manual_seed(2)
    points = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4) + 0.05 * torch.randn(8, 2, generator=generator)
    damage = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.6, 0.5, 0.7, 0.6])
    # means 0.2 and 0.6: of four windows 1 and 3
    assert choose_indices("damage", {"embedding": points, "damage": damage}, 4) == [6, 4, 7, 2]
    # of six: 1.5 and 4.5, that is 2 and 4, for the smaller one is as far below its share and comes first
    assert sorted(choose_indices("damage", {"embedding": points, "damage": damage}, 6)) == [1, 2, 4, 5, 6, 7]


def test_shares_are_whole_within_room_and_within_one_of_the_proportion() -> None:
    assert shares([1, 1, 2], [9, 9, 9], 8) == [2, 2, 4]
    assert shares([1, 1, 1], [9, 9, 9], 8) == [3, 3, 2]
    assert shares([0, 0], [2, 2], 3) == [2, 1]
    assert shares([10, 1, 1], [2, 5, 5], 8) == [2, 3, 3]  # what one has no room for goes to the others
    random = torch.Generator().manual_seed(4)
    for _ in range(50):
        weights = torch.rand(5, generator=random).tolist()
        found = shares(weights, [100] * 5, 17)
        assert sum(found) == 17
        for part, weight in zip(found, weights, strict=True):
            assert abs(part - 17 * weight / math.fsum(weights)) < 1


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ConfigError, match="prototypes"):
        choose_indices("best", features(), 2)
    with pytest.raises(CalibrationError, match="pool of 12"):
        choose_indices("first", features(), 13)
    with pytest.raises(CalibrationError, match="needs the features el2n"):
        choose_indices("el2n", {"index": torch.arange(4.0)}, 2)
    with pytest.raises(CalibrationError, match="window 1 is NaN"):
        choose_indices("grand", {"grand": torch.tensor([1.0, math.nan, 2.0])}, 2)
