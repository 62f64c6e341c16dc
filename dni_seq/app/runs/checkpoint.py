"""Checkpoints: everything that a run needs to go on exactly, in one file that is whole or absent.

A checkpoint is a dict of plain Python values and tensors, so that it loads with `weights_only=True` and a hostile file
cannot run code. It is written beside its place, flushed to the disk and renamed: whoever dies in the middle leaves the
older file as it was.

The file is what `torch.save` writes, a zip archive, with a SHA-256 of all its bytes in the archive's comment: a flipped bit
or a lost end is found before anything is unpickled, and plain `torch.load` reads the file too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dni_seq.distributed.process_group import RankError

FORMAT = "dni_seq checkpoint"
VERSION = 2
"""1 had no checksum; it is still read."""

_COMMENT = b"dni_seq sha256 "
_COMMENT_LENGTH = len(_COMMENT) + 2 * hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the text is one line that says why."""


class DamagedCheckpointError(CheckpointError):
    """A file that is not what was written: an older one may serve in its place."""


def save_checkpoint(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Write `content`, a dict of plain values and tensors, to `path` atomically.

    Args:
        path: the file.
        content: what it is to hold.
        keep: where the older file at `path` goes, in the same directory; None to replace it. Whoever dies between the two
            renames leaves the older file there, and nothing at `path`.

    Raises:
        OSError: the disk is full or the directory cannot be written; the older file is as it was.
    """
    marked = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: _save_sealed(marked, file), keep)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on the CPU.

    Raises:
        DamagedCheckpointError: the file is damaged, or is no checkpoint.
        CheckpointError: there is no such file, or it is of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with path.open("rb") as file:
            sealed = _is_sealed(file)
            _check_seal(file, sealed)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read as a checkpoint: {error.strerror or error}") from error
    # Garbage can fail anywhere in unzipping and unpickling, and with any exception.
    except Exception as error:
        raise DamagedCheckpointError(f"{path} is not a checkpoint, or a damaged one") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("version"), int):
        raise DamagedCheckpointError(f"{path} is not a checkpoint of dni_seq")
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {content['version']}, this dni_seq reads up to {VERSION}: upgrade it"
        )
    if content["version"] > 1 and not sealed:
        raise DamagedCheckpointError(f"{path} is a damaged checkpoint: it has lost its checksum")
    return content


@contextmanager
def checkpoint_errors(run: Path) -> Iterator[None]:
    """Take what goes wrong in the block, where a checkpoint's content is handed out or used at first, for its fault.

    Raises:
        CheckpointError: something was raised in the block that is not of the system, of another rank or of arithmetic.
    """
    try:
        yield
    except (OSError, ArithmeticError, RankError):
        raise
    # Whole files of another program's making can lack any entry, or hold another type or shape at any place.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"cannot go on from the checkpoint of the run {run}: {reason}") from error


class _ChecksumWriter:
    """A file to write to that sums what passes, and remembers what the system said where writing failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sum = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Pass `data` on."""
        self.sum.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Nothing: the file is flushed when it is whole."""


def _save_sealed(content: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save` with the sum of its bytes as the archive's comment, whose length is the archive's last two bytes."""
    summing = _ChecksumWriter(file)
    try:
        torch.save(content, summing)  # type: ignore[arg-type]
    except RuntimeError:
        if summing.error is not None:  # torch reports a full disk as a wrong position in the file
            raise summing.error from None
        raise
    comment = _COMMENT + summing.sum.hexdigest().encode("ascii")
    file.seek(-2, os.SEEK_END)
    file.write(len(comment).to_bytes(2, "little") + comment)


def _is_sealed(file: BinaryIO) -> bool:
    """Whether the file ends with a checksum."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _COMMENT_LENGTH))
    return file.read(len(_COMMENT)) == _COMMENT


def _check_seal(file: BinaryIO, sealed: bool) -> None:
    """Leave the file at its start; raise a ValueError where it has a checksum that does not hold."""
    if sealed:
        size = file.seek(-_COMMENT_LENGTH - 2, os.SEEK_END)
        length, expected = file.read(2), file.read()[len(_COMMENT) :]
        file.seek(0)
        summed, left = hashlib.sha256(), size
        while left:
            summed.update(block := file.read(min(left, 1 << 20)))
            left -= len(block)
        summed.update(bytes(2))
        if length != _COMMENT_LENGTH.to_bytes(2, "little") or summed.hexdigest().encode("ascii") != expected:
            raise ValueError("the checksum does not hold")
    file.seek(0)


def random_state() -> dict[str, Any]:
    """The state of torch's random generators, of the CPU and of every GPU in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def set_random_state(state: dict[str, Any]) -> None:
    """Put torch's random generators back to what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], keep: Path | None = None) -> None:
    """Let `write` fill a temporary file in the directory of `path`, flush it to the disk and rename it to `path`.

    What was at `path` before goes to `keep`, where that is given.

    Raises:
        OSError: as from the file system, with the path; the temporary file is removed and `path` is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    except BaseException:
        _remove(temporary)
        raise
    _flush_directory(path.parent)


def _remove(path: Path) -> None:
    """Remove a file where the system lets us; what made us do it is the error to report."""
    with suppress(OSError):
        path.unlink()


def _flush_directory(directory: Path) -> None:
    """Flush a rename to the disk, where the system can open a directory to do so (Windows cannot)."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
