# SPDX-License-Identifier: Apache-2.0
"""Write a folder other than a model's so that a reader finds the whole old one or the whole new one."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from eigenprune.errors import CheckpointError
from eigenprune.hub.rename import put_in_place
from eigenprune.hub.save import _follow_umask, _force_to_disk


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A sibling folder to write into; on leaving it is forced to disk and renamed to `folder`.

    Raises:
        CheckpointError: the disk refuses (full, read-only). What was there before stays.
    """
    staged = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".saving", dir=folder.parent))
        yield staged
        _follow_umask(staged)
        _force_to_disk(staged)
        put_in_place(staged, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk with an error of its own
        raise CheckpointError(f"{folder} cannot be written: {error}; nothing was changed") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
