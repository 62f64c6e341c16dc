"""Where text comes from: a named data set, the user's own files, or the embedded corpus.

Everything but the embedded corpus is read through `datasets` with streaming=True, whether the text lies in a local
file or on the Hub, and is never held as a whole.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dni_seq.streams.documents import DataError, Documents
from dni_seq.streams.files import load_own_files
from dni_seq.streams.hub import CORPORA, load_corpus
from dni_seq.streams.pydoc import load_pydoc

EMBEDDED = "pydoc"

__all__ = ["EMBEDDED", "Corpus", "DataError", "Documents", "default_data_dir", "known_datasets", "open_corpus"]


@dataclass(frozen=True)
class Corpus:
    """A text in three splits.

    Attributes:
        name: the data set's name, or the file's.
        train: documents to train on.
        valid: documents to choose by.
        test: documents for the final score.
        level: the tokenizer that suits the text, "word" or "char".
    """

    name: str
    train: Documents
    valid: Documents
    test: Documents
    level: str


def known_datasets() -> list[str]:
    """The names `open_corpus` knows."""
    return [*CORPORA, EMBEDDED]


def default_data_dir() -> Path:
    """Where data sets are looked for first: the environment variable DNI_SEQ_DATA, else `data`."""
    return Path(os.environ.get("DNI_SEQ_DATA") or "data")


def open_corpus(
    dataset: str | None = None,
    *,
    data_dir: str | Path | None = None,
    data_file: str | Path | None = None,
    valid_file: str | Path | None = None,
    test_file: str | Path | None = None,
) -> Corpus:
    """Find a text and check that it can be read; no more than its first rows are fetched.

    Args:
        dataset: one of `known_datasets()`, or None for `data_file`, or for the embedded corpus where that is None too.
        data_dir: looked in before the Hub, as `DIR/NAME/NAME.{train,valid,test}.txt`; None for `default_data_dir()`.
        data_file: a UTF-8 text file of the user's, instead of `dataset`.
        valid_file: its validation text; held out of `data_file` where None, as `load_own_files` tells.
        test_file: its test text; likewise.

    Raises:
        DataError: the name is unknown, the options contradict each other, a file cannot be used, or the Hub cannot be
            reached (within 10 seconds).
    """
    if data_file is None:
        if valid_file is not None or test_file is not None:
            raise DataError("--valid-file and --test-file go with --data-file: give --data-file too")
        name = EMBEDDED if dataset is None else dataset
        return _named(name, Path(data_dir) if data_dir is not None else default_data_dir())
    if dataset is not None:
        raise DataError("--dataset and --data-file exclude each other: leave one out")
    return _corpus(str(data_file), load_own_files(data_file, valid_file, test_file), "char")


def _named(name: str, data_dir: Path) -> Corpus:
    """A corpus by its name."""
    if name == EMBEDDED:
        return _corpus(name, load_pydoc(), "char")
    if name in CORPORA:
        return _corpus(name, load_corpus(name, data_dir), CORPORA[name].level)
    close = difflib.get_close_matches(name.lower(), known_datasets(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise DataError(f"unknown data set {name!r}: {hint}known are {', '.join(known_datasets())}")


def _corpus(name: str, splits: Mapping[str, Documents], level: str) -> Corpus:
    """The corpus of three splits."""
    return Corpus(name, splits["train"], splits["valid"], splits["test"], level)
