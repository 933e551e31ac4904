"""Arrays that end where a page ends and no memory follows: who reads beyond them crashes."""

from __future__ import annotations

import ctypes
import mmap
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)


def at_page_end(x: NDArray[T]) -> NDArray[T]:
    """A copy of x whose last byte is the last before a page that cannot be read."""
    room = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    bytes_ = np.frombuffer(memory, np.uint8)
    no_access = 0
    if ctypes.CDLL(None, use_errno=True).mprotect(
        ctypes.c_void_p(bytes_.ctypes.data + room), ctypes.c_size_t(mmap.PAGESIZE), no_access
    ):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = bytes_[room - x.nbytes : room].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy
