# SPDX-License-Identifier: Apache-2.0
"""The arrays behind the pictures of kept entries, against loops over all entries and over all masks."""

from itertools import combinations

import pytest
import torch

from eigenprune.errors import ConfigError
from eigenprune.report.entries_view import (
    count_neighbours,
    kept_neighbours,
    kept_share,
    kept_values,
    same_in_every_layer,
    shrink,
)

SHAPES = [(1, 1), (1, 2), (1, 7), (7, 1), (2, 2), (2, 3), (3, 3), (5, 9), (9, 5)]


def literal_neighbours(mask: list[list[bool]]) -> list[list[int]]:
    rows, columns = len(mask), len(mask[0])
    counts = [[-1] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            if mask[i][j]:
                around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                counts[i][j] = sum(mask[a][b] for a, b in around if 0 <= a < rows and 0 <= b < columns)
    return counts


@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours_equal_a_literal_loop_in_any_shape(shape: tuple[int, int]) -> None:
    for seed in range(4):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
        assert kept_neighbours(mask).tolist() == literal_neighbours(mask.tolist())
        counts = count_neighbours(mask)
        flat = [count for row in literal_neighbours(mask.tolist()) for count in row if count >= 0]
        wanted = [flat.count(count) / max(len(flat), 1) for count in range(5)]
        assert counts.observed == pytest.approx(wanted, abs=1e-15)
        assert counts.kept == len(flat)
        assert counts.density == len(flat) / mask.numel()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (4, 1), (2, 2), (2, 3), (3, 3), (2, 5)])
def test_expectation_is_the_average_over_all_masks(rows: int, columns: int) -> None:
    entries = rows * columns
    for kept in range(1, entries + 1):
        totals, masks = [0] * 5, 0
        for chosen in combinations(range(entries), kept):
            mask = [[i * columns + j in chosen for j in range(columns)] for i in range(rows)]
            for count in (count for row in literal_neighbours(mask) for count in row if count >= 0):
                totals[count] += 1
            masks += 1
        flat = torch.zeros(entries, dtype=torch.bool)
        flat[:kept] = True
        expected = count_neighbours(flat.view(rows, columns)).expected
        # Quotients of exact integers, at most 12 of them summed.
        assert expected == pytest.approx([total / (masks * kept) for total in totals], abs=12 * 2.0**-52)


def test_random_mask_has_the_expected_neighbours_and_a_block_has_more() -> None:
    mask = torch.rand(300, 500, generator=torch.Generator().manual_seed(1)) < 0.3
    counts = count_neighbours(mask)
    # 45,000 kept entries; neighbouring counts depend on each other, which at most doubles their spread.
    assert counts.observed == pytest.approx(counts.expected, abs=4 * 2 * 0.5 / counts.kept**0.5)
    block = torch.zeros(300, 500, dtype=torch.bool)
    block[:90] = True
    assert count_neighbours(block).density == 0.3
    assert count_neighbours(block).observed_mean > 3.9
    assert count_neighbours(block).expected_mean == pytest.approx(counts.expected_mean, abs=0.02)


def test_large_matrix_needs_no_large_numbers() -> None:
    counts = count_neighbours(torch.ones(1, dtype=torch.bool).expand(3000, 3000))
    assert sum(counts.expected) == pytest.approx(1)
    assert counts.expected == pytest.approx(counts.observed)


def test_values_are_blank_where_reset() -> None:
    tuned = torch.tensor([[1.0, 0.0], [-2.0, 3.0]]).bfloat16()
    mask = torch.tensor([[True, True], [False, True]])
    shown = kept_values(tuned, mask)
    assert shown.dtype == torch.float32
    assert shown[mask].tolist() == [1, 0, 3]
    assert shown.isnan().tolist() == (~mask).tolist()
    assert kept_values(torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)).shape == (2, 12)
    assert kept_values(torch.ones(5), torch.ones(5, dtype=torch.bool)).shape == (1, 5)
    with pytest.raises(ConfigError, match="mask of"):
        kept_values(tuned, mask[:1])


def test_layers_are_found_by_their_numbers_in_order() -> None:
    names = [f"h.{layer}.mlp.{part}.weight" for layer in range(11) for part in ("0", "up")] + ["h.x.mlp.up.weight", "w"]
    assert same_in_every_layer(names, "h.3.mlp.up.weight") == [f"h.{layer}.mlp.up.weight" for layer in range(11)]
    assert same_in_every_layer(names, "w") == ["w"]
    assert same_in_every_layer(["a1b2", "a1b10", "a0b3", "axb2"], "a1b2") == ["a0b3", "a1b2", "a1b10"]
    assert same_in_every_layer(["a.1", "ax1"], "a.1") == ["a.1"]  # the dot is a dot


@pytest.mark.parametrize("shape", [(3, 4), (100, 7), (7, 100), (65, 64), (1, 1000)])
def test_shrunk_cells_are_means_of_what_is_not_blank(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.5] = torch.nan
    small = shrink(values, 16)
    assert max(small.shape) <= 16
    rows, columns = (-(-side // 16) for side in shape)
    for i in range(small.shape[0]):
        for j in range(small.shape[1]):
            cell = values[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            seen = cell[~cell.isnan()].double()
            if seen.numel() == 0:
                assert small[i, j].isnan()
            else:
                assert float(small[i, j]) == pytest.approx(float(seen.mean()), abs=seen.numel() * 2**-22)
    share = kept_share(~values.isnan(), 1)
    assert float(share) == pytest.approx(float((~values.isnan()).double().mean()), abs=1e-6)
