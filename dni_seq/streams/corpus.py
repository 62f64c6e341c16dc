"""Where text comes from: a named data set, any other one on the Hub, the user's own files, or the embedded corpus.

What is on the Hub is read through `datasets` with streaming=True. No text but the embedded one is ever held as a whole.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dni_seq.streams.documents import DataError, Documents
from dni_seq.streams.embedded_corpus import load_pydoc
from dni_seq.streams.files import load_own_files
from dni_seq.streams.formats import FileFormat
from dni_seq.streams.hub import CORPORA, find_corpus, hub_corpus, local_corpus

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
        level: the tokenizer that suits the text, "word", "char" or "sentencepiece".
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
    text_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    invalid_utf8: str = "error",
) -> Corpus:
    """Find a text and check that it can be read.

    Args:
        dataset: one of `known_datasets()`, or any "owner/name" on the Hub, or None for `data_file`, or for the embedded
            corpus where that is None too.
        data_dir: looked in before the Hub, as `DIR/NAME/NAME.{train,valid,test}.txt`; None for `default_data_dir()`.
        data_file: the user's own text instead of `dataset`: a file, or a pattern for several, of lines of UTF-8, or of
            JSON (.jsonl), or of Parquet (.parquet); text and JSON also compressed (.gz, .xz, .bz2, .zst).
        valid_file: its validation text; held out of `data_file` where None, as `load_own_files` tells.
        test_file: its test text; likewise.
        text_column: the column, or field, that holds the text; None for "text".
        config: the data set's configuration on the Hub, where it is not the usual one.
        revision: its branch on the Hub.
        invalid_utf8: "error", or "replace" for U+FFFD in the place of bytes that are not UTF-8.

    Raises:
        DataError: the name is unknown, the options contradict each other, a file cannot be used, or the Hub cannot be
            reached (within 10 seconds).
    """
    form = FileFormat(column=text_column or "text", errors={"error": "strict", "replace": "replace"}[invalid_utf8])
    if data_file is not None:
        if dataset is not None:
            raise DataError("--dataset and --data-file exclude each other: leave one out")
        if config is not None or revision is not None:
            raise DataError("--dataset-config and --dataset-revision go with a --dataset on the Hub: leave them out")
        return _corpus(str(data_file), load_own_files(data_file, valid_file, test_file, form), "char")
    if valid_file is not None or test_file is not None:
        raise DataError("--valid-file and --test-file go with --data-file: give --data-file too")
    if dataset is None or dataset == EMBEDDED:
        if config is not None or revision is not None or text_column is not None:
            raise DataError(
                f"--dataset-config, --dataset-revision and --text-column are for a --dataset on the Hub or a --data-file, "
                f"not for {EMBEDDED}: leave them out"
            )
        return _corpus(EMBEDDED, load_pydoc(), "char")
    corpus = find_corpus(dataset, config, revision, text_column)
    if corpus is None:
        raise _unknown(dataset)
    directory = Path(data_dir) if data_dir is not None else default_data_dir()
    splits = local_corpus(dataset, corpus, directory, form) if config is None and revision is None else None
    return _corpus(dataset, splits or hub_corpus(dataset, corpus), corpus.level)


def _unknown(name: str) -> DataError:
    """The error for a name that is none."""
    close = difflib.get_close_matches(name.lower(), known_datasets(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return DataError(f"unknown data set {name!r}: {hint}known are {', '.join(known_datasets())}, and OWNER/NAME on the Hub")


def _corpus(name: str, splits: Mapping[str, Documents], level: str) -> Corpus:
    """The corpus of three splits."""
    return Corpus(name, splits["train"], splits["valid"], splits["test"], level)
