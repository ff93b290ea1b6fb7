# SPDX-License-Identifier: Apache-2.0
"""Write a safetensors file tensor by tensor, so that no more than one has to be in memory.

The library's own writer wants all tensors at once. What is written here follows the format's specification
(huggingface.co/docs/safetensors): eight bytes of header length, the header as JSON padded with spaces to a multiple of
eight, then the bytes without holes, wide types first so that every tensor is aligned. Same tensors, same bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from eigenprune.errors import CheckpointError
from eigenprune.hub.weight_source import DTYPE_NAMES, DTYPES

Spec = tuple[str, tuple[int, ...]]  # (dtype name of safetensors, shape)


def file_order(specs: Mapping[str, Spec]) -> list[str]:
    """The order in which `write_tensors` wants them: by falling width of their type, then by name."""
    return sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))


def file_bytes(specs: Mapping[str, Spec]) -> int:
    """Size of the file that `write_tensors` makes of them."""
    return len(_header(specs)) + sum(spec_bytes(spec) for spec in specs.values())


def spec_bytes(spec: Spec) -> int:
    """Bytes of one tensor."""
    return math.prod(spec[1]) * DTYPES[spec[0]].itemsize


def write_tensors(path: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `tensors`, which come in `file_order` and are of the announced `specs`.

    Raises:
        CheckpointError: a tensor is another than announced.
        OSError: the disk refuses.
    """
    expected = iter(file_order(specs))
    with path.open("wb") as file:
        file.write(_header(specs))
        for name, tensor in tensors:
            found = (DTYPE_NAMES.get(tensor.dtype, ""), tuple(tensor.shape))
            if name != next(expected, None) or found != specs[name]:
                raise CheckpointError(f"{name!r:.120} changed while it was written: nothing was saved")
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            if raw.numel():
                file.write(raw.numpy().data)
        if next(expected, None) is not None:
            raise CheckpointError("tensors went missing while the file was written: nothing was saved")


def _header(specs: Mapping[str, Spec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants to read it
    place = 0
    for name in file_order(specs):
        end = place + spec_bytes(specs[name])
        dtype, shape = specs[name]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
