# SPDX-License-Identifier: Apache-2.0
"""KEN against a literal oracle, value by value, and its fast form against it."""

import math

import pytest
import torch
from torch import Tensor

from eigenprune.entries.ken import SHORT, ken, ken_fast


def oracle(row: list[float], count: int) -> list[bool]:
    """The published algorithm in plain Python, on indices instead of values."""
    size = len(row)
    if count >= size or count == 0 or min(row) == max(row):
        return [i < count for i in range(size)]
    mean = sum(row) / size
    bandwidth = 1.06 * math.sqrt(sum((v - mean) ** 2 for v in row) / size) * size**-0.2
    step = (max(row) - min(row)) / max(1, count - 1)
    points = [min(row) + i * step for i in range(count)]
    if count > 1:
        points[-1] = max(row)
    scale = 1 / (size * bandwidth * math.sqrt(2 * math.pi))
    density = [round(scale * sum(math.exp(-0.5 * ((x - v) / bandwidth) ** 2) for v in row)) for x in points]
    free = set(range(size))
    for i in sorted(range(count), key=lambda i: (-density[i], i)):
        free.remove(min(free, key=lambda j: (abs(row[j] - points[i]), j)))
    return [i not in free for i in range(size)]


def random_rows(count: int, width: int, seed: int) -> Tensor:
    """[count, width]: in turns normal, heavy-tailed, with ties, with zeros, constant, in two values, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator) * 0.04
    rows[1::7] /= torch.rand(rows[1::7].shape, generator=generator).clamp_min(1e-3)
    rows[2::7] = (rows[2::7] * 50).round() / 50
    rows[3::7] *= torch.rand(rows[3::7].shape, generator=generator) < 0.4
    rows[4::7] = rows[4::7, :1].clone()
    rows[5::7] = rows[5::7].sign()
    rows[6::7] += 3.0
    return rows


@pytest.mark.parametrize("width", [1, 2, 5, 24, 41])
def test_ken_equals_the_literal_oracle_on_a_thousand_rows(width: int) -> None:
    rows = random_rows(200, width, seed=width)
    for count in sorted({1, width // 4, width // 2, 3 * width // 4, width - 1, width, width + 3}):
        expected = torch.tensor([oracle(row, count) for row in rows.tolist()])
        # A distance or a density within rounding of a tie may fall to either side; one of these rows may.
        different = (ken(rows, count) != expected).any(1).sum()
        assert int(different) <= 1, f"{different} rows differ at {count} of {width}"


@pytest.mark.parametrize("rule", [ken, ken_fast])
@pytest.mark.parametrize("width", [7, SHORT, 300])
def test_every_row_keeps_exactly_k(rule: object, width: int) -> None:
    rows = random_rows(70, width, seed=1)
    for count in (0, 1, width // 3, width - 1, width, width + 10):
        mask = rule(rows, count)  # type: ignore[operator]
        assert mask.dtype == torch.bool
        assert mask.sum(1).tolist() == [min(count, width)] * 70


def test_ken_fast_agrees_on_999_of_1000_entries() -> None:
    rows = random_rows(70, 768, seed=2)
    for count in (1, 2, 77, 192, 384, 576, 767):
        assert float((ken(rows, count) == ken_fast(rows, count)).float().mean()) >= 0.999


def test_short_rows_are_done_to_the_letter_by_ken_fast() -> None:
    rows = random_rows(140, 33, seed=3)
    assert torch.equal(ken(rows, 20), ken_fast(rows, 20))


def test_rows_in_half_precision_agree_on_99_of_100_entries() -> None:
    # Values in steps of 2^-8 lie at equal distances from a point far more often: the two forms may then part.
    rows = random_rows(70, 768, seed=4).bfloat16().float()
    for count in (77, 576):
        assert float((ken(rows, count) == ken_fast(rows, count)).float().mean()) >= 0.99


@pytest.mark.parametrize("rule", [ken, ken_fast])
def test_among_equal_values_the_first_are_kept(rule: object) -> None:
    row = torch.tensor([[5.0, 1.0, 1.0, 1.0, 1.0, 9.0]]).repeat(1, SHORT)
    mask = rule(row, SHORT)[0]  # type: ignore[operator]
    for value in (1.0, 5.0, 9.0):
        kept = mask[row[0] == value]
        assert kept.tolist() == sorted(kept.tolist(), reverse=True)


def test_what_is_kept_covers_the_range_and_not_the_centre() -> None:
    # 2.a.2 of the study of the method: the tails are kept, of the crowded centre a fifth.
    rows = torch.randn(200, 768, generator=torch.Generator().manual_seed(0)) * 0.04
    spread = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
    mask = ken_fast(rows, 384)
    assert float(mask[spread.abs() > 2].float().mean()) >= 0.999
    assert 0.18 <= float(mask[spread.abs() < 0.5].float().mean()) <= 0.24


def test_the_rows_are_not_changed() -> None:
    rows = random_rows(20, 300, seed=5)
    before = rows.clone()
    ken(rows, 100)
    ken_fast(rows, 100)
    assert torch.equal(rows, before)
