# SPDX-License-Identifier: Apache-2.0
"""Boolean masks of a whole model at one bit an entry."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor


class PackedMasks(Mapping[str, Tensor]):
    """{tensor name: bool mask of its shape}, packed in memory and unpacked, as a new tensor, at each access.

    A mask that is True everywhere takes no memory. Two names may share one mask (tied weights).
    """

    def __init__(self) -> None:
        self._bits: dict[str, bytes | None] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._kept: dict[str, int] = {}

    def put(self, name: str, mask: Tensor) -> None:
        """Keep a copy of `mask`, bool of any shape and on any device, under `name`."""
        flat = mask.detach().cpu().reshape(-1)
        self._shapes[name] = mask.shape
        self._kept[name] = int(flat.count_nonzero())
        whole = self._kept[name] == flat.numel()
        self._bits[name] = None if whole else np.packbits(flat.numpy(), bitorder="little").tobytes()

    def put_whole(self, name: str, shape: torch.Size) -> None:
        """A mask of `shape` that is True everywhere."""
        self._bits[name], self._shapes[name], self._kept[name] = None, shape, math.prod(shape)

    def share(self, name: str, masks: "PackedMasks", other: str) -> None:
        """`name` gets the mask that is called `other` in `masks`, without a copy."""
        self._bits[name], self._shapes[name] = masks._bits[other], masks._shapes[other]
        self._kept[name] = masks._kept[other]

    def is_whole(self, name: str) -> bool:
        """Whether every entry of the tensor is kept."""
        return self._bits[name] is None

    def kept(self, name: str) -> int:
        """How many entries of the tensor are kept, without unpacking."""
        return self._kept[name]

    def __getitem__(self, name: str) -> Tensor:
        bits, shape = self._bits[name], self._shapes[name]
        if bits is None:
            return torch.ones(shape, dtype=torch.bool)
        flat = np.unpackbits(np.frombuffer(bits, np.uint8), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(flat.view(np.bool_)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)
