"""The embedded corpus: the English text of Python's own documentation, found on every CPython.

`pydoc_data.topics` holds about 0.5 MB in some 80 topics. Many topics are passages of longer ones; such a topic is left
out, so that no held-out text is trained on. Of every ten topics that stay, ordered by length, the eighth is validation
text and the ninth is test text, which makes either about a twentieth of the whole. The text differs between Python
versions.
"""

from __future__ import annotations

from collections.abc import Mapping

from dni_seq.streams.documents import DataError, ListedDocuments

SHORT = 40
"""Paragraphs of fewer characters are too common to tell whether one topic repeats another."""


def load_pydoc() -> dict[str, ListedDocuments]:
    """The embedded corpus's splits, keyed "train", "valid" and "test".

    Raises:
        DataError: this Python comes without its documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python has no pydoc_data, the embedded corpus: give --data-file or --dataset") from error
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for rank, text in enumerate(distinct_topics(topics)):
        splits[{7: "valid", 8: "test"}.get(rank % 10, "train")].append(text)
    return {split: ListedDocuments(f"pydoc/{split}", texts) for split, texts in splits.items()}


def distinct_topics(topics: Mapping[str, str]) -> list[str]:
    """The topics, longest first, without those that mostly repeat longer ones."""
    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {part.strip() for part in topics[name].split("\n\n") if len(part.strip()) >= SHORT}
        repeated = sum(len(part) for part in paragraphs & seen)
        if 2 * repeated <= sum(len(part) for part in paragraphs):
            kept.append(topics[name])
        seen |= paragraphs
    return kept
