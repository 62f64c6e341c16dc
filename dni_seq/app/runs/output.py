"""Output on stdout and stderr that cannot end a run: a narrow encoding, a closed pipe or a full disk only loses text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast


class TolerantStream:
    """A text stream that writes to another stream and raises no error for text that cannot be written.

    Characters that the other stream's encoding lacks become `?`. After an OSError all further text is discarded.

    Args:
        stream: the stream to write to.

    Attributes:
        failure: the first OSError of a write, None if no write has failed. A pipe whose reader has ended is not a failure.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text` as far as possible and returns its length."""
        try:
            self._write(text)
        except BlockingIOError:  # a non-blocking terminal has written only a part of the text
            pass
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the other stream."""
        try:
            self._stream.flush()
        except BlockingIOError:
            pass
        except OSError as error:
            self._discard(error)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._stream.write(text.encode(encoding, "replace").decode(encoding))

    def _discard(self, error: OSError) -> None:
        """Redirects the stream's descriptor to the null device, to which text that waits in buffers is then written."""
        if self.failure is None and not isinstance(error, BrokenPipeError):
            self.failure = error
        with suppress(OSError):  # a stream without a descriptor has nothing to redirect
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Makes stdout and stderr a `TolerantStream` inside the context, also if the process was started without them.

    At the end, one line on stderr says if text for stdout was lost.
    """
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        opened = [stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8")) for stream in before]
        out, err = (TolerantStream(stream) for stream in opened)
        sys.stdout, sys.stderr = cast("TextIO", out), cast("TextIO", err)
        try:
            yield
        finally:
            out.flush()
            if out.failure is not None:
                err.write(f"{program_name()}: stdout could not be written ({out.failure.strerror}), so output is missing\n")
            err.flush()
            sys.stdout, sys.stderr = before


def output_status() -> int:
    """Flushes stdout and returns the exit status of a command whose result is its output.

    Returns:
        0, also if the reader of a pipe has ended; 2 if stdout could not be written for another reason.
    """
    sys.stdout.flush()
    return 0 if getattr(sys.stdout, "failure", None) is None else 2


def program_name() -> str:
    """Returns the name of the running program for messages: "train_lm" for scripts/train_lm.py, or "dni-seq train"."""
    return Path(sys.argv[0]).name.removesuffix(".py")


def _open_standard_descriptors() -> None:
    """Opens the null device for closed descriptors among 0, 1 and 2, so that no file of the run gets their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
