"""Trains and loads tokenizers by kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dni_seq.streams.documents import DataError, first_line
from dni_seq.streams.tokenization import FORMAT, CharTokenizer, Tokenizer, WordTokenizer

KINDS = ("word", "char", "sentencepiece")


def train_tokenizer(kind: str, documents: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer of `kind` "word", "char" or "sentencepiece" for a text.

    Raises:
        DataError: `kind` is another one, or `vocab_size` is too small, or too large for the text.
    """
    return _class_of(kind).train(documents, vocab_size)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` has written.

    Raises:
        DataError: there is no such file, or it is not a tokenizer's.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="ascii"))
    except OSError as error:
        raise DataError(f"no tokenizer can be read from {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer file: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("kind") not in [*KINDS]:
        raise DataError(f"{path} is not a tokenizer file of this version ({FORMAT})")
    try:
        return _class_of(content["kind"]).from_content(content)
    except DataError as error:
        raise DataError(f"{path} is not a tokenizer file: {error}") from error


def _class_of(kind: str) -> Any:
    """The tokenizers' classes by kind; the one that needs another package is imported on use."""
    if kind == "sentencepiece":
        from dni_seq.streams.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer
    classes = {each.kind: each for each in (WordTokenizer, CharTokenizer)}
    if kind not in classes:
        raise DataError(f"unknown tokenizer {kind!r}: use {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    return classes[kind]
