"""Memory that one window frees kept for the next one, instead of being handed back to the system, and huge pages of it.

The C library of most Linux systems gives large blocks back as soon as they are free. A window's logits and gradients are
such blocks, so every step would have the system map, clear and fault in the same megabytes again, which takes up to a third
of a short window's step. In pages of 4 KiB, parameters, gradients and moments fill more of them than a core has
translations at hand for; pages of 2 MiB take up to another tenth off such a step (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux's mman.h

KEPT = 1 << 30
"""Bytes of free memory at the heap's end, above which they go back to the system."""

LARGEST = 32 << 20
"""Bytes of the largest block that is kept: the most that glibc takes."""

GROWTH = 64 << 20
"""Bytes that the heap grows by."""

HUGE_PAGE = 2 << 20
"""Bytes of a huge page."""

RESERVED = 512 << 20
"""Bytes of address space by which the heap grows at first; huge pages are asked for these, and come as they are used."""


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 32 MiB, 1 GiB in all; returns whether its C library can do so.

    The first 512 MiB of them lie in huge pages where the system gives any. For a program's start, since it is of the whole
    process; train_lm.py and train_tasks.py call it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    kept = all(
        [
            library.mallopt(_MMAP_THRESHOLD, LARGEST),
            library.mallopt(_TRIM_THRESHOLD, KEPT),
            library.mallopt(_TOP_PAD, RESERVED),
        ]
    )
    _grow_in_huge_pages(library)
    return kept and bool(library.mallopt(_TOP_PAD, GROWTH))


def _grow_in_huge_pages(library: ctypes.CDLL) -> None:
    """Have the heap grow once, and ask for huge pages there; a system that gives none changes nothing."""
    library.sbrk.restype = library.malloc.restype = ctypes.c_void_p
    library.sbrk.argtypes, library.malloc.argtypes = [ctypes.c_ssize_t], [ctypes.c_size_t]
    library.free.argtypes, library.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    before = library.sbrk(0)
    library.free(library.malloc(LARGEST // 2))  # larger than what is free, so that the heap has to grow
    begin, end = -(-before // HUGE_PAGE) * HUGE_PAGE, library.sbrk(0) // HUGE_PAGE * HUGE_PAGE
    if end > begin:
        library.madvise(begin, end - begin, _HUGE_PAGES)
