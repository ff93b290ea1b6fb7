# SPDX-License-Identifier: Apache-2.0
"""Pivot factors: exact reconstruction, a bounded mix, and what storing them in a short dtype costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigenprune.layers import factored_parameters
from eigenprune.spectral import pivot_factors
from eigenprune.spectral.pivot import LARGEST_MIX

EPS = torch.finfo(torch.float64).eps


def pair(m: int, n: int, rank: int, seed: int = 0, decay: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, n, dtype=torch.float64, generator=generator)
    scale = torch.logspace(0, -decay, rank, dtype=torch.float64).sqrt()
    return left * scale, right * scale.unsqueeze(1)


def others(pivots: Tensor, m: int) -> list[int]:
    return [row for row in range(m) if row not in pivots.tolist()]


def rebuilt(mix: Tensor, rows: Tensor, pivots: Tensor) -> Tensor:
    m = len(pivots) + len(mix)
    weight = rows.new_zeros(m, rows.shape[1])
    weight[pivots.long()] = rows
    weight[others(pivots, m)] = mix @ rows
    return weight


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.floats(0, 6), st.integers(0, 99), st.data())
def test_the_weight_is_rebuilt_from_its_own_rows(m: int, n: int, decay: float, seed: int, data) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    left, right = pair(m, n, rank, seed, decay)
    mix, rows, pivots = pivot_factors(left, right)
    assert mix.shape == (m - rank, rank)
    assert rows.shape == (rank, n)
    assert pivots.shape == (rank,)
    assert pivots.dtype == torch.int32
    assert (pivots[1:] > pivots[:-1]).all()
    assert int(pivots[0]) >= 0
    assert int(pivots[-1]) < m
    assert torch.equal(rows, left[pivots.long()] @ right)
    assert mix.numel() == 0 or float(mix.abs().max()) <= LARGEST_MIX * (1 + 1e-9)
    weight = left @ right
    # mix = A B^-1 of rows of an orthonormal basis. A mix of at most 2 makes every singular value of B at least
    # 1 / sqrt(1 + 4 r (m - r)): a solve loses as many digits as its reciprocal has; then a product of r terms.
    condition = (1 + LARGEST_MIX**2 * rank * (m - rank)) ** 0.5
    bound = 16 * rank * EPS * condition * (1 + LARGEST_MIX * rank**0.5) * float(left.norm() * right.norm())
    assert float((rebuilt(mix, rows, pivots) - weight).norm()) <= bound
    assert mix.numel() + rows.numel() == rank * (m + n - rank) == factored_parameters(rank, m, n, "pivot")


@pytest.mark.parametrize("m", [1, 5, 12])
def test_at_full_row_rank_all_rows_are_pivots_and_nothing_is_mixed(m: int) -> None:
    left, right = pair(m, 20, m)
    mix, rows, pivots = pivot_factors(left, right)
    assert pivots.tolist() == list(range(m))
    assert mix.shape == (0, m)
    assert torch.equal(rows, left @ right)


def test_a_left_factor_on_which_plain_pivoting_grows_gets_a_bounded_mix() -> None:
    # Wilkinson's matrix: elimination with row pivoting keeps its order, and the last row's mix grows to 2^(r - 1).
    rank = 20
    left = torch.tril(-torch.ones(rank, rank, dtype=torch.float64), -1) + torch.eye(rank, dtype=torch.float64)
    last = -torch.ones(1, rank, dtype=torch.float64)
    plain = torch.linalg.solve(left.t(), last.t())
    assert float(plain.abs().max()) >= 2 ** (rank - 2)
    mix, rows, pivots = pivot_factors(torch.cat([left, last]), torch.eye(rank, dtype=torch.float64))
    assert float(mix.abs().max()) <= LARGEST_MIX
    assert float((rebuilt(mix, rows, pivots) - torch.cat([left, last])).abs().max()) <= 1e3 * EPS


@pytest.mark.parametrize(("m", "n", "rank"), [(96, 64, 48), (200, 64, 40), (64, 200, 56)])
def test_larger_random_factors_reach_the_bound_too(m: int, n: int, rank: int) -> None:
    mix, _, _ = pivot_factors(*pair(m, n, rank, decay=3))
    assert float(mix.abs().max()) <= LARGEST_MIX * (1 + 1e-9)


def test_repeated_and_zero_rows_are_no_pivots() -> None:
    left, right = pair(6, 9, 4)
    left = torch.cat([torch.zeros(3, 4, dtype=torch.float64), left, left[:2]])
    mix, rows, pivots = pivot_factors(left, right)
    assert int(pivots[0]) >= 3
    assert float((rebuilt(mix, rows, pivots) - left @ right).norm()) <= 1e3 * EPS * float(left.norm() * right.norm())


@pytest.mark.parametrize("columns", ["zero right", "tiny component"])
def test_components_without_energy_leave_the_weight_right(columns: str) -> None:
    left, right = pair(12, 9, 5)
    right[3:] = 0
    if columns == "tiny component":
        right[3:] = 1e-200
    mix, rows, pivots = pivot_factors(left, right)
    assert torch.isfinite(mix).all()
    assert float((rebuilt(mix, rows, pivots) - left @ right).norm()) <= 1e4 * EPS * float(left.norm() * right.norm())


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("m", "n", "rank"), [(64, 48, 24), (48, 64, 40), (96, 96, 8)])
def test_in_bfloat16_the_pivot_form_loses_little_more_than_the_pair_form(
    m: int, n: int, rank: int, decay: float
) -> None:
    worst = []
    for seed in range(5):
        left, right = pair(m, n, rank, seed, decay)
        weight = left @ right
        mix, rows, pivots = pivot_factors(left, right)
        short = rebuilt(mix.bfloat16().double(), rows.bfloat16().double(), pivots)
        in_pair = (left.bfloat16().double() @ right.bfloat16().double() - weight).norm()
        worst.append(float((short - weight).norm() / in_pair))
        # A mixed row adds up r rounded rows with weights of a few tenths, whose squares sum to less than r / 4 here;
        # in the pair, both factors round once.
        assert worst[-1] <= (1 + rank / 4) ** 0.5
