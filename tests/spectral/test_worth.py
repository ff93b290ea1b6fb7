# SPDX-License-Identifier: Apache-2.0
"""Every rank's cost and loss, counted out one by one."""

import pytest
import torch

from eigenprune.spectral import Spectrum, rank_options


def falling(count: int) -> Spectrum:
    return Spectrum(torch.logspace(1, -3, count, dtype=torch.float64))


@pytest.mark.parametrize("layout", ["pair", "pivot"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (16, 200)])
@pytest.mark.parametrize("multiple", [1, 8, 5])
def test_options_are_all_multiples_that_save_parameters_and_then_dense(
    shape: tuple[int, int], layout: str, multiple: int
) -> None:
    m, n = shape
    found = falling(min(m, n))
    got = rank_options(shape, found, layout, multiple)
    wanted = []
    for rank in range(1, min(m, n) + 1):
        left = m * rank if layout == "pair" else (m - rank) * rank
        if rank % multiple == 0 and left + rank * n < m * n:
            wanted.append((rank, left + rank * n, 0.5 * sum(found.energies.tolist()[rank:])))
    wanted.append((0, m * n, 0.0))
    assert got.ranks.tolist() == [rank for rank, _, _ in wanted]
    assert got.costs.tolist() == [cost for _, cost, _ in wanted]
    # Sums of at most 32 numbers in another order.
    rel = 32 * torch.finfo(torch.float64).eps
    assert got.losses.tolist() == pytest.approx([loss for _, _, loss in wanted], rel=rel)


@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_costs_rise_and_losses_fall(layout: str) -> None:
    got = rank_options((48, 64), falling(48), layout, 1)
    assert (got.costs[1:] > got.costs[:-1]).all()
    assert (got.losses[1:] <= got.losses[:-1]).all()
    assert float(got.losses[-1]) == 0


def test_the_pivot_layout_reaches_every_rank_below_full_and_the_pair_layout_half() -> None:
    assert rank_options((32, 32), falling(32), "pivot", 1).ranks.tolist() == [*range(1, 32), 0]
    assert rank_options((32, 32), falling(32), "pair", 1).ranks.tolist() == [*range(1, 16), 0]


def test_a_multiple_above_every_rank_leaves_dense_alone() -> None:
    got = rank_options((20, 24), falling(20), "pivot", 64)
    assert (got.ranks.tolist(), got.costs.tolist(), got.losses.tolist()) == ([0], [480], [0.0])
