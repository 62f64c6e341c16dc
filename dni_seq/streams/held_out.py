"""Holds out validation and test text at the end of a text: documents, or characters if there are few documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from dni_seq.streams.documents import (
    CharactersOfDocuments,
    DataError,
    Documents,
    PartOfDocuments,
    Piece,
    Position,
    check_visible,
)

HELD_OUT = 20
"""One document in this many is held out for each split without a file."""

MARKS = 4096
"""Largest number of positions that are kept while documents are counted."""


def hold_out(whole: Documents, missing: Sequence[str]) -> tuple[dict[str, Documents], tuple[str, ...]]:
    """Splits one text into the training text and the `missing` splits; see `load_own_files`.

    Returns:
        The splits, and a note if characters are held out, not documents.

    Raises:
        DataError: there is too little text, or the text of a split has no visible character.
    """
    total, marks = _count(whole, lambda piece: int(piece.ends))
    share = max(1, total // HELD_OUT)
    notes: tuple[str, ...] = ()
    kept = total - share * len(missing)
    if kept >= 1:
        splits = _documents_held_out(whole, missing, marks, kept, share)
    else:
        splits, share = _characters_held_out(whole, missing, total)
        held = ", ".join(f"{share:,} for {split}" for split in missing)
        notes = (
            f"{whole.name} has {total} document{'s' * (total != 1)} (lines or rows), so characters at its end are held "
            f"out: {held}",
        )
    for split, documents in splits.items():
        advice = f"remove blank text at the end of {whole.name}, or give --{split}-file"
        check_visible(documents, advice if split != "train" else "give more text")
    return splits, notes


def _documents_held_out(
    whole: Documents, missing: Sequence[str], marks: Mapping[int, Position], kept: int, share: int
) -> dict[str, Documents]:
    """Returns the first `kept` documents as training text, and `share` documents for each missing split after them."""
    splits: dict[str, Documents] = {"train": PartOfDocuments(whole.name, whole, start=None, count=kept, small=whole.small)}
    for number, split in enumerate(missing):
        first = kept + number * share
        mark = max(index for index in marks if index <= first)
        splits[split] = PartOfDocuments(
            f"{whole.name} ({split})", whole, start=marks[mark], skip=first - mark, count=share, small=whole.small
        )
    return splits


def _characters_held_out(whole: Documents, missing: Sequence[str], documents: int) -> tuple[dict[str, Documents], int]:
    """Returns the splits of a text with few `documents`, and the number of characters of each missing split.

    Raises:
        DataError: a twentieth of the text has fewer than 2 characters. A split needs 2, because one is the line end.
    """
    total, marks = _count(whole, lambda piece: len(piece.text))
    share = total // HELD_OUT
    if share < 2:
        raise DataError(
            f"{whole.name} has {documents} document{'s' * (documents != 1)} (lines or rows) and {total} characters, too few "
            f"to hold out text for {' and '.join(missing)}: give {' and '.join(f'--{split}-file' for split in missing)}"
        )
    borders = [0, *(total - share * number for number in range(len(missing), -1, -1))]
    splits: dict[str, Documents] = {}
    for split, (start, stop) in zip(("train", *missing), pairwise(borders), strict=True):
        mark = max(index for index in marks if index <= start)
        name = whole.name if split == "train" else f"{whole.name} ({split})"
        splits[split] = CharactersOfDocuments(
            name, whole, mark=marks[mark], passed=mark, start=start, stop=stop, small=whole.small
        )
    return splits, share


def _count(documents: Documents, size: Callable[[Piece], int]) -> tuple[int, Mapping[int, Position]]:
    """Returns the total size of all pieces, and at most `MARKS` positions keyed by the size of the text before them.

    One of the keys is 0.
    """
    reader = documents.read()
    marks, every, count, seen = [(0, reader.position())], 1, 0, 0
    for piece in reader:
        length = size(piece)
        count, seen = count + length, seen + (length > 0)
        if length and seen % every == 0:
            marks.append((count, reader.position()))
            if len(marks) > MARKS:
                every *= 2
                marks = marks[::2]
    return count, dict(marks)
