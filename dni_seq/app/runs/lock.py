"""Locks a run directory for one writer. The lock is advisory and is released when its process ends for any reason.

The lock is the system's `flock` on the file `lock` in the directory. The file remains after the lock is released. Its
text, the process id and the host name, is for the reader of an error message only.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import TracebackType

LOCK_NAME = "lock"

_WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""Error numbers of file systems without locks, for example Lustre if it is mounted without locks."""


class RunLock:
    """Holds the lock on one directory from `take` to the end of the context.

    Attributes:
        missing: why the directory cannot be locked, as a message for the user; None if it is locked, and before `take`.
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
        """Locks `directory`. Does nothing if this object holds the lock already.

        Raises:
            ValueError: another process holds the lock.
            OSError: the lock file cannot be created.
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
    """Locks the open file. Returns None, or why it cannot be locked.

    Raises:
        ValueError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        return f"{directory} is not locked because this system has no flock: do not start a second run there"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise ValueError(
            f"{holder} is training in --run-dir {directory}: wait until it ends, or choose another --run-dir"
        ) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return f"{directory} is not locked because its file system has no locks: do not start a second run there"
    return None
