# SPDX-License-Identifier: Apache-2.0
"""A heat map as a PNG without a drawing library: one pixel a cell, for a page that scales it."""

import struct
import zlib

import torch
from torch import Tensor

# Colours at even steps, linear between; blank cells are white.
DIVERGING = ((33, 71, 140), (110, 157, 214), (222, 222, 222), (230, 135, 104), (158, 26, 41))
RISING = ((240, 240, 235), (168, 205, 180), (74, 152, 143), (32, 88, 110), (16, 32, 66))
STEPS = RISING[1:]  # for counts from 0: their lowest colour is no blank
BLANK = 255


def colours(values: Tensor, low: float, high: float, scale: tuple[tuple[int, int, int], ...]) -> Tensor:
    """uint8 [rows, columns, 3]: `values` between `low` and `high` (cut there) on a colour scale; NaN is white."""
    stops = torch.tensor(scale, dtype=torch.float32)
    place = (values.float() - low) / max(high - low, 1e-30)
    place = place.nan_to_num(0).clamp(0, 1) * (len(scale) - 1)
    left = place.floor().clamp(max=len(scale) - 2).to(torch.int64)
    part = (place - left).unsqueeze(-1)
    mixed = (1 - part) * stops[left] + part * stops[left + 1]
    return torch.where(values.isnan().unsqueeze(-1), BLANK, mixed.round()).to(torch.uint8)


def png_bytes(pixels: Tensor) -> bytes:
    """The PNG file of uint8 [rows, columns, 3], 8 bits a channel (W3C PNG specification, colour type 2)."""
    rows, columns, _ = pixels.shape
    lines = torch.cat([torch.zeros(rows, 1, dtype=torch.uint8), pixels.reshape(rows, -1)], 1)  # filter 0 a line
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
