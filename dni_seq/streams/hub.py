"""Text on the Hugging Face Hub, streamed through `datasets`, and the table of known corpora.

If a corpus is found in the data directory (`local_corpus`), it is read from there instead.
"""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dni_seq.streams.compression import COMPRESSIONS, packing_of
from dni_seq.streams.documents import (
    BytesOfDocuments,
    DataError,
    Documents,
    PartOfDocuments,
    Position,
    as_it_is,
    check_visible,
    first_line,
    is_visible,
    stripped_line,
)
from dni_seq.streams.files import FileDocuments, load_lines
from dni_seq.streams.formats import FileFormat
from dni_seq.streams.hub_rows import RowDocuments, leave_retrying_to_us, source_errors

SPLITS = MappingProxyType({"train": ("train",), "valid": ("validation", "valid", "val", "dev"), "test": ("test",)})
"""Our names of the splits, and the names that data sets on the Hub use for them."""

PREFLIGHT_SECONDS = 5.0
"""Longest time to wait for the Hub's first answer."""

HELD_OUT_OF = 2000
"""If a data set on the Hub lacks "valid" or "test", they are held out of at most this many first documents of "train"."""

HELD_OUT = 20
"""One in this many of the first `HELD_OUT_OF` documents is held out for each missing split."""

INSTEAD = "put the files in --data-dir, give --data-file, or remove --dataset to use the embedded corpus"

TEXT8_SPLITS = MappingProxyType(
    {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, 100_000_000)}
)
"""Byte ranges of the splits of text8 and enwik8, as in published results."""


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the Hub; one row of the table of known corpora.

    Attributes:
        hub_id: the repository, "owner/name", or a text file, "hf://datasets/owner/name/file".
        config: name of the configuration; None for the default one.
        revision: the branch; None for the main branch.
        level: the default tokenizer for the text.
        render: turns a row's text into a document.
        small: whether the token ids may be held in memory.
        column: the column that holds the text; None for "text", or for the only column of strings if there is no "text".
        single: whether a local copy may be one file, which is split by `TEXT8_SPLITS`.
    """

    hub_id: str
    config: str | None = None
    revision: str | None = None
    level: str = "sentencepiece"
    render: Callable[[str], str] = as_it_is
    small: bool = False
    column: str | None = "text"
    single: bool = False


CORPORA: Mapping[str, HubCorpus] = MappingProxyType(
    {
        # Lines in the files of PTB have a space at both ends, rows on the Hub have none. Stripped lines are the same.
        "ptb": HubCorpus(
            "ptb-text-only/ptb_text_only",
            revision="refs/convert/parquet",
            level="word",
            render=stripped_line,
            small=True,
            column="sentence",
        ),
        "wikitext-2": HubCorpus("Salesforce/wikitext", "wikitext-2-v1", level="word", small=True),
        "wikitext-103": HubCorpus("Salesforce/wikitext", "wikitext-103-v1", level="word"),
        "text8": HubCorpus("afmck/text8", level="char", single=True),
        "enwik8": HubCorpus("hf://datasets/LTCB/enwik8/enwik8.gz", level="char", single=True),
        "tinyshakespeare": HubCorpus("karpathy/tiny_shakespeare", revision="refs/convert/parquet", level="char", small=True),
        "pg19": HubCorpus("emozilla/pg19"),
        "fineweb": HubCorpus("HuggingFaceFW/fineweb", "sample-10BT"),
        "c4": HubCorpus("allenai/c4", "en"),
    }
)


def find_corpus(
    name: str, config: str | None = None, revision: str | None = None, column: str | None = None
) -> HubCorpus | None:
    """Returns a known corpus or any "owner/name" on the Hub, with the given settings; None for any other name."""
    corpus = CORPORA.get(name)
    if corpus is None and name.count("/") == 1:
        corpus = HubCorpus(name, column=None)
    if corpus is None:
        return None
    return replace(
        corpus,
        config=corpus.config if config is None else config,
        revision=corpus.revision if revision is None else revision,
        column=corpus.column if column is None else column,
    )


def local_corpus(name: str, corpus: HubCorpus, data_dir: Path, form: FileFormat) -> dict[str, Documents] | None:
    """Returns the splits of the corpus in `data_dir`, or None if it is not there.

    The files are NAME/NAME.{train,valid,test}.txt; for text8 and enwik8 also one file NAME/NAME. Each may be compressed.

    Raises:
        DataError: some of the files are missing, or a file cannot be used.
    """
    form = replace(form, render=corpus.render)
    names = {split: f"{name}/{split}" for split in SPLITS}
    paths = {split: _packed(data_dir / name / f"{name}.{split}.txt") for split in SPLITS}
    if any(path.exists() for path in paths.values()):
        return load_lines(paths, form, names)
    whole = _packed(data_dir / name / name)
    if corpus.single and whole.is_file():
        _check_whole(whole)
        return _split_by_bytes(names, FileDocuments(name, [whole], form))
    return None


def _check_whole(path: Path) -> None:
    """Checks that an uncompressed file has the bytes of `TEXT8_SPLITS`, because a shorter file would have other splits.

    Raises:
        DataError: the file has fewer bytes.
    """
    size, needed = path.stat().st_size, TEXT8_SPLITS["test"][1]
    if not packing_of(path) and size < needed:
        raise DataError(f"{path} has {size:,} bytes instead of {needed:,}: download it again, or give it as --data-file")


def _packed(path: Path) -> Path:
    """Returns the path, or the path of a compressed file if only that exists."""
    packed = (path.with_name(path.name + ending) for ending in COMPRESSIONS)
    return path if path.exists() else next((other for other in packed if other.exists()), path)


def _split_by_bytes(names: Mapping[str, str], whole: Documents) -> dict[str, Documents]:
    """Returns the splits of `TEXT8_SPLITS`.

    The held-out splits are held in memory, because each pass over them would read all bytes before them again.
    """
    return {
        split: BytesOfDocuments(names[split], whole, start=start, stop=stop, small=split != "train")
        for split, (start, stop) in TEXT8_SPLITS.items()
    }


def hub_corpus(name: str, corpus: HubCorpus, nulls: str = "error") -> dict[str, Documents]:
    """Returns the splits of a corpus on the Hub, streamed.

    If the corpus lacks "valid" or "test", each missing split is one twentieth of the first `HELD_OUT_OF` documents of
    "train", and "train" then starts after the held-out documents. A corpus that is one text file is split by bytes instead.

    Args:
        name: name of the corpus.
        corpus: the repository of the corpus, and how it is read.
        nulls: "error" to raise at a row without text, "skip" to skip it.

    Raises:
        DataError: the Hub cannot be reached, or does not have the corpus in this form, or a held-out text is blank.
    """
    check_reachable(name)
    names = {split: f"{name}/{split}" for split in SPLITS}
    loaded = _load(name, corpus)
    theirs = {split: next((each for each in options if each in loaded), None) for split, options in SPLITS.items()}
    if theirs["train"] is None:
        raise DataError(f"{corpus.hub_id} on the Hub has no split train (splits: {', '.join(loaded)}): {INSTEAD}")
    splits: dict[str, Documents] = {}
    for split, their in theirs.items():
        if their is not None:
            column = corpus.column or _text_column(corpus.hub_id, loaded[their])
            splits[split] = RowDocuments(
                names[split], loaded[their], column=column, render=corpus.render, small=corpus.small, nulls=nulls
            )
            if split != "train":
                check_visible(splits[split], f"choose another data set; otherwise {INSTEAD}")
    if corpus.hub_id.startswith("hf://"):
        return _split_by_bytes(names, splits["train"])
    return splits | hold_out_first(splits["train"], names, [split for split in SPLITS if split not in splits])


def _load(name: str, corpus: HubCorpus) -> Any:
    """Loads the data set as a dict of streaming splits; raises a DataError with advice if that fails."""
    import datasets

    leave_retrying_to_us()
    errors: tuple[type[Exception], ...] = (*source_errors(), RuntimeError)
    try:
        if corpus.hub_id.startswith("hf://"):
            files = {"train": corpus.hub_id}
            return datasets.load_dataset("text", data_files=files, streaming=True, keep_linebreaks=True)
        return datasets.load_dataset(corpus.hub_id, corpus.config, revision=corpus.revision, streaming=True)
    except errors as error:
        advice = INSTEAD
        if "script" in str(error):
            advice = f"try --dataset {corpus.hub_id} --dataset-revision refs/convert/parquet; otherwise {INSTEAD}"
        elif "Config name is missing" in str(error):
            configs = [line.strip(" -") for line in str(error).splitlines() if "available" in line]
            advice = f"choose one with --dataset-config ({' '.join(configs)})"
        raise DataError(f"{name} cannot be read from the Hub ({corpus.hub_id}: {first_line(error)}): {advice}") from error


def _text_column(hub_id: str, rows: Any) -> str:
    """Returns "text" if the data set has that column, else its only column of strings; raises a DataError otherwise."""
    try:
        features = rows.features or rows._resolve_features().features
    except source_errors() as error:
        raise DataError(f"{hub_id} cannot be read from the Hub ({first_line(error)}): {INSTEAD}") from error
    columns = [name for name, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")]
    if "text" in columns:
        return "text"
    if len(columns) == 1:
        return columns[0]
    raise DataError(
        f"{hub_id} has no column 'text' (columns: {', '.join(map(repr, features))}): choose one with --text-column"
    )


def hold_out_first(whole: Documents, names: Mapping[str, str], missing: Sequence[str]) -> dict[str, Documents]:
    """Returns the `missing` splits, held out of the first documents, and as "train" the rest. Empty if no split is missing.

    Raises:
        DataError: there are too few documents, they cannot be read, or the text of a split has no visible character.
    """
    if not missing:
        return {}
    reader = whole.read()
    marks: list[Position] = [reader.position()]
    visible = set()  # the documents with a visible character, by number
    while len(marks) <= HELD_OUT_OF and (piece := next(reader, None)):
        if is_visible(piece.text):
            visible.add(len(marks) - 1)
        if piece.ends:
            marks.append(reader.position())
    share = max(1, (len(marks) - 1) // HELD_OUT)
    if len(marks) - 1 <= share * len(missing):
        raise DataError(
            f"{whole.name} has {len(marks) - 1} rows, too few to hold out text for {' and '.join(missing)}: {INSTEAD}"
        )
    for number, split in enumerate(missing):
        if visible.isdisjoint(range(number * share, (number + 1) * share)):
            raise DataError(f"{names[split]}, held out of the first rows, has no visible character: {INSTEAD}")
    splits: dict[str, Documents] = {
        split: PartOfDocuments(names[split], whole, start=marks[number * share], count=share, small=True)
        for number, split in enumerate(missing)
    }
    start = marks[share * len(missing)]
    return splits | {"train": PartOfDocuments(whole.name, whole, start=start, count=None, small=whole.small)}


def check_reachable(name: str) -> None:
    """Raises a DataError if the Hub does not answer; `datasets` itself would wait for minutes.

    Raises:
        DataError: the Hub does not answer within `PREFLIGHT_SECONDS`, or HF_HUB_OFFLINE is set.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    failure = [f"no answer within {PREFLIGHT_SECONDS:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=PREFLIGHT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # Any HTTP status shows that the Hub answers.
        except (OSError, ValueError) as error:
            failure[:] = [first_line(error)]
            return
        failure.clear()

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise DataError(f"{name} needs the Hub, but HF_HUB_OFFLINE is set: unset it, {INSTEAD}")
    # A thread, because the timeout covers neither name resolution nor a server that answers byte by byte.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PREFLIGHT_SECONDS)
    if failure:
        raise DataError(
            f"{name} needs the Hub, but {endpoint} cannot be reached ({failure[0]}): check the network, {INSTEAD}"
        )
