# SPDX-License-Identifier: Apache-2.0
"""Low rank plus sparse: what is of that form is found, the error falls, and bytes are what they are said to be."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from eigenprune.entries.low_rank_sparse import most_stored, split_bytes, split_low_rank_sparse, split_within
from eigenprune.errors import ConfigError, WeightError


def planted(rank: int, stored: int, seed: int = 0) -> torch.Tensor:
    """[60, 40]: a product of thin matrices, and a few entries ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(60, rank, generator=generator) @ torch.randn(rank, 40, generator=generator)
    places = torch.randperm(2400, generator=generator)[:stored]
    change.view(-1)[places] += 10 * torch.randn(stored, generator=generator).sign() * (1 + rank**0.5)
    return change


def test_what_is_of_that_form_is_found_and_neither_part_alone_can() -> None:
    change = planted(3, 30)
    both = split_low_rank_sparse(change, 3, 30, rounds=50)
    norm = float(change.norm())
    assert both.error < 1e-3 * norm
    budget = split_bytes((60, 40), 3, 30, 4)
    assert split_within(change, budget, [0]).error > 100 * both.error
    assert split_bytes((60, 40), 4, 0, 4) > budget
    assert split_low_rank_sparse(change, 4, 0).error > 100 * both.error
    assert split_within(change, budget, range(5)).rank == 3


@pytest.mark.parametrize(("rank", "stored"), [(0, 0), (0, 17), (5, 0), (40, 0), (0, 2400), (2, 100), (40, 2400)])
def test_error_is_the_true_one_and_parts_alone_are_the_best_of_their_kind(rank: int, stored: int) -> None:
    change = torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    split = split_low_rank_sparse(change, rank, stored)
    assert (split.rank, split.stored) == (rank, stored)
    assert (split.left.shape, split.right.shape) == ((60, rank), (rank, 40))
    rest = change.double() - split.dense().double()
    # Float32 sums of at most 40 products; the error of an exact split is rounding alone.
    slack = 64 * 2.0**-24 * float(change.norm())
    assert abs(split.error - float(rest.norm())) <= slack
    exact = change.double().numpy()
    if stored == 0:
        tail = np.linalg.svd(exact, compute_uv=False)[rank:]
        assert abs(split.error - float(np.sqrt((tail**2).sum()))) <= slack
    if rank == 0:
        left_out = np.sort(np.abs(exact).ravel())[: 2400 - stored]
        assert abs(split.error - float(np.sqrt((left_out**2).sum()))) <= slack


def test_more_rounds_never_hurt() -> None:
    change = planted(6, 300, seed=3) + torch.randn(60, 40, generator=torch.Generator().manual_seed(2))
    errors = [split_low_rank_sparse(change, 4, 200, rounds=rounds).error for rounds in range(1, 9)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.98 * errors[0]


def test_same_twice_and_the_input_stays() -> None:
    change = planted(2, 50).bfloat16()
    before = change.clone()
    one, other = (split_low_rank_sparse(change, 2, 40) for _ in range(2))
    assert torch.equal(one.dense(), other.dense())
    assert torch.equal(change, before)
    assert one.numbers.tolist() == sorted(set(one.numbers.tolist()))


def test_ties_go_to_the_lower_index() -> None:
    assert split_low_rank_sparse(torch.ones(3, 4), 0, 5).numbers.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(60, 40), (1, 100), (300, 500)])
@pytest.mark.parametrize("item", [2, 4])
def test_most_stored_is_the_largest_count_that_fits(shape: tuple[int, int], item: int) -> None:
    entries = shape[0] * shape[1]
    for share in (0.0, 0.001, 0.03, 0.2, 0.9, 1.1):
        budget = int(share * entries * item)
        stored = most_stored(shape, budget, item)
        assert split_bytes(shape, 0, stored, item) <= budget
        # A complete sparse part needs no places, so a count above the found one may be cheaper only if it is complete.
        assert stored == entries or split_bytes(shape, 0, stored + 1, item) > budget
    assert most_stored(shape, -1, item) == -1


def test_what_cannot_be_split_is_refused() -> None:
    for change, rank, stored in ((torch.ones(3), 0, 0), (torch.ones(3, 4), 4, 0), (torch.ones(3, 4), -1, 0)):
        with pytest.raises(ConfigError):
            split_low_rank_sparse(change, rank, stored)
    for stored in (-1, 13):
        with pytest.raises(ConfigError):
            split_low_rank_sparse(torch.ones(3, 4), 0, stored)
    with pytest.raises(WeightError, match="NaN"):
        split_low_rank_sparse(torch.full((3, 4), torch.nan), 1, 1)
    with pytest.raises(ConfigError, match="none of the ranks"):
        split_within(torch.ones(3, 4), 4, [1])
