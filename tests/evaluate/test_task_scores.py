# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from eigenprune.errors import CalibrationError
from eigenprune.evaluate import paired_difference

EPSILON = np.finfo(np.float64).eps


def test_difference_and_errors_are_those_of_the_formula_written_out() -> None:
    random = np.random.default_rng(5)
    before = {name: random.integers(0, 2, count).astype(float) for name, count in (("a", 7), ("b", 40), ("c", 200))}
    after = {name: np.where(random.random(len(v)) < 0.8, v, 1 - v) for name, v in before.items()}
    found = paired_difference({n: v.tolist() for n, v in before.items()}, {n: v.tolist() for n, v in after.items()})
    paired = sum(np.var(after[n] - before[n], ddof=1) / len(before[n]) for n in before) / 3**2
    each = sum((np.var(after[n], ddof=1) + np.var(before[n], ddof=1)) / len(before[n]) for n in before) / 3**2
    tolerance = 200 * EPSILON  # sums of at most 200 terms of size 1
    assert found.before == pytest.approx(np.mean([v.mean() for v in before.values()]), abs=tolerance)
    assert found.after == pytest.approx(np.mean([v.mean() for v in after.values()]), abs=tolerance)
    assert found.difference == pytest.approx(found.after - found.before, abs=tolerance)
    assert found.stderr == pytest.approx(math.sqrt(paired), rel=tolerance)
    assert found.unpaired_stderr == pytest.approx(math.sqrt(each), rel=tolerance)
    assert found.stderr < found.unpaired_stderr  # most answers stayed: pairing pays


def test_error_covers_the_truth_as_often_as_it_says() -> None:
    """Models that are right with known, correlated odds: the true difference is within 1.96 errors in about 95 %."""
    random = np.random.default_rng(11)
    rounds, items, covered = 600, 150, 0
    for _ in range(rounds):
        before, after = {}, {}
        for task, (base, flip) in {"a": (0.3, 0.1), "b": (0.6, 0.2)}.items():
            first = random.random(items) < base
            second = np.where(random.random(items) < flip, ~first, first)
            before[task], after[task] = first.astype(float).tolist(), second.astype(float).tolist()
        truth = np.mean([flip * (1 - 2 * base) for base, flip in ((0.3, 0.1), (0.6, 0.2))])
        found = paired_difference(before, after)
        covered += abs(found.difference - truth) <= 1.96 * found.stderr
    spread = math.sqrt(0.95 * 0.05 / rounds)
    assert abs(covered / rounds - 0.95) <= 4 * spread


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, {}), ({"a": [1, 0]}, {"b": [1, 0]}), ({"a": [1, 0]}, {"a": [1, 0, 1]}), ({"a": [1]}, {"a": [0]})],
)
def test_what_cannot_be_paired_is_refused(before: dict, after: dict) -> None:
    with pytest.raises(CalibrationError):
        paired_difference(before, after)
