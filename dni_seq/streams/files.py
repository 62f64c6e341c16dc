"""Text in local files, read line by line through `datasets`, as text on the Hub is."""

from __future__ import annotations

import codecs
import glob
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dni_seq.streams.documents import (
    DataError,
    StreamedDocuments,
    as_it_is,
    first_line,
    source_errors,
)

IN_MEMORY_BYTES = 1 << 26
"""A file up to this size is held in memory as token ids; a larger one is streamed in constant memory."""

HELD_OUT = 20
"""One line in this many is held out for each split that has no file of its own."""

CHUNK = 1 << 20


def load_own_files(
    data_file: str | Path, valid_file: str | Path | None, test_file: str | Path | None
) -> dict[str, StreamedDocuments]:
    """A user's own text, keyed "train", "valid" and "test".

    A split without a file is held out of `data_file`: its last twentieth, in lines, is the test text and the twentieth
    before it the validation text (the last one, where only that is missing). At least one line goes to each.

    Raises:
        DataError: a file cannot be used, or has too few lines to hold text out.
    """
    paths = {"train": Path(data_file)}
    paths |= {split: Path(path) for split, path in (("valid", valid_file), ("test", test_file)) if path is not None}
    lines = {split: count_lines(path) for split, path in paths.items()}
    splits = load_lines(paths, as_it_is, {split: str(path) for split, path in paths.items()})
    missing = [split for split in ("valid", "test") if split not in paths]
    if not missing:
        return splits
    share = max(1, lines["train"] // HELD_OUT)
    kept = lines["train"] - share * len(missing)
    if kept < 1:
        raise DataError(
            f"{data_file} has {lines['train']} lines, too few to hold out text for {' and '.join(missing)}: "
            f"give {' and '.join(f'--{split}-file' for split in missing)}"
        )
    whole = splits["train"]
    splits["train"] = whole.part(whole.name, 0, kept)
    for index, split in enumerate(missing):
        splits[split] = whole.part(f"{whole.name} ({split})", kept + index * share, share)
    return splits


def load_lines(
    paths: Mapping[str, Path], render: Callable[[str], str], names: Mapping[str, str]
) -> dict[str, StreamedDocuments]:
    """The lines of each split's file, after `count_lines` has found the files in order.

    Raises:
        DataError: a file cannot be read.
    """
    import datasets

    # Without the escape, `datasets` would take a "[" or "*" in a path for a pattern.
    patterns = {split: [glob.escape(str(path.resolve()))] for split, path in paths.items()}
    try:
        with uncounted():
            loaded = datasets.load_dataset("text", data_files=patterns, streaming=True, keep_linebreaks=True)
    except source_errors() as error:
        raise DataError(f"{', '.join(map(str, paths.values()))}: {first_line(error)}") from error
    return {
        split: StreamedDocuments(
            names[split],
            loaded[split],
            column="text",
            render=render,
            small=path.stat().st_size <= IN_MEMORY_BYTES,
        )
        for split, path in paths.items()
    }


def count_lines(path: Path) -> int:
    r"""The lines of a text file, ended by \n, \r\n or \r.

    Raises:
        DataError: there is no such file, it is no regular file, cannot be read, is empty, or is not UTF-8.
    """
    if not path.exists():
        raise DataError(f"no such file: {path}")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise DataError(f"{path} is {kind}: give a text file")
    lines, last = 0, ""
    try:
        with path.open(encoding="utf-8") as file:
            while chunk := file.read(CHUNK):
                lines += chunk.count("\n")
                last = chunk[-1]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {first_invalid_byte(path)}: convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not last:
        raise DataError(f"{path} is empty: give a file with text")
    return lines + (last != "\n")


def first_invalid_byte(path: Path) -> int:
    """The offset of the first byte that is not UTF-8; the file's size where it ends within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return offset - held + error.start
            if not chunk:
                return offset
            offset += len(chunk)


@contextmanager
def uncounted() -> Iterator[None]:
    """Keep `datasets` from reporting the use of a local file to its download counter on the network."""
    from datasets import config

    counted = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counted
