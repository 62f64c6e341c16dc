"""The text in a user's own files: training, validation and test documents, and notes on what is odd about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from dni_seq.streams.compression import packing_of
from dni_seq.streams.documents import DataError, Documents, check_visible
from dni_seq.streams.file_types import START, has_columns
from dni_seq.streams.files import FileDocuments, matching
from dni_seq.streams.formats import FileFormat
from dni_seq.streams.held_out import hold_out

PIECES = 100
"""Number of first pieces, usually lines, that are examined for notes."""


class OwnFiles(NamedTuple):
    """The text in local files.

    Attributes:
        splits: the documents, keyed "train", "valid" and "test".
        notes: what the user should know about the text, each in one line.
    """

    splits: dict[str, Documents]
    notes: tuple[str, ...]


def load_own_files(
    data_file: str | Path,
    valid_file: str | Path | None,
    test_file: str | Path | None,
    form: FileFormat,
    *,
    needs_columns: bool = False,
) -> OwnFiles:
    """Returns the documents of local files; each of the first three arguments is a file or a pattern.

    A split without a file is held out of `data_file`. The last twentieth of its documents is the test text, and the
    twentieth before it is the validation text. If only the validation text is missing, it is the last twentieth. Each
    split gets at least one document. If there are too few documents, such as one long line, characters are held out in the
    same way. Holding out needs one pass through the files to count the documents. If characters are held out, a second pass
    counts them.

    Raises:
        DataError: a file cannot be used, a split has no visible character, or there is too little text to hold some out.
            With `needs_columns` also raised if no file has columns.
    """
    names = {"train": data_file, "valid": valid_file, "test": test_file}
    given = {split: FileDocuments(str(name), matching(name), form) for split, name in names.items() if name is not None}
    if needs_columns and not any(has_columns(path) for documents in given.values() for path in documents.paths):
        raise DataError(
            f"--text-column {form.column} cannot be used with {data_file}, which has no columns: remove it, or give files "
            "that end in .jsonl or .parquet"
        )
    for documents in given.values():
        check_visible(documents, "give a file with text")
    notes = [*_notes_on_overlap(given), *_notes_on_content(given, form)]
    missing = [split for split in names if split not in given]
    if not missing:
        return OwnFiles({**given}, tuple(notes))
    splits, note = hold_out(given["train"], missing)
    return OwnFiles({**given, **splits}, (*notes, *note))


def _notes_on_overlap(given: Mapping[str, FileDocuments]) -> Iterator[str]:
    """Yields notes for text that is read twice: a file and its compressed copy, or a held-out file in the training text."""
    for documents in given.values():
        names = {str(path) for path in documents.paths}
        twice = [path for path in documents.paths if packing_of(path) and str(path.with_suffix("")) in names]
        if twice:
            yield f"{twice[0].with_suffix('')} and {twice[0]} are both read: give a pattern that matches one of them"
    trained = {path.resolve() for path in given["train"].paths}
    for split, documents in given.items():
        shared = [path for path in documents.paths if path.resolve() in trained]
        if split != "train" and shared:
            yield f"--{split}-file: {shared[0]} is training text too, so the {split} score does not measure unseen text"


def _notes_on_content(given: Mapping[str, FileDocuments], form: FileFormat) -> Iterator[str]:
    """Yields notes on text that the user may not expect; reads the start of each split, or all to count nulls."""
    for documents in given.values():
        first = [*islice(documents, PIECES)]
        if not has_columns(documents.paths[0]) and _is_json_line(first[0]):
            yield (
                f"{documents.paths[0]} looks like JSON lines, but is read as plain text: to read the text in its fields, "
                "give it a name that ends in .jsonl"
            )
        start = "".join(first)[:START]
        if form.errors == "replace" and 10 * (wrong := start.count("\ufffd")) > len(start):
            yield f"{documents.name} may be in another encoding: {wrong} of its first {len(start)} characters are not UTF-8"
        if form.nulls == "skip" and (skipped := _skipped_rows(documents)):
            yield f"{documents.name}: rows skipped because their column {form.column!r} is null: {skipped:,}"


def _is_json_line(text: str) -> bool:
    """Returns whether a line is a JSON object with a string in a field."""
    if not text.startswith("{"):
        return False
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and any(isinstance(value, str) for value in row.values())


def _skipped_rows(documents: Documents) -> int:
    """Returns the number of rows that are skipped because their text is null; reads the whole text."""
    reader = documents.read()
    for _ in reader:
        pass
    return reader.skipped
