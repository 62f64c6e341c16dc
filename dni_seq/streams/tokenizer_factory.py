"""Trains and loads tokenizers of any kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dni_seq.streams.documents import DataError, first_line
from dni_seq.streams.tokenization import FORMAT, CharTokenizer, Tokenizer, WordTokenizer

KINDS = ("word", "char", "sentencepiece")


def train_tokenizer(kind: str, documents: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Trains a tokenizer on a text.

    Args:
        kind: "word", "char" or "sentencepiece".
        documents: the training text; at most its first 2**26 characters are used.
        vocab_size: size of the vocabulary. For "word" and "char" it is a limit, None for no limit. For "sentencepiece" it
            is exact; None means 8,000 entries, or fewer if the text is small.

    Raises:
        DataError: `kind` is unknown, or `vocab_size` is too small, or too large for the text ("sentencepiece").
    """
    return _class_of(kind).train(documents, vocab_size)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from a file that `Tokenizer.save` has written.

    Raises:
        DataError: the file cannot be read, or it is not a tokenizer file of this version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="ascii"))
    except OSError as error:
        raise DataError(
            f"no tokenizer can be read from {path} ({error.strerror}): restore the file, or train a new tokenizer"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not a tokenizer file ({first_line(error)}): restore the file, or train a new tokenizer"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("kind") not in [*KINDS]:
        raise DataError(f"{path} is not a tokenizer file of this version ({FORMAT}): train a new tokenizer")
    try:
        return _class_of(content["kind"]).from_content(content)
    except DataError as error:
        raise DataError(f"{path} is not a tokenizer file ({error}): restore the file, or train a new tokenizer") from error


def _class_of(kind: str) -> Any:
    """Returns the tokenizer class of a kind; imports the class that needs the package sentencepiece only for its kind."""
    if kind == "sentencepiece":
        from dni_seq.streams.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer
    classes = {each.kind: each for each in (WordTokenizer, CharTokenizer)}
    if kind not in classes:
        raise DataError(f"unknown tokenizer {kind!r}: use {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    return classes[kind]
