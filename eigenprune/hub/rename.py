# SPDX-License-Identifier: Apache-2.0
"""Put one folder in the place of another in a single step of the file system."""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

AT_FDCWD = -100  # fcntl.h: paths are relative to the working directory
RENAME_EXCHANGE = 2  # linux/fs.h


def put_in_place(staged: Path, folder: Path) -> None:
    """Rename `staged` to `folder`; what was there before is removed afterwards.

    A folder cannot be renamed over a full one. Linux can exchange the two in one step; elsewhere the old folder steps
    aside first, and a process killed between the two renames leaves it beside the target, as `.NAME.*.old`.

    Raises:
        OSError: the file system refuses; `folder` is as it was.
    """
    if not folder.exists():
        os.rename(staged, folder)
    elif exchange(staged, folder):
        shutil.rmtree(staged, ignore_errors=True)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        try:
            os.rename(folder, aside)  # over the empty folder just made
        except OSError:
            aside.rmdir()
            raise
        try:
            os.rename(staged, folder)
        except OSError:
            os.rename(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two existing paths in one step; False where this system or file system cannot.

    Raises:
        OSError: it can, and refused.
    """
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # in glibc from 2.28 on
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
