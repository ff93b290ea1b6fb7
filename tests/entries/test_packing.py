# SPDX-License-Identifier: Apache-2.0
"""Masks and positions against literal loops, and what a damaged one is told."""

import pytest
import torch

from eigenprune.entries.packing import (
    BLOCK,
    pack_mask,
    pack_positions,
    packed_bytes,
    smaller_form,
    unpack_mask,
    unpack_positions,
)
from eigenprune.errors import CheckpointError

SIZES = (0, 1, 7, 8, 9, 63, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)


def mask_of(entries: int, density: float) -> torch.Tensor:
    return torch.rand(entries, generator=torch.Generator().manual_seed(entries)) < density


@pytest.mark.parametrize("entries", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_both_forms_come_back_and_have_the_announced_size(entries: int, density: float) -> None:
    mask = mask_of(entries, density)
    packed = pack_mask(mask)
    counts, positions = pack_positions(mask)
    assert torch.equal(unpack_mask(packed, entries), mask)
    assert unpack_positions(counts, positions, entries).tolist() == [
        i for i, stored in enumerate(mask.tolist()) if stored
    ]
    stored = int(mask.sum())
    assert packed.nbytes == packed_bytes("mask", entries, stored)
    assert counts.nbytes + positions.nbytes == packed_bytes("positions", entries, stored)


def test_mask_is_written_in_the_documented_order_of_bits() -> None:
    mask = mask_of(1000, 0.3)
    literal = [sum(int(mask[8 * byte + bit]) << bit for bit in range(8)) for byte in range(125)]
    assert pack_mask(mask).tolist() == literal


def test_shape_does_not_matter() -> None:
    mask = mask_of(6 * 5 * 4, 0.4)
    assert torch.equal(pack_mask(mask.view(6, 5, 4)), pack_mask(mask))
    transposed = mask.view(30, 4).t()
    assert torch.equal(unpack_mask(pack_mask(transposed), 120).view(4, 30), transposed)


@pytest.mark.parametrize("entries", [100, 65_536, 1_000_000])
def test_the_smaller_form_is_chosen(entries: int) -> None:
    for stored in range(0, entries, max(1, entries // 97)):
        chosen = smaller_form(entries, stored)
        assert packed_bytes(chosen, entries, stored) == min(
            packed_bytes(form, entries, stored) for form in ("mask", "positions")
        )


def test_about_one_in_sixteen_is_the_border() -> None:
    assert smaller_form(1 << 20, (1 << 20) // 16 + 1) == "mask"
    assert smaller_form(1 << 20, (1 << 20) // 16 - 40) == "positions"


def test_damaged_mask_is_refused() -> None:
    packed = pack_mask(mask_of(9, 1.0))
    for bad in (packed[:1], packed.to(torch.int16), packed | 128, torch.cat([packed, packed])):
        with pytest.raises(CheckpointError, match="mask of 9"):
            unpack_mask(bad, 9)


def test_damaged_positions_are_refused() -> None:
    mask = mask_of(BLOCK + 9, 0.001)
    counts, positions = pack_positions(mask)
    entries = mask.numel()
    wrong_sum, negative, huge = counts.clone(), counts.clone(), counts.clone()
    wrong_sum[0] += 1
    negative[0], huge[0] = -1, 2**31 - 1
    beyond = positions.clone()
    beyond[-1] = 60_000
    last_only = torch.tensor([0, 1], dtype=torch.int32)
    repeated = torch.cat([positions[:1], positions[:-1]])
    for bad in (
        (wrong_sum, positions),
        (negative, positions),
        (huge, positions),
        (counts[:1], positions),
        (counts.long(), positions),
        (counts, positions.to(torch.int32)),
        (counts, positions[:-1]),
        (counts, repeated),
        (counts, positions.int().flip(0).to(torch.uint16)),
        (last_only, beyond[-1:]),
    ):
        with pytest.raises(CheckpointError):
            unpack_positions(*bad, entries)
