# SPDX-License-Identifier: Apache-2.0
"""Give memory that is no longer needed back to the system at once."""

import ctypes
import functools
import mmap
import sys

from torch import Tensor

MADV_PAGEOUT = 21  # linux/mman.h, Linux 5.4 on


def release_unused() -> None:
    """Return what the C allocator keeps of freed tensors; nothing where it cannot.

    glibc keeps freed blocks for reuse. Between layers of different shapes little of that fits, and a run that should
    need one layer's workspace grows by several.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def page_span(tensor: Tensor) -> tuple[int, int]:
    """Address and length of the whole pages under the storage of `tensor`; (0, 0) where it is not on the CPU."""
    if tensor.device.type != "cpu":
        return 0, 0
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    return start, max(0, end - start)


def release_pages(span: tuple[int, int]) -> None:
    """Take the pages of a `page_span`, whose tensor is gone, out of residence.

    Weights that transformers has just loaded are pages of the mapped checkpoint, and the map lives as long as any of
    its tensors. Paging out is a hint without effect on contents, so an address that is in other use by now is safe.
    """
    advise = _function("madvise")
    if advise is not None and span[1]:
        advise(ctypes.c_void_p(span[0]), ctypes.c_size_t(span[1]), ctypes.c_int(MADV_PAGEOUT))


@functools.cache
def _function(name: str) -> "ctypes._NamedFuncPointer | None":
    """A function of the C library; None on other systems than Linux, and where the library has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
