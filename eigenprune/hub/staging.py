# SPDX-License-Identifier: Apache-2.0
"""A folder beside the target to write into, which a killed process does not leave behind for good."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

SUFFIX = ".saving"


@contextmanager
def staged_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, removed at the end; those that killed processes left there are removed first.

    A folder in use is locked by its process, and the system drops the lock when the process dies. Where it knows no
    such locks, nothing that is left is removed.

    Raises:
        OSError: it cannot be made.
    """
    _sweep(folder)
    staged, lock = _locked_folder(folder)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        _unlock(lock)


def _locked_folder(folder: Path) -> tuple[Path, int | None]:
    while True:
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=SUFFIX, dir=folder.parent))
        lock = _lock(staged, wait=True)
        if staged.is_dir():  # else another process took it for a left one before it was locked
            return staged, lock
        _unlock(lock)


def _sweep(folder: Path) -> None:
    left = re.compile(rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}")  # as mkdtemp names them
    for path in folder.parent.iterdir():
        if left.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            lock = _lock(path, wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                _unlock(lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """A lock on a folder; None where another process holds it, or there are no locks."""
    if sys.platform == "win32":
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held, gone, or a file system without locks
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
