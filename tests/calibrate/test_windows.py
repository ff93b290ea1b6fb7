# SPDX-License-Identifier: Apache-2.0
"""Token windows: both ways to cut them, and texts that are too short."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenprune.calibrate import cut_windows
from eigenprune.errors import CalibrationError


class Bytes:
    """A tokenizer with one token a byte, as byte-level vocabularies have for rare characters."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert add_special_tokens is False
        self.read += len(text)
        return {"input_ids": list(text.encode())}


def document(first: str, length: int) -> str:
    return first + "".join(chr(ord("a") + i % 26) for i in range(length - 1))


def test_long_documents_give_their_first_tokens_in_order() -> None:
    texts = [document("1", 40), "short", document("2", 20), document("3", 19), document("4", 99), document("5", 99)]
    got = cut_windows(Bytes(), texts, count=3, window=20)
    assert got.dtype == torch.int64
    assert got.tolist() == [list(texts[i].encode()[:20]) for i in (0, 2, 4)]


def test_too_few_long_documents_are_packed_and_taken_at_even_spacing() -> None:
    texts = [document("1", 55), "  ", "\n" + document("2", 30) + " ", document("3", 13)]
    joined = "\n\n".join([texts[0], texts[2].strip(), texts[3]]).encode()
    assert len(joined) == 102
    got = cut_windows(Bytes(), texts, count=4, window=10)
    assert got.tolist() == [list(joined[i * 10 : i * 10 + 10]) for i in (0, 3, 6, 9)]  # of windows 0 to 9


def test_fewer_windows_than_asked_are_all_taken() -> None:
    assert cut_windows(Bytes(), [document("1", 37)], count=64, window=10).shape == (3, 10)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(length=st.integers(2, 400), count=st.integers(1, 12), window=st.integers(2, 40))
def test_packed_windows_are_distinct_rising_and_evenly_spaced(length: int, count: int, window: int) -> None:
    ids = list(range(length))

    def tokenizer(text: str, **_kwargs: object) -> dict[str, list[int]]:
        return {"input_ids": ids}

    whole = length // window
    if whole == 0:
        with pytest.raises(CalibrationError):
            cut_windows(tokenizer, ["x"], count=count, window=window)
        return
    got = cut_windows(tokenizer, ["x"], count=count, window=window)
    starts = got[:, 0].tolist()
    assert len(starts) == min(count, whole)
    assert all(start % window == 0 for start in starts)
    assert all(row == list(range(row[0], row[0] + window)) for row in got.tolist())
    steps = [(b - a) // window for a, b in pairwise(starts)]
    assert all(step >= 1 for step in steps)
    if steps:
        assert max(steps) - min(steps) <= 1  # rounding of equal steps
        ideal = [i * (whole - 1) / (len(starts) - 1) for i in range(len(starts))]
        # To the nearest, with float32's rounding of positions below 200.
        assert all(abs(start / window - i) <= 0.5 + 1e-4 for start, i in zip(starts, ideal, strict=True))
        assert starts[0] == 0
        assert starts[-1] == (whole - 1) * window


def test_texts_shorter_than_a_window_name_both_numbers() -> None:
    with pytest.raises(CalibrationError, match=r"hold 25 tokens, less than one window of 30.*window=25"):
        cut_windows(Bytes(), [document("1", 10), document("2", 13)], count=2, window=30)


@pytest.mark.parametrize("texts", [[], [""], ["  \n"]])
def test_no_text_is_a_calibration_error(texts: list[str]) -> None:
    with pytest.raises(CalibrationError, match="hold 0 tokens, less than one window of 8"):
        cut_windows(Bytes(), texts, count=2, window=8)


@pytest.mark.parametrize(("count", "window"), [(0, 8), (-1, 8), (1, 1), (1, 0)])
def test_no_window_or_one_of_no_prediction_is_refused(count: int, window: int) -> None:
    with pytest.raises(CalibrationError, match="at least 1 window of 2 tokens"):
        cut_windows(Bytes(), ["some words"], count=count, window=window)


def test_the_same_texts_give_the_same_windows() -> None:
    texts = [document(str(i), 90 + i) for i in range(5)]
    for count in (3, 9):  # both ways
        assert torch.equal(
            cut_windows(Bytes(), texts, count=count, window=16), cut_windows(Bytes(), texts, count=count, window=16)
        )


def test_a_document_of_many_bytes_a_character_counts_by_its_tokens() -> None:
    texts = ["漢字" * 5, "🙂" * 6]  # 10 and 6 characters, 30 and 24 tokens
    got = cut_windows(Bytes(), texts, count=2, window=20)
    assert got.tolist() == [list(text.encode()[:20]) for text in texts]


def test_the_rest_of_a_long_book_is_not_tokenised_for_its_first_page() -> None:
    tokenizer = Bytes()
    cut_windows(tokenizer, [document("1", 1_000_000)] * 2, count=2, window=10)
    assert tokenizer.read < 10_000
