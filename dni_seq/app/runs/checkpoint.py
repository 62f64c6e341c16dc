"""Checkpoints: everything that a run needs to resume exactly, in one file that is written atomically.

A checkpoint is a dict of plain Python values and tensors, so it loads with `weights_only=True` and a malicious file cannot
run code. It is written to a temporary file, flushed to the disk and renamed. If the process dies while it writes, the older
file is unchanged.

The file is the zip archive that `torch.save` writes. The comment at the archive's end holds the SHA-256 of the bytes that
`torch.save` wrote. A flipped bit or a truncated file is detected before anything is unpickled. Plain `torch.load` can read
the file too.
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
"""The version of the file format. Files of version 1, which have no checksum, can still be read."""

_COMMENT = b"dni_seq sha256 "
_COMMENT_LENGTH = len(_COMMENT) + 2 * hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """Raised if a file cannot be used as a checkpoint. The message is one line."""


class DamagedCheckpointError(CheckpointError):
    """Raised if a checkpoint file is damaged. An older checkpoint may be used instead."""


def save_checkpoint(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Writes `content`, a dict of plain values and tensors, to `path` atomically.

    Args:
        path: the file.
        content: the content of the checkpoint.
        keep: path in the same directory to which the older file at `path` is renamed before the new file is renamed to
            `path`; None to overwrite the older file. If the process dies between these two renames, the older file is at
            `keep` and no file is at `path`.

    Raises:
        OSError: the disk is full or the directory is not writable; the older file is unchanged.
    """
    marked = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: _save_sealed(marked, file), keep)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Returns the content that `save_checkpoint` wrote, with all tensors on the CPU.

    Raises:
        DamagedCheckpointError: the file is damaged or not a checkpoint.
        CheckpointError: the file does not exist, or has a newer version.
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
    # A damaged file can fail anywhere in unzipping and unpickling, with any exception.
    except Exception as error:
        raise DamagedCheckpointError(f"{path} is not a checkpoint, or is damaged") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("version"), int):
        raise DamagedCheckpointError(f"{path} is not a checkpoint of dni_seq")
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content['version']}, but this dni_seq reads up to {VERSION}: upgrade dni_seq"
        )
    if content["version"] > 1 and not sealed:
        raise DamagedCheckpointError(f"{path} is a damaged checkpoint: its checksum is missing")
    return content


@contextmanager
def checkpoint_errors(run: Path) -> Iterator[None]:
    """Turns exceptions inside the context into a `CheckpointError`. For the code that first uses a checkpoint's content.

    OSError, ArithmeticError and RankError pass unchanged.

    Raises:
        CheckpointError: the code in the context raised another exception.
    """
    try:
        yield
    except (OSError, ArithmeticError, RankError):
        raise
    # An intact file from another program can lack any entry, and any entry can have a wrong type or shape.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"cannot resume from the checkpoint of the run {run}: {reason}") from error


class _ChecksumWriter:
    """A writable file that computes the SHA-256 of its data and keeps the OSError if a write fails."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sum = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes `data` to the file and adds it to the checksum."""
        self.sum.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Does nothing: the file is flushed when it is complete."""


def _save_sealed(content: dict[str, Any], file: BinaryIO) -> None:
    """Saves with `torch.save` and adds the checksum as the archive's comment, after two bytes with the comment's length."""
    summing = _ChecksumWriter(file)
    try:
        torch.save(content, summing)  # type: ignore[arg-type]
    except RuntimeError:
        if summing.error is not None:  # torch reports a full disk as a wrong file position
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
    """Rewinds the file. Raises a ValueError if the file has a checksum that does not match."""
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
            raise ValueError("the checksum does not match")
    file.seek(0)


def random_state() -> dict[str, Any]:
    """Returns the state of torch's random generators: the CPU's, and those of all GPUs if CUDA is initialised."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores torch's random generators from what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_json(path: Path, content: Any) -> None:
    """Writes `content` to `path` as JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], keep: Path | None = None) -> None:
    """Calls `write` on a temporary file in the directory of `path`, flushes it to the disk and renames it to `path`.

    An older file at `path` is renamed to `keep` if `keep` is given.

    Raises:
        OSError: the file cannot be written; the temporary file is removed and `path` is unchanged.
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
    """Removes a file and ignores an OSError, so that the original error is reported."""
    with suppress(OSError):
        path.unlink()


def _flush_directory(directory: Path) -> None:
    """Flushes a rename to the disk on POSIX systems. Windows cannot open a directory to do so."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
