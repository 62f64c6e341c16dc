"""Opens compressed files for reading their uncompressed bytes: .gz, .xz, .bz2 and .zst, whatever the case of the ending.

A compressed file that ends too early, or that has other bytes after its compressed data, raises an error. Python's own
readers of .xz and .bz2 drop such bytes silently, and the package zstandard accepts a file that ends too early.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

from dni_seq.streams.documents import DataError, first_line

BUFFER = 1 << 20
"""Size of the buffer for uncompressed data, in bytes."""

STEP = 1 << 8
"""Number of compressed bytes that are decompressed at once. Zstandard returns at most 128 KiB for 4 compressed bytes."""

LONGEST_WINDOW = 1 << 31
"""Largest Zstandard window that a .zst file may need, in bytes; `zstd --long=31` writes such files."""

DAMAGED: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Errors that reading a compressed file may raise, except the error of zstandard, see `_zstandard_errors`."""


class _Decompressor(Protocol):
    """Decompresses one frame; `bz2.BZ2Decompressor` and `lzma.LZMADecompressor` have this interface."""

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether `decompress` needs more bytes."""

    @property
    def unused_data(self) -> bytes:
        """Bytes after the end of the frame."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Returns uncompressed bytes, at most `max_length` if the format can limit them."""


class _ZstandardFrame:
    """Decompresses one frame of a .zst file; `max_length` has no effect."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._frame = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        """Bytes after the end of the frame."""
        return self._frame.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Returns all uncompressed bytes of `data`."""
        return self._frame.decompress(data)


class _FrameReader(io.RawIOBase):
    """Reads the uncompressed bytes of a file of compressed frames; NUL bytes after a frame are skipped.

    Args:
        file: the compressed file.
        start: returns a decompressor for the next frame.
    """

    def __init__(self, file: IO[bytes], start: Callable[[], _Decompressor]) -> None:
        self._file, self._start = file, start
        self._frame: _Decompressor | None = None
        self._begun = False
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """Returns True."""
        return True

    def close(self) -> None:
        """Closes the compressed file too."""
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Reads uncompressed bytes and returns their number, 0 at the end of the last frame.

        Raises:
            EOFError: the file ends inside a frame.
        """
        while not self._output:
            if self._frame is None and not self._begin_frame():
                return 0
            assert self._frame is not None
            if not self._input and self._frame.needs_input:
                self._input = self._file.read(STEP)
                if not self._input:
                    raise EOFError("the compressed data ends too early")
            self._output = memoryview(self._frame.decompress(self._input, len(buffer)))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _begin_frame(self) -> bool:
        """Begins the next frame after any NUL bytes; returns False at the end of the file."""
        while True:
            if self._begun:
                self._input = self._input.lstrip(b"\0")
            if self._input:
                self._frame, self._begun = self._start(), True
                return True
            self._input = self._file.read(STEP)
            if not self._input:
                return False


def packing_of(path: Path) -> str:
    """Returns the ending of a compressed file in lower case, such as ".gz"; an empty string for any other file."""
    ending = path.suffix.lower()
    return ending if ending in COMPRESSIONS else ""


def unpacked_ending(path: Path) -> str:
    """Returns the ending of a file's name in lower case, without the ending of a compressed file."""
    return (Path(path.stem) if packing_of(path) else path).suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file for reading its uncompressed bytes.

    Raises:
        DataError: the file needs the package zstandard, which is not installed.
    """
    file: IO[bytes] = COMPRESSIONS.get(packing_of(path), _plain)(path)
    return file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the errors of reading `path` in the block into a DataError.

    Raises:
        DataError: the file is damaged, or cannot be read.
    """
    try:
        yield
    except (*DAMAGED, *_zstandard_errors()) as error:
        raise DataError(f"{path}: reading failed ({reason(error)}): check that the file is intact") from error


def reason(error: BaseException) -> str:
    """Returns the reason of a failed read in one line."""
    return getattr(error, "strerror", None) or first_line(error)


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_xz(path: Path) -> IO[bytes]:
    return io.BufferedReader(_FrameReader(path.open("rb"), partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)), BUFFER)


def _open_bz2(path: Path) -> IO[bytes]:
    return io.BufferedReader(_FrameReader(path.open("rb"), bz2.BZ2Decompressor), BUFFER)


def _open_zstandard(path: Path) -> IO[bytes]:
    """Opens a .zst file; Python has no reader of its own before 3.14."""
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise DataError(f"{path} needs the package zstandard: pip install zstandard, or decompress the file") from error
    return io.BufferedReader(_FrameReader(path.open("rb"), _ZstandardFrame), BUFFER)


def _zstandard_errors() -> tuple[type[Exception], ...]:
    """Returns the error class of the package zstandard, or an empty tuple if the package is not installed."""
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


COMPRESSIONS: Mapping[str, Callable[[Path], Any]] = MappingProxyType(
    {
        ".gz": gzip.open,
        ".xz": _open_xz,
        ".bz2": _open_bz2,
        ".zst": _open_zstandard,
    }
)
"""Functions that open compressed files, keyed by ending."""
