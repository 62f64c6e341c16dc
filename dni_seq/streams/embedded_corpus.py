"""The embedded corpus: the English text of Python's own documentation, which CPython ships.

`pydoc_data.topics` holds about 0.5 MB in some 80 topics. Many topics repeat passages of longer topics. A topic is skipped
if more than half of it repeats longer topics, so that little held-out text is in the training text. The remaining topics
are ordered by length. Of every ten topics, the eighth is validation text and the ninth is test text; validation and test
text are each about a twentieth of the corpus. The text differs between Python versions.
"""

from __future__ import annotations

from collections.abc import Mapping

from dni_seq.streams.documents import DataError, ListedDocuments

SHORT = 40
"""Paragraphs of fewer characters are ignored: they are too common to show that one topic repeats another."""


def load_pydoc() -> dict[str, ListedDocuments]:
    """Returns the splits of the embedded corpus, keyed "train", "valid" and "test".

    Raises:
        DataError: this Python has no module `pydoc_data.topics`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python lacks pydoc_data, the embedded corpus: give --dataset or --data-file") from error
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for rank, text in enumerate(distinct_topics(topics)):
        splits[{7: "valid", 8: "test"}.get(rank % 10, "train")].append(text)
    return {split: ListedDocuments(f"pydoc/{split}", texts) for split, texts in splits.items()}


def distinct_topics(topics: Mapping[str, str]) -> list[str]:
    """Returns the topics, longest first, without topics of which more than half repeats longer topics."""
    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {part.strip() for part in topics[name].split("\n\n") if len(part.strip()) >= SHORT}
        repeated = sum(len(part) for part in paragraphs & seen)
        if 2 * repeated <= sum(len(part) for part in paragraphs):
            kept.append(topics[name])
        seen |= paragraphs
    return kept
