# SPDX-License-Identifier: Apache-2.0
"""How large the parts of a checkpoint may be, looked at before a parser sees them.

A file of some megabytes can make a parser take gigabytes. What can be counted in the raw bytes is counted there.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eigenprune.errors import CheckpointError

MIB = 1 << 20
LARGEST_CONFIG = 8 * MIB  # 110 bytes for each factored layer, and a model can have 40,000
LARGEST_INDEX = 16 * MIB  # DeepSeek-V3 has one of 9 MB
LARGEST_HEADER = 16 * MIB  # of one safetensors file; the format itself allows 100 MB
MOST_TENSORS = 200_000
DEEPEST = 16
# dtype, a shape of eight numbers, two offsets: what a tensor takes of a header at most.
COMMAS_A_TENSOR = 12


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is none, or it is larger, longer or deeper than any honest one.
    """
    try:
        if path.stat().st_size > largest:
            raise CheckpointError(f"{path.name} is larger than {largest // MIB} MiB, which no honest one is")
        return parse_json(path.name, path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read as JSON ({type(error).__name__}): {path.parent.name}"
        ) from error


def parse_json(name: str, raw: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of `name`, which is a file, or in words a part of one.

    Raises:
        CheckpointError: there is none, or it is longer or deeper than any honest one.
    """
    if sum(map(raw.count, (b",", b"[", b"{"))) > MOST_TENSORS + 1000:
        raise CheckpointError(f"{name} holds more than {MOST_TENSORS:,} entries, which no honest one does")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds no JSON object")
    _check_depth(name, value)
    return value


def check_header(file: Path) -> None:
    """Check the size of a safetensors header.

    Raises:
        CheckpointError: it is larger than the file, or than any honest one.
        OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise CheckpointError(f"{file.name} is cut short or damaged: save or download the model again")
        if length > LARGEST_HEADER:
            raise CheckpointError(f"{file.name} has a header of more than {LARGEST_HEADER // MIB} MiB")
        header = opened.read(length)
    tensors = header.count(b"{")
    if tensors > MOST_TENSORS or header.count(b",") > COMMAS_A_TENSOR * tensors:
        raise CheckpointError(f"{file.name} has a header that describes more than any honest one")


def check_folder(folder: Path) -> None:
    """Check the sizes of all that will be parsed of a checkpoint folder.

    Raises:
        CheckpointError: a file is larger, longer or deeper than any honest one, or damaged.
    """
    for path in sorted(folder.glob("*config.json")):
        read_json(path)
    for path in sorted(folder.glob("*.safetensors.index.json")):
        read_json(path, LARGEST_INDEX)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            check_header(path)
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read ({error})") from error


def _check_depth(name: str, value: object) -> None:
    level: list[object] = [value]
    for _ in range(DEEPEST):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise CheckpointError(f"{name} is nested deeper than {DEEPEST} levels")


def _children(value: object) -> Iterable[object]:
    """The lists and objects in a list or object."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (child for child in inside if isinstance(child, dict | list))
