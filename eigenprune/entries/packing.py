# SPDX-License-Identifier: Apache-2.0
"""Which entries of a tensor are stored, as few bytes: one bit for each entry, or one 16-bit number for each stored one.

A bit mask costs 1/8 byte an entry, whatever is stored. Positions cost 2 bytes a stored entry and 4 bytes a block of
65,536 entries: fewer where less than about one entry in 16 is stored. The entries are numbered in row-major order, so
that neither form depends on the shape, and a row may have any length.
"""

import numpy as np
import torch
from torch import Tensor

from eigenprune.errors import CheckpointError

BLOCK = 1 << 16  # the low 16 bits of an entry's number are its position in its block
FORMS = ("mask", "positions")


def smaller_form(entries: int, stored: int) -> str:
    """`mask` or `positions`, whichever takes fewer bytes for `stored` of `entries`; `mask` where they are equal."""
    return "positions" if packed_bytes("positions", entries, stored) < packed_bytes("mask", entries, stored) else "mask"


def packed_bytes(form: str, entries: int, stored: int) -> int:
    """Bytes of the places alone, without the values."""
    return -(-entries // 8) if form == "mask" else 2 * stored + 4 * blocks(entries)


def blocks(entries: int) -> int:
    """How many blocks of 65,536 there are, the last one perhaps shorter."""
    return -(-entries // BLOCK)


def pack_mask(mask: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)] of a bool tensor of n entries: entry i is bit i % 8 of byte i // 8; bits beyond n are 0."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().reshape(-1).numpy(), bitorder="little"))


def unpack_mask(packed: Tensor, entries: int) -> Tensor:
    """bool [entries], the inverse of `pack_mask`.

    Raises:
        CheckpointError: `packed` is not uint8 of the right length, or has bits beyond the last entry.
    """
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes("mask", entries, 0),):
        raise CheckpointError(f"a mask of {entries:,} entries is stored as {packed.dtype} {tuple(packed.shape)}")
    bits = np.unpackbits(packed.numpy(), bitorder="little").view(np.bool_)
    if bits[entries:].any():
        raise CheckpointError(f"a mask of {entries:,} entries has bits beyond the last one")
    return torch.from_numpy(bits[:entries])


def pack_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(counts int32 [blocks], positions uint16 [stored]) of a bool tensor: per block how many, and where in it."""
    flat = mask.reshape(-1)
    numbers = flat.nonzero().view(-1)
    counts = torch.bincount(numbers >> 16, minlength=blocks(flat.numel())).to(torch.int32)
    return counts, (numbers & (BLOCK - 1)).to(torch.uint16)


def unpack_positions(counts: Tensor, positions: Tensor, entries: int) -> Tensor:
    """int64 [stored], the numbers of the stored entries in rising order; the inverse of `pack_positions`.

    Raises:
        CheckpointError: the counts do not match the positions or the blocks, or a number is out of range, repeated or
            out of order.
    """
    if counts.dtype != torch.int32 or counts.shape != (blocks(entries),):
        raise CheckpointError(f"the counts of {entries:,} entries are stored as {counts.dtype} {tuple(counts.shape)}")
    if positions.dtype != torch.uint16 or positions.ndim != 1:
        raise CheckpointError(f"positions are stored as {positions.dtype} {tuple(positions.shape)}")
    wide = counts.to(torch.int64)
    bad = bool((wide < 0).any() or (wide > BLOCK).any())  # before repeat_interleave believes them
    if bad or int(wide.sum()) != positions.numel():
        raise CheckpointError(f"the counts of the blocks do not add up to the {positions.numel():,} positions")
    numbers = torch.arange(counts.numel()).repeat_interleave(wide) * BLOCK + positions.to(torch.int64)
    if numbers.numel() and (int(numbers[-1]) >= entries or not bool((numbers[1:] > numbers[:-1]).all())):
        raise CheckpointError(f"positions are out of range, repeated or out of order in {entries:,} entries")
    return numbers
