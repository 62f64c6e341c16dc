"""Configures glibc's allocator to keep freed memory for the next window, and to place it in huge pages.

The C library of most Linux systems returns large blocks to the system as soon as they are freed. A window's logits and
gradients are such blocks, so the system would map, clear and fault in the same megabytes in every step, which costs most at
short windows. With pages of 4 KiB, parameters, gradients and moments need more page translations than a core caches. Pages
of 2 MiB need fewer.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux's mman.h

KEPT = 1 << 30
"""Largest number of free bytes at the heap's end that are kept. Further free bytes are returned to the system."""

LARGEST = 32 << 20
"""Size in bytes of the largest block that is kept after it is freed. glibc allows no larger value."""

GROWTH = 64 << 20
"""Bytes by which the heap grows whenever it is full."""

HUGE_PAGE = 2 << 20
"""Size of a huge page in bytes."""

RESERVED = 512 << 20
"""Bytes of address space by which the heap grows once, at the start. They lie in huge pages, allocated on first use."""


def keep_freed_memory() -> bool:
    """Makes this process keep freed blocks of up to 32 MiB each, 1 GiB in total. Returns False if the C library cannot.

    The first 512 MiB of the heap are placed in huge pages if the system provides any. The setting holds for the whole
    process, so call this function when a program starts, as train_lm.py and train_tasks.py do.
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
    """Grows the heap once and requests huge pages for it. Has no effect if the system provides none."""
    library.sbrk.restype = library.malloc.restype = ctypes.c_void_p
    library.sbrk.argtypes, library.malloc.argtypes = [ctypes.c_ssize_t], [ctypes.c_size_t]
    library.free.argtypes, library.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    before = library.sbrk(0)
    library.free(library.malloc(LARGEST // 2))  # more than the heap has free, so that it has to grow
    begin, end = -(-before // HUGE_PAGE) * HUGE_PAGE, library.sbrk(0) // HUGE_PAGE * HUGE_PAGE
    if end > begin:
        library.madvise(begin, end - begin, _HUGE_PAGES)
