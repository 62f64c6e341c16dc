"""Checkpoints: everything that a run needs to go on exactly, in one file that is whole or absent.

A checkpoint is a dict of plain Python values and tensors, so that it loads with `weights_only=True` and a hostile file
cannot run code. It is written beside its place, flushed to the disk and renamed: whoever dies in the middle leaves the
older file as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = "dni_seq checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the text is one line that says why."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, a dict of plain values and tensors, to `path` atomically.

    Raises:
        OSError: the disk is full or the directory cannot be written; the older file is as it was.
    """
    marked = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: torch.save(marked, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, it is no checkpoint, or it is of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Garbage can fail anywhere in unzipping and unpickling, and with any exception.
    except Exception as error:
        raise CheckpointError(f"{path} is not a checkpoint, or a damaged one") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of dni_seq")
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {content['version']}, this dni_seq reads up to {VERSION}: upgrade it"
        )
    return content


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


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file in the directory of `path`, flush it to the disk and rename it to `path`.

    Raises:
        OSError: as from the file system; the temporary file is removed and `path` is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(path.parent)


def _flush_directory(directory: Path) -> None:
    """Flush a rename to the disk, where the system can open a directory to do so (Windows cannot)."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
