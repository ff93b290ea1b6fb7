# SPDX-License-Identifier: Apache-2.0
"""What a `TokenExample` refuses."""

import pytest

from eigenprune.errors import CalibrationError
from eigenprune.evaluate.token_example import TokenExample


@pytest.mark.parametrize(
    ("prompt", "answer", "choices"),
    [((), (1,), ()), ((1,), (), ()), ((1,), (2,), ((2,), ())), ((1,), (2,), ((3,), (4,)))],
)
def test_empty_parts_and_unlisted_answers_are_refused(
    prompt: tuple[int, ...], answer: tuple[int, ...], choices: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(CalibrationError):
        TokenExample(prompt, answer, choices)


def test_a_right_example_stands() -> None:
    assert TokenExample((1,), (2, 3), ((2, 3), (4,))).answer == (2, 3)
