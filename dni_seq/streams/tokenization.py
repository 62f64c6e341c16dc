"""Text to token ids and back, by words, by characters, or by SentencePiece (`dni_seq.streams.subwords`).

Ids are int32. The unknown token has id 0 in both vocabularies; the words or characters follow by descending frequency,
equal ones in alphabetical order, so that the same text always gives the same ids.
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
"""A vocabulary is made from at most this much text, so that it ends on a stream that does not."""


JOINED = 1 << 16
"""Characters of a sample that are counted at once."""


FORMAT = "dni_seq tokenizer 1"


class Tokenizer(ABC):
    """What all tokenizers share.

    Attributes:
        kind: "word", "char" or "sentencepiece".
        vocabulary: the text of each id.
    """

    kind: ClassVar[str]
    unknown_id: ClassVar[int] = 0
    vocabulary: tuple[str, ...]

    @property
    def vocabulary_size(self) -> int:
        """The number of ids."""
        return len(self.vocabulary)

    @abstractmethod
    def lookup(self, text: str) -> Ids:
        """The ids of a text's tokens, -1 for each that is not in the vocabulary."""

    def encode(self, text: str) -> Ids:
        """The ids of a text's tokens, `unknown_id` for each that is not in the vocabulary."""
        return np.maximum(self.lookup(text), self.unknown_id)

    @abstractmethod
    def decode(self, ids: Any) -> str:
        """The text of ids (a sequence, array or tensor of integers).

        Raises:
            ValueError: an id is not in the vocabulary.
        """

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What the tokenizer's file holds, beside its kind."""

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, whole or not at all."""
        path = Path(path)
        content = {"format": FORMAT, "kind": self.kind, **self.content()}
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(content), encoding="ascii")
        os.replace(temporary, path)

    def checked(self, ids: Any) -> list[int]:
        """Ids as a list.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        numbers: list[int] = np.asarray(ids).reshape(-1).tolist()
        wrong = [number for number in numbers if not 0 <= number < self.vocabulary_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is not in a vocabulary of {self.vocabulary_size}")
        return numbers


class ListTokenizer(Tokenizer):
    """A tokenizer whose vocabulary is a list of words or characters, with the unknown token as id 0."""

    special: ClassVar[tuple[str, ...]]
    """The entries that every vocabulary starts with; the first stands for everything unknown."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        if tuple(vocabulary[: len(self.special)]) != self.special or len(set(vocabulary)) != len(vocabulary):
            raise DataError(
                f"a {self.kind} vocabulary has distinct entries and starts with {', '.join(map(repr, self.special))}"
            )
        self.vocabulary = tuple(vocabulary)
        self._id_of = {entry: index for index, entry in enumerate(self.vocabulary)}

    @classmethod
    def vocabulary_of(cls, counts: Counter[str], vocab_size: int | None) -> list[str]:
        """The `vocab_size` most frequent entries, the special ones included; all where it is None.

        Raises:
            DataError: `vocab_size` leaves no room for a single entry of the text.
        """
        least = len(cls.special) + 1
        if vocab_size is not None and vocab_size < least:
            raise DataError(f"a {cls.kind} vocabulary needs {least} entries or more: raise --vocab-size {vocab_size}")
        ranked = sorted(counts.keys() - set(cls.special), key=lambda entry: (-counts[entry], entry))
        return [*cls.special, *ranked][:vocab_size]

    def content(self) -> dict[str, Any]:
        """The vocabulary."""
        return {"vocabulary": self.vocabulary}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> ListTokenizer:
        """The tokenizer of a file's content.

        Raises:
            DataError: it is not a tokenizer's.
        """
        vocabulary = content.get("vocabulary")
        if not isinstance(vocabulary, list) or not all(isinstance(entry, str) for entry in vocabulary):
            raise DataError("its vocabulary is not a list of strings")
        return cls(vocabulary)

    def entries(self, ids: Any) -> list[str]:
        """The vocabulary's entry of each id.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return [self.vocabulary[number] for number in self.checked(ids)]


class WordTokenizer(ListTokenizer):
    """Words between blanks; each newline is the token <eos>.

    Decoding joins words by one blank, so that it gives back a text whose words are one blank apart and lines without blanks
    around them. A `<unk>` that the text itself holds, as PTB does, is the unknown token.
    """

    kind = "word"
    special = ("<unk>", "<eos>")

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> WordTokenizer:
        """The tokenizer of the words in the first `SAMPLE_CHARACTERS` of `documents`.

        Raises:
            DataError: `vocab_size` is too small.
        """
        counts: Counter[str] = Counter()
        for text in sample(documents):
            counts.update(text.split())
        return cls(cls.vocabulary_of(counts, vocab_size))

    def lookup(self, text: str) -> Ids:
        """The ids of words and line ends, -1 for each unknown word; [tokens]."""
        words = text.replace("\n", " <eos> ").split()
        return np.fromiter(map(self._id_of.get, words, repeat(-1)), np.int32, len(words))

    def decode(self, ids: Any) -> str:
        """The words of `ids`, one blank apart, with a newline for each <eos>."""
        lines: list[list[str]] = [[]]
        for entry in self.entries(ids):
            if entry == "<eos>":
                lines.append([])
            else:
                lines[-1].append(entry)
        return "\n".join(" ".join(words) for words in lines)


class CharTokenizer(ListTokenizer):
    """Unicode characters, the newline one of them. The replacement character U+FFFD stands for unknown ones."""

    kind = "char"
    special = ("\ufffd",)

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__(vocabulary)
        if any(len(entry) != 1 for entry in vocabulary):
            raise DataError("a char vocabulary has entries of one character each")
        # One place past the largest code point: every unknown larger one is clipped to it.
        self._table = np.full(max(map(ord, vocabulary)) + 2, -1, np.int32)
        for entry, index in self._id_of.items():
            self._table[ord(entry)] = index

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> CharTokenizer:
        """The tokenizer of the characters in the first `SAMPLE_CHARACTERS` of `documents`.

        Raises:
            DataError: `vocab_size` is too small.
        """
        counts: Counter[str] = Counter()
        for text in sample(documents):
            counts.update(text)
        return cls(cls.vocabulary_of(counts, vocab_size))

    def lookup(self, text: str) -> Ids:
        """The ids of characters, -1 for each unknown one; [characters]."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._table.take(points, mode="clip")

    def decode(self, ids: Any) -> str:
        """The characters of `ids`."""
        return "".join(self.entries(ids))


def sample(documents: Iterable[str]) -> Iterator[str]:
    """The first pieces of documents, up to `SAMPLE_CHARACTERS` in all, joined so that they are not too short."""
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
