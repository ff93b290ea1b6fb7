# SPDX-License-Identifier: Apache-2.0
"""Wilson's interval and McNemar's test against their definitions, solved by other means."""

import itertools
import math
from fractions import Fraction

import pytest

from eigenprune.errors import CalibrationError
from eigenprune.evaluate.intervals import compare_answers, mcnemar, wilson_interval

Z95 = 1.959963984540054  # of tables


@pytest.mark.parametrize(("right", "total"), [(11, 80), (78, 80), (1, 3), (500, 1000), (1, 10_000), (9999, 10_000)])
def test_bounds_are_the_shares_at_which_the_score_test_just_rejects(right: int, total: int) -> None:
    """The definition: |right / total - p| = z sqrt(p (1 - p) / total) at both ends; ten roundings of float64."""
    share = right / total
    for bound in wilson_interval(right, total):
        distance = Z95 * math.sqrt(bound * (1 - bound) / total)
        assert abs(share - bound) == pytest.approx(distance, rel=1e-10)
    low, high = wilson_interval(right, total)
    assert 0 < low < share < high < 1


def test_headline_of_the_paper_has_the_interval_of_the_research_page() -> None:
    """11 of 80 and 78 of 80, to the printed digit."""
    assert [round(100 * bound, 1) for bound in wilson_interval(11, 80)] == [7.9, 23.0]
    assert [round(100 * bound, 1) for bound in wilson_interval(78, 80)] == [91.3, 99.3]


def test_none_and_all_right_end_exactly_at_the_border() -> None:
    for total in (1, 7, 80, 10**6):
        assert wilson_interval(0, total)[0] == 0.0
        assert wilson_interval(total, total)[1] == 1.0
        # z^2 / (n + z^2): the closed form where one side is empty.
        assert wilson_interval(0, total)[1] == pytest.approx(Z95**2 / (total + Z95**2), rel=1e-10)


def test_more_confidence_is_a_wider_interval() -> None:
    narrow, wide = wilson_interval(11, 80, 0.5), wilson_interval(11, 80, 0.99)
    assert wide[0] < narrow[0] < 11 / 80 < narrow[1] < wide[1]


@pytest.mark.parametrize("changed", range(11))
def test_mcnemar_is_the_share_of_all_outcomes_that_are_as_lopsided(changed: int) -> None:
    """Every one of the 2^n ways in which n changes can fall is counted."""
    ways = [sum(way) for way in itertools.product((0, 1), repeat=changed)]
    for gained in range(changed + 1):
        lopsided = [way for way in ways if abs(2 * way - changed) >= abs(2 * gained - changed)]
        assert mcnemar(gained, changed - gained) == float(Fraction(len(lopsided), len(ways)))


def test_thousands_of_changes_overflow_nothing() -> None:
    assert mcnemar(3000, 3000) == 1.0
    assert 0 < mcnemar(2000, 2400) < 1e-8
    assert mcnemar(0, 0) == 1.0


def test_comparison_counts_each_kind_of_change() -> None:
    before = [True, True, False, False, False]
    after = [True, False, True, True, False]
    found = compare_answers(before, after)
    assert (found.total, found.before, found.after, found.gained, found.lost) == (5, 2, 3, 2, 1)
    assert found.to_dict()["p_value"] == 1.0
    assert found.to_dict()["after_interval"] == list(wilson_interval(3, 5))


@pytest.mark.parametrize(("right", "total", "confidence"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_impossible_counts_are_refused(right: int, total: int, confidence: float) -> None:
    with pytest.raises(CalibrationError):
        wilson_interval(right, total, confidence)


def test_answers_that_do_not_pair_are_refused() -> None:
    for before, after in (([], []), ([True], [True, False])):
        with pytest.raises(CalibrationError, match="same ones"):
            compare_answers(before, after)
    with pytest.raises(CalibrationError, match="negative"):
        mcnemar(-1, 2)
