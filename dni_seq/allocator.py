"""Memory that one window frees kept for the next one, instead of being handed back to the system.

The C library of most Linux systems gives large blocks back as soon as they are free. A window's logits and gradients are
such blocks, so every step would have the system map, clear and fault in the same megabytes again, which takes up to a third
of a short window's step (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h

KEPT = 1 << 30
"""Bytes of free memory at the heap's end, above which they go back to the system."""

LARGEST = 32 << 20
"""Bytes of the largest block that is kept: the most that glibc takes."""

GROWTH = 64 << 20
"""Bytes that the heap grows by."""


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 32 MiB, 1 GiB in all; returns whether its C library can do so.

    For a program's start, since it is of the whole process; train_lm.py and train_tasks.py call it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    return all([set_option(_MMAP_THRESHOLD, LARGEST), set_option(_TRIM_THRESHOLD, KEPT), set_option(_TOP_PAD, GROWTH)])
