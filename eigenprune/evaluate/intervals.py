# SPDX-License-Identifier: Apache-2.0
"""How sure a share of right answers is, and whether the same questions were answered better after than before."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from eigenprune.errors import CalibrationError

CONFIDENCE = 0.95


def wilson_interval(right: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval (E. B. Wilson, 1927) of a share: (low, high), both in [0, 1].

    Args:
        right: how many of `total` were right.
        total: at least 1.
        confidence: in (0, 1).

    Raises:
        CalibrationError: there is nothing counted, or a number is out of range.
    """
    if not 0 <= right <= total or total < 1:
        raise CalibrationError(f"{right} right of {total}: there is no share of that")
    if not 0 < confidence < 1:
        raise CalibrationError(f"confidence={confidence!r} must be in (0, 1)")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At no and at all right one bound is exactly 0 or 1; a rounding must not take it out of the range, nor off it.
    low = 0.0 if right == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if right == total else min(1.0, (middle + half) / scale)
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test (Q. McNemar, 1947): of the questions whose answer changed between
    right and wrong, each way is equally likely if nothing is better.

    Args:
        gained: wrong before and right after.
        lost: right before and wrong after.

    Raises:
        CalibrationError: a negative number.
    """
    if gained < 0 or lost < 0:
        raise CalibrationError(f"gained {gained} and lost {lost}: counts cannot be negative")
    changed = gained + lost
    # Integers: 2^changed is beyond every float from a thousand questions on.
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    ways = 1 << changed
    return min(1.0, 2 * tail / ways)


@dataclass(frozen=True)
class Comparison:
    """The same questions answered before and after.

    Attributes:
        total: questions.
        before, after: right answers.
        gained: wrong before and right after.
        lost: right before and wrong after.
        confidence: of the intervals.
    """

    total: int
    before: int
    after: int
    gained: int
    lost: int
    confidence: float = CONFIDENCE

    @property
    def before_interval(self) -> tuple[float, float]:
        """Wilson's interval of the share right before."""
        return wilson_interval(self.before, self.total, self.confidence)

    @property
    def after_interval(self) -> tuple[float, float]:
        """Wilson's interval of the share right after."""
        return wilson_interval(self.after, self.total, self.confidence)

    @property
    def p_value(self) -> float:
        """McNemar's, exact."""
        return mcnemar(self.gained, self.lost)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the intervals and the p-value among them."""
        intervals = {"before_interval": list(self.before_interval), "after_interval": list(self.after_interval)}
        return asdict(self) | intervals | {"p_value": self.p_value}


def compare_answers(before: Sequence[bool], after: Sequence[bool], confidence: float = CONFIDENCE) -> Comparison:
    """Count what changed.

    Args:
        before, after: whether each question was answered rightly, in the same order.
        confidence: of the intervals.

    Raises:
        CalibrationError: there are none, or the two differ in number.
    """
    if len(before) != len(after) or not before:
        raise CalibrationError(f"{len(before)} answers before and {len(after)} after: a comparison needs the same ones")
    pairs = [(bool(a), bool(b)) for a, b in zip(before, after, strict=True)]
    return Comparison(
        total=len(pairs),
        before=sum(a for a, _ in pairs),
        after=sum(b for _, b in pairs),
        gained=sum(b and not a for a, b in pairs),
        lost=sum(a and not b for a, b in pairs),
        confidence=confidence,
    )
