"""One writer a run directory: an advisory lock that ends with its process, however that ends.

The lock is the system's `flock` on the file `lock` in the directory; the file stays, the lock does not. Its text, the number
of the process and the host's name, is for people.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import TracebackType

LOCK_NAME = "lock"

_WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""What file systems answer that have no locks, as Lustre does where it is mounted without them."""


class RunLock:
    """Holds the lock on one directory from `take` to the end of the context.

    Attributes:
        missing: why there is no lock although `take` was called, as text for the user; None where there is one.
    """

    def __init__(self) -> None:
        self.missing: str | None = None
        self._directory: Path | None = None
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._directory = None

    def take(self, directory: Path) -> None:
        """Become the one that writes to `directory`; nothing happens where this lock is held there already.

        Raises:
            ValueError: another process holds it.
            OSError: the file of the lock cannot be made.
        """
        directory = directory.absolute()
        if self._directory == directory:
            return
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self.missing = _lock(descriptor, directory)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            os.close(descriptor)
            raise
        self._directory, self._descriptor = directory, descriptor


def _lock(descriptor: int, directory: Path) -> str | None:
    """Lock the open file; why there is no lock, None where there is.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return f"{directory} is not locked, this system has no flock: let no second run write there"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise ValueError(
            f"{holder} is training in --run-dir {directory}: wait for its end, or choose another --run-dir"
        ) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return f"{directory} is not locked, its file system has no locks: let no second run write there"
    return None
