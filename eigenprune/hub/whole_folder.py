# SPDX-License-Identifier: Apache-2.0
"""Write a folder so that a reader finds the whole old one or the whole new one, never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from eigenprune.errors import CheckpointError
from eigenprune.hub.rename import put_in_place
from eigenprune.hub.staging import staged_beside


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A sibling folder to write into; on leaving it is forced to disk and renamed to `folder`.

    Raises:
        CheckpointError: the disk refuses (full, read-only). What was there before stays.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staged_beside(folder) as staged:
            yield staged
            _follow_umask(staged)
            _force_to_disk(staged)
            put_in_place(staged, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk with an error of its own
        raise CheckpointError(f"{folder} cannot be written: {error}; nothing was changed") from error


def _follow_umask(staged: Path) -> None:
    """Give folder and files the permissions that newly made ones get; temporary ones are the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    staged.chmod(0o777 & ~umask)
    for path in staged.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _force_to_disk(staged: Path) -> None:
    for path in [*staged.rglob("*"), staged]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
