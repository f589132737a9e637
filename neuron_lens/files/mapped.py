"""Arrays that lie in files and are read as they are looked at: what is mapped need not fit in memory."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["release_pages"]


def release_pages(array: NDArray[Any]) -> None:
    """Let go of the pages of a mapped array (or of a view of one) that were read or written so far.

    Nothing is lost: they are read again when they are looked at. Without it every page looked at counts as memory of
    the process until the mapping is gone. Does nothing for arrays that are in memory, and where the system cannot.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)
