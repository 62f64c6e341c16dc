"""Converts text to token ids and back, by words or characters; for SentencePiece see `sentencepiece_tokenizer`.

Ids are int32. The unknown token has id 0. Words or characters follow by descending frequency. Entries of equal frequency
are in the order of their code points, so the same text always gives the same ids.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dni_seq.streams.documents import DataError

Ids = npt.NDArray[np.int32]


SAMPLE_CHARACTERS = 1 << 26
"""A vocabulary is made from at most this many characters, so that training ends even if the text is endless."""


JOINED = 1 << 16
"""Texts of a sample are joined until they have this many characters, since counting many short texts is slow."""


FORMAT = "dni_seq tokenizer 1"


class Tokenizer(ABC):
    """The base class of tokenizers, which convert text to token ids and back.

    Attributes:
        kind: "word", "char" or "sentencepiece".
        unknown_id: the id of unknown tokens, 0.
        vocabulary: the vocabulary's entry for each id.
    """

    kind: ClassVar[str]
    unknown_id: ClassVar[int] = 0
    vocabulary: tuple[str, ...]

    @property
    def vocabulary_size(self) -> int:
        """Number of ids in the vocabulary."""
        return len(self.vocabulary)

    @abstractmethod
    def lookup(self, text: str) -> Ids:
        """Returns the token ids of `text`, int32 [tokens], with -1 for tokens that are not in the vocabulary."""

    def encode(self, text: str) -> Ids:
        """Returns the token ids of `text`, int32 [tokens], with `unknown_id` for tokens that are not in the vocabulary."""
        return np.maximum(self.lookup(text), self.unknown_id)

    @abstractmethod
    def decode(self, ids: Any) -> str:
        """Returns the text of token ids.

        Args:
            ids: a sequence, array or CPU tensor of integers.

        Raises:
            ValueError: an id is not in the vocabulary.
        """

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Returns what the tokenizer stores in its JSON file, except the fields "format" and "kind"."""

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer to a JSON file atomically; `load_tokenizer` reads it."""
        path = Path(path)
        content = {"format": FORMAT, "kind": self.kind, **self.content()}
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(content), encoding="ascii")
        os.replace(temporary, path)

    def checked(self, ids: Any) -> list[int]:
        """Returns ids as a flat list of integers.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        numbers: list[int] = np.asarray(ids).reshape(-1).tolist()
        wrong = [number for number in numbers if not 0 <= number < self.vocabulary_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is out of range: it must be at least 0 and below {self.vocabulary_size}")
        return numbers


class ListTokenizer(Tokenizer):
    """A tokenizer whose vocabulary is a list of words or characters, with the unknown token as id 0."""

    special: ClassVar[tuple[str, ...]]
    """The entries at the start of every vocabulary; the first is the unknown token."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        if tuple(vocabulary[: len(self.special)]) != self.special or len(set(vocabulary)) != len(vocabulary):
            raise DataError(
                f"a {self.kind} vocabulary must have distinct entries and start with {', '.join(map(repr, self.special))}"
            )
        self.vocabulary = tuple(vocabulary)
        self._id_of = {entry: index for index, entry in enumerate(self.vocabulary)}

    @classmethod
    def vocabulary_of(cls, counts: Counter[str], vocab_size: int | None) -> list[str]:
        """Returns the special entries and the most frequent others, `vocab_size` in total. None is for all entries.

        Raises:
            DataError: `vocab_size` leaves no room for an entry of the text.
        """
        least = len(cls.special) + 1
        if vocab_size is not None and vocab_size < least:
            raise DataError(f"--vocab-size {vocab_size} is too small for --tokenizer {cls.kind}: use {least} or more")
        ranked = sorted(counts.keys() - set(cls.special), key=lambda entry: (-counts[entry], entry))
        return [*cls.special, *ranked][:vocab_size]

    def content(self) -> dict[str, Any]:
        """Returns the vocabulary."""
        return {"vocabulary": self.vocabulary}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> ListTokenizer:
        """Returns the tokenizer made from the content of a tokenizer file.

        Raises:
            DataError: the content has no list of strings as vocabulary, or the vocabulary is rejected.
        """
        vocabulary = content.get("vocabulary")
        if not isinstance(vocabulary, list) or not all(isinstance(entry, str) for entry in vocabulary):
            raise DataError("the vocabulary is not a list of strings")
        return cls(vocabulary)

    def entries(self, ids: Any) -> list[str]:
        """Returns the vocabulary's entry for each id.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return [self.vocabulary[number] for number in self.checked(ids)]


class WordTokenizer(ListTokenizer):
    """A tokenizer that splits text into words at whitespace; each newline is the token <eos>.

    Decoding joins words with one space, so it restores a text exactly only if words are one space apart and lines have no
    whitespace around them. A `<unk>` in the text itself, as in PTB, is the unknown token.

    Args:
        vocabulary: distinct words; the first two are "<unk>" and "<eos>".

    Raises:
        DataError: the vocabulary has duplicate entries, or does not start with "<unk>" and "<eos>".
    """

    kind = "word"
    special = ("<unk>", "<eos>")

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> WordTokenizer:
        """Returns the tokenizer of the words in the first 2**26 characters (`SAMPLE_CHARACTERS`) of `documents`.

        Args:
            documents: the training text.
            vocab_size: largest size of the vocabulary, which keeps the most frequent words; None for all words.

        Raises:
            DataError: `vocab_size` is below 3.
        """
        counts: Counter[str] = Counter()
        for text in sample(documents):
            counts.update(text.split())
        return cls(cls.vocabulary_of(counts, vocab_size))

    def lookup(self, text: str) -> Ids:
        """Returns the ids of the words and newlines in `text`, int32 [tokens], with -1 for words outside the vocabulary."""
        words = text.replace("\n", " <eos> ").split()
        return np.fromiter(map(self._id_of.get, words, repeat(-1)), np.int32, len(words))

    def decode(self, ids: Any) -> str:
        """Returns the words of `ids`, one space apart, with a newline for each <eos>.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        lines: list[list[str]] = [[]]
        for entry in self.entries(ids):
            if entry == "<eos>":
                lines.append([])
            else:
                lines[-1].append(entry)
        return "\n".join(" ".join(words) for words in lines)


class CharTokenizer(ListTokenizer):
    """A tokenizer that splits text into Unicode characters, newlines included; U+FFFD is the unknown character.

    Args:
        vocabulary: distinct characters; the first one is U+FFFD.

    Raises:
        DataError: the vocabulary has duplicate entries, does not start with U+FFFD, or has an entry that is not one
            character.
    """

    kind = "char"
    special = ("\ufffd",)

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__(vocabulary)
        if any(len(entry) != 1 for entry in vocabulary):
            raise DataError("each entry of a char vocabulary must be one character")
        # The entry after the largest code point holds -1; all larger code points are clipped to it.
        self._table = np.full(max(map(ord, vocabulary)) + 2, -1, np.int32)
        for entry, index in self._id_of.items():
            self._table[ord(entry)] = index

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> CharTokenizer:
        """Returns the tokenizer of the characters in the first 2**26 characters (`SAMPLE_CHARACTERS`) of `documents`.

        Args:
            documents: the training text.
            vocab_size: largest size of the vocabulary, which keeps the most frequent characters; None for all characters.

        Raises:
            DataError: `vocab_size` is below 2.
        """
        counts: Counter[str] = Counter()
        for text in sample(documents):
            counts.update(text)
        return cls(cls.vocabulary_of(counts, vocab_size))

    def lookup(self, text: str) -> Ids:
        """Returns the id of each character in `text`, int32 [len(text)], with -1 for characters outside the vocabulary."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._table.take(points, mode="clip")

    def decode(self, ids: Any) -> str:
        """Returns the characters of `ids` as a string.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return "".join(self.entries(ids))


def sample(documents: Iterable[str]) -> Iterator[str]:
    """Yields the first `SAMPLE_CHARACTERS` characters of documents, joined into parts of about `JOINED` characters."""
    left, held, length = SAMPLE_CHARACTERS, [], 0
    for text in documents:
        held.append(text[:left])
        left, length = left - len(text), length + len(text)
        if length >= JOINED or left <= 0:
            yield "".join(held)
            held, length = [], 0
        if left <= 0:
            return
    yield "".join(held)
