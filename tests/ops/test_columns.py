# SPDX-License-Identifier: Apache-2.0
"""Columns put together and taken apart: exact moves, on every kernel of this processor."""

from __future__ import annotations

import random

import pytest
import torch

from eigenprune.ops import extension_status, merge_columns, merge_columns_reference, split_columns
from tests.ops.helpers import DTYPES, normal, pivots_of, run_python

DRAWS = 300


def places(out: int, pivots: torch.Tensor) -> list[int]:
    """The columns that are no pivots, one by one."""
    taken = set(pivots.tolist())
    return [column for column in range(out) if column not in taken]


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., out] in a dtype and strides of any kind, and pivots."""
    pick = random.Random(seed)
    out = pick.choice((0, 1, pick.randrange(70), pick.randrange(200)))
    shape = [pick.choice((0, 1, 3, 17)) for _ in range(pick.randrange(3))]
    y = normal(*shape, out, dtype=pick.choice(DTYPES), seed=seed)
    if y.dim() > 1 and pick.random() < 0.3:
        y = y.transpose(0, -1).contiguous().transpose(0, -1)
    return y, pivots_of(out, pick.randint(0, out), ascending=pick.random() < 0.7, seed=seed)


def check_draws() -> None:
    for seed in range(DRAWS):
        y, pivots = draw(seed)
        z, rest = split_columns(y, pivots)
        assert torch.equal(z, torch.stack([y[..., i] for i in pivots.tolist()], -1) if len(pivots) else y[..., :0])
        others = places(y.shape[-1], pivots)
        assert torch.equal(rest, torch.stack([y[..., i] for i in others], -1) if others else y[..., :0])
        assert torch.equal(merge_columns(z, rest, pivots), y)
        assert torch.equal(merge_columns_reference(z, rest, pivots), y)


def test_columns_move_to_their_places_and_back() -> None:
    check_draws()


@pytest.mark.parametrize("kernels", ["plain", "avx2"])
def test_so_they_do_without_the_widest_instructions(kernels: str) -> None:
    if not extension_status().loaded:
        pytest.skip("no compiled extension")
    result = run_python(
        "from tests.ops.test_columns import check_draws; check_draws(); print('right')", EIGENPRUNE_CPU_KERNELS=kernels
    )
    assert result.stdout.strip() == "right", result.stderr


@pytest.mark.parametrize("dtype", [torch.float64])
def test_each_is_the_gradient_of_the_other(dtype: torch.dtype) -> None:
    pivots = pivots_of(9, 4, ascending=False)
    z, rest = normal(3, 4, dtype=dtype).requires_grad_(), normal(3, 5, dtype=dtype).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda z, rest: merge_columns(z, rest, pivots), (z, rest))
        assert check(lambda y: split_columns(y, pivots), (normal(3, 9, dtype=dtype).requires_grad_(),))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("z", "rest", "pivots", "says"),
    [
        ((2, 3), (2, 4), [0, 1, 7], "pivot 7 is outside"),
        ((2, 3), (2, 4), [0, 1, -1], "pivot -1 is outside"),
        ((2, 3), (2, 4), [0, 1, 1], "pivot 1 is repeated"),
        ((2, 3), (2, 4), [0, 1], "z must be"),
        ((2, 3), (3, 4), [0, 1, 2], "z must be"),
        ((2, 3), (1, 2, 4), [0, 1, 2], "z must be"),
        ((), (2, 4), [0], "at least one dimension"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    z: tuple[int, ...], rest: tuple[int, ...], pivots: list[int], says: str, gradient: bool
) -> None:
    with pytest.raises(RuntimeError, match=f"eigenprune::merge_columns: .*{says}"):
        merge_columns(torch.zeros(z).requires_grad_(gradient), torch.zeros(rest), torch.tensor(pivots).int())


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("dtype", "pivots", "says"),
    [
        (torch.float32, torch.tensor([0, 6]), "pivots must be torch.int32"),
        (torch.float32, torch.tensor([[0, 6]]).int(), "pivots one"),
        (torch.float32, torch.arange(8).int(), "pivot 6 is outside"),
        (torch.complex64, torch.tensor([0]).int(), "y must be float32"),
    ],
)
def test_columns_that_cannot_be_split_are_refused(
    dtype: torch.dtype, pivots: torch.Tensor, says: str, gradient: bool
) -> None:
    with pytest.raises(RuntimeError, match=f"eigenprune::split_columns: .*{says}"):
        split_columns(torch.zeros(2, 6, dtype=dtype).requires_grad_(gradient), pivots)


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="rest and z must have one dtype"):
        merge_columns(torch.zeros(2, 1), torch.zeros(2, 2).double(), torch.tensor([0]).int())
