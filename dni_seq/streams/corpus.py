"""Opens a text: a named data set, any other data set on the Hub, local files, or the embedded corpus.

Data sets on the Hub are read through `datasets` with streaming=True. Only the embedded corpus is held in memory as text.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dni_seq.core.paths import expand_home
from dni_seq.streams.documents import DataError, Documents
from dni_seq.streams.embedded_corpus import load_pydoc
from dni_seq.streams.formats import FileFormat
from dni_seq.streams.hub import CORPORA, find_corpus, hub_corpus, local_corpus
from dni_seq.streams.own_files import load_own_files

EMBEDDED = "pydoc"

__all__ = ["EMBEDDED", "Corpus", "DataError", "Documents", "default_data_dir", "known_datasets", "open_corpus"]


@dataclass(frozen=True)
class Corpus:
    """A text in three splits.

    Attributes:
        name: name of the data set, or the file name or pattern that was given.
        train: documents for training.
        valid: documents for validation.
        test: documents for the final test.
        level: the default tokenizer for this text: "word", "char" or "sentencepiece".
        notes: what the user should know about the text, each in one line.
    """

    name: str
    train: Documents
    valid: Documents
    test: Documents
    level: str
    notes: tuple[str, ...] = ()


def known_datasets() -> list[str]:
    """Returns the short names of data sets that `open_corpus` accepts; others on the Hub need their id, "owner/name"."""
    return [*CORPORA, EMBEDDED]


def default_data_dir() -> Path:
    """Returns the directory in which data sets are looked up first: $DNI_SEQ_DATA if it is set, else `data`."""
    return expand_home(os.environ.get("DNI_SEQ_DATA") or "data")


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
    null_text: str = "error",
) -> Corpus:
    """Opens a text as a `Corpus` with training, validation and test documents.

    Args:
        dataset: one of `known_datasets()`, or "owner/name" for any data set on the Hub. None for `data_file`, or for the
            embedded corpus if `data_file` is None too.
        data_dir: directory DIR that is searched before the Hub, for files `DIR/NAME/NAME.{train,valid,test}.txt`; for text8
            and enwik8 also for one file `DIR/NAME/NAME`. The files may be compressed. DIR is not searched if `config` or
            `revision` is given. None for `default_data_dir()`.
        data_file: a local file, or a pattern for several files, instead of `dataset`: lines of UTF-8, JSON lines (.jsonl,
            .ndjson, .json) or Parquet (.parquet). Text and JSON may be compressed (.gz, .xz, .bz2, .zst).
        valid_file: validation text for `data_file`. None to hold out a part of `data_file`, see `load_own_files`.
        test_file: test text for `data_file`. None to hold out a part of `data_file` too.
        text_column: column (Parquet, Hub) or field (JSON) that holds the text. None for the default: "text" for local files,
            the recorded column for a data set of `known_datasets()`, and for another data set "text" or, if no column has
            this name, the only column of strings.
        config: configuration of the data set on the Hub; None for the default.
        revision: branch of the data set on the Hub; None for the default.
        invalid_utf8: "error" to raise at bytes that are not UTF-8, "replace" to read them as U+FFFD.
        null_text: "error" to raise at a row whose text is null, "skip" to skip it. With "skip", local files are read
            once more to count such rows for `Corpus.notes`.

    Returns:
        The corpus. Documents are read when they are iterated, so later reads may raise a DataError too.

    Raises:
        DataError: the name is unknown, the options contradict each other, a file cannot be used, or the Hub does not
            answer (within 5 seconds).
    """
    errors = {"error": "strict", "replace": "replace"}[invalid_utf8]
    form = FileFormat(column=text_column or "text", errors=errors, nulls=null_text)
    _check_sources(dataset, data_file, valid_file, test_file, text_column, config, revision)
    if data_file is not None:
        own = load_own_files(data_file, valid_file, test_file, form, needs_columns=text_column is not None)
        return _corpus(str(data_file), own.splits, "char", own.notes)
    if dataset is None or dataset == EMBEDDED:
        return _corpus(EMBEDDED, load_pydoc(), "char")
    return _open_named(dataset, data_dir, text_column, config, revision, form)


def _open_named(
    dataset: str, data_dir: str | Path | None, column: str | None, config: str | None, revision: str | None, form: FileFormat
) -> Corpus:
    """Returns a data set in `data_dir` or on the Hub; see `open_corpus`.

    Raises:
        DataError: the name is unknown, a file cannot be used, or the Hub does not answer.
    """
    if dataset not in CORPORA and Path(dataset).is_file():
        raise DataError(f"--dataset {dataset} is a file: give it with --data-file")
    corpus = find_corpus(dataset, config, revision, column)
    if corpus is None:
        raise _unknown(dataset)
    directory = expand_home(data_dir) if data_dir is not None else default_data_dir()
    splits = local_corpus(dataset, corpus, directory, form) if config is None and revision is None else None
    return _corpus(dataset, splits or hub_corpus(dataset, corpus, form.nulls), corpus.level)


def _check_sources(
    dataset: str | None,
    data_file: str | Path | None,
    valid_file: str | Path | None,
    test_file: str | Path | None,
    text_column: str | None,
    config: str | None,
    revision: str | None,
) -> None:
    """Raises a DataError if arguments of `open_corpus` contradict each other."""
    hub_version = config is not None or revision is not None
    if data_file is not None:
        if dataset is not None:
            raise DataError(f"--dataset {dataset} and --data-file {data_file} exclude each other: remove one of them")
        if hub_version:
            raise DataError("--dataset-config and --dataset-revision cannot be used with --data-file: remove them")
    elif valid_file is not None or test_file is not None:
        raise DataError("--valid-file and --test-file need a --data-file for training: give --data-file too")
    elif (dataset is None or dataset == EMBEDDED) and (hub_version or text_column is not None):
        raise DataError(
            "--dataset-config, --dataset-revision and --text-column cannot be used with the embedded corpus "
            f"{EMBEDDED}: remove them, or give a --dataset on the Hub"
        )


def _unknown(name: str) -> DataError:
    """Returns the error for an unknown data set, with the closest known name as a hint."""
    close = difflib.get_close_matches(name.lower(), known_datasets(), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return DataError(f"unknown data set {name!r}{hint}: use one of {', '.join(known_datasets())}, or OWNER/NAME on the Hub")


def _corpus(name: str, splits: Mapping[str, Documents], level: str, notes: tuple[str, ...] = ()) -> Corpus:
    """Returns the corpus made of three splits."""
    return Corpus(name, splits["train"], splits["valid"], splits["test"], level, notes)
