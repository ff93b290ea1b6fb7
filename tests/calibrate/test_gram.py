# SPDX-License-Identifier: Apache-2.0
"""Sums of outer products in blocks, and the clipping of norms."""

import pytest
import torch

from eigenprune.calibrate.gram import BLOCK, GramSum, clip_norms_, unpack_gram

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("width", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 37])
def test_the_sum_is_that_of_all_outer_products(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    batches = [torch.randn(tokens, width, generator=generator) for tokens in (1, 30, 0, 7)]
    gram = GramSum(width, torch.device("cpu"))
    for rows in batches:
        gram.add(rows)
    rows = torch.cat(batches).double()
    wanted = rows.t() @ rows
    got = gram.dense()
    assert torch.equal(got, got.t())
    # An entry sums 38 products: each of the 38 additions rounds by at most eps / 2 of the sum of their sizes.
    assert ((got.double() - wanted).abs() <= len(rows) * EPS * (rows.abs().t() @ rows.abs())).all()


def test_rows_may_be_strided() -> None:
    rows = torch.randn(600, 20, generator=torch.Generator().manual_seed(0)).t()  # [20, 600], not contiguous
    gram = GramSum(600, torch.device("cpu"))
    gram.add(rows)
    assert torch.allclose(gram.dense().double(), rows.double().t() @ rows.double(), rtol=0, atol=20 * EPS * 20)


def test_blocks_hold_the_lower_triangle_only() -> None:
    gram = GramSum(3 * BLOCK, torch.device("cpu"))
    assert [tuple(block.shape) for block in gram.blocks] == [(BLOCK, BLOCK), (BLOCK, 2 * BLOCK), (BLOCK, 3 * BLOCK)]


def test_what_lies_above_the_diagonal_of_a_block_is_not_used() -> None:
    block = torch.tensor([[1.0, 99.0], [2.0, 3.0]])
    assert torch.equal(unpack_gram([block]), torch.tensor([[1.0, 2.0], [2.0, 3.0]]))


def test_norms_are_clipped_to_multiples_of_their_mean_and_directions_kept() -> None:
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(200, 9, generator=generator).double(), dim=1)
    norms = torch.ones(200, dtype=torch.float64)
    norms[3], norms[7], norms[9], norms[11] = 1e3, 1e-3, 0.0, 2.0
    mean = norms.mean()
    wanted = directions * norms.clamp(0.1 * mean, 10 * mean).unsqueeze(1)
    wanted[9] = 0  # no direction
    got = clip_norms_((directions * norms.unsqueeze(1)).float(), 0.1, 10.0)
    # Norm, mean and scale are each right to a few eps.
    assert torch.allclose(got.double(), wanted, rtol=16 * EPS, atol=16 * EPS)


def test_rows_inside_the_bounds_stay_bit_equal() -> None:
    rows = torch.randn(50, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(clip_norms_(rows.clone(), 0.1, 10.0), rows)


def test_all_zero_rows_stay_zero() -> None:
    assert torch.equal(clip_norms_(torch.zeros(4, 3), 0.1, 10.0), torch.zeros(4, 3))
