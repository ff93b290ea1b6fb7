# SPDX-License-Identifier: Apache-2.0
"""SHA-256 sums beside a model, in the form of `sha256sum`: a change of one bit is found before the weights are used."""

import hashlib
import re
from pathlib import Path

from eigenprune.errors import CheckpointError
from eigenprune.hub.names import DIGESTS_NAME

LINE = re.compile(r"([0-9a-f]{64}) [ *]([A-Za-z0-9][A-Za-z0-9._-]{0,254})", re.ASCII)
LARGEST = 1 << 20  # ten thousand shards
CHUNK = 1 << 20


def write_digests(folder: Path) -> None:
    """Write the sums of the weights in `folder`, their index and the config: `sha256sum -c SHA256SUMS` checks them."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), *folder.glob("config.json")]
    lines = [f"{_digest(path)}  {path.name}\n" for path in sorted(paths)]
    (folder / DIGESTS_NAME).write_text("".join(lines), encoding="ascii", newline="\n")


def check_digests(folder: Path) -> None:
    """Compare the files of `folder` with the sums beside them; a folder without sums passes.

    Raises:
        CheckpointError: a file differs or is missing, weights have no sum, or the sums themselves cannot be read.
    """
    sums = folder / DIGESTS_NAME
    if not sums.is_file():
        return
    expected = _read(sums)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in expected:
            raise CheckpointError(f"{path.name} is not in {DIGESTS_NAME}: {_advice(folder)}")
    for name, digest in expected.items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            raise CheckpointError(f"{name} is in {DIGESTS_NAME} and cannot be read ({error})") from error
        if found != digest:
            raise CheckpointError(f"{name} is not the file that {DIGESTS_NAME} names: {_advice(folder)}")


def _read(sums: Path) -> dict[str, str]:
    try:
        if sums.stat().st_size > LARGEST:
            raise CheckpointError(f"{DIGESTS_NAME} is larger than any honest one")
        lines = sums.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{DIGESTS_NAME} cannot be read ({type(error).__name__})") from error
    matches = [LINE.fullmatch(line) for line in lines]
    if None in matches:
        raise CheckpointError(f"{DIGESTS_NAME} is damaged: line {matches.index(None) + 1} is no sum")
    return {match[2]: match[1] for match in matches if match is not None}


def _advice(folder: Path) -> str:
    return (
        f"damaged, or changed since {folder.name} was saved; get it again, or, if you changed it, save it with "
        f"save_model or remove {DIGESTS_NAME}"
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
