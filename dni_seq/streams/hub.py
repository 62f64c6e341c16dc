"""Text on the Hugging Face Hub, streamed through `datasets`.

The table of known corpora is here. A corpus found as `DIR/NAME/NAME.{train,valid,test}.txt` is read from there instead.
"""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dni_seq.streams.documents import (
    DataError,
    StreamedDocuments,
    as_it_is,
    first_line,
    source_errors,
    stripped_line,
)
from dni_seq.streams.files import count_lines, load_lines

SPLITS = MappingProxyType({"train": "train", "valid": "validation", "test": "test"})
"""Our names of the splits, and the Hub's."""

PREFLIGHT_SECONDS = 5.0
"""How long the Hub may take to answer at all."""

INSTEAD = "put the files in --data-dir, give --data-file, or leave --dataset out for the embedded corpus"


@dataclass(frozen=True)
class HubCorpus:
    """One row of the table.

    Attributes:
        hub_id: the repository, "owner/name".
        config: the configuration's name, or None where there is one alone.
        revision: the branch, or None for the main one.
        level: the tokenizer that suits the text, "word" or "char".
        render: makes a document of a row's text.
        small: whether its token ids may be held in memory.
        column: the column that holds the text.
    """

    hub_id: str
    config: str | None
    revision: str | None
    level: str
    render: Callable[[str], str]
    small: bool = True
    column: str = "text"


CORPORA: Mapping[str, HubCorpus] = MappingProxyType(
    {
        # PTB's files have a blank around each line, its Hub rows have none: stripped, both are the same text.
        "ptb": HubCorpus(
            "ptb-text-only/ptb_text_only",
            None,
            "refs/convert/parquet",
            "word",
            stripped_line,
            column="sentence",
        ),
        "wikitext-2": HubCorpus("Salesforce/wikitext", "wikitext-2-v1", None, "word", as_it_is),
        "tinyshakespeare": HubCorpus("karpathy/tiny_shakespeare", None, "refs/convert/parquet", "char", as_it_is),
    }
)


def load_corpus(name: str, data_dir: Path) -> dict[str, StreamedDocuments]:
    """The splits of the table's corpus `name`, from `data_dir` where they are there, else from the Hub.

    Raises:
        DataError: local files cannot be used, or the Hub cannot be reached or does not have the corpus.
    """
    corpus = CORPORA[name]
    paths = {split: data_dir / name / f"{name}.{split}.txt" for split in SPLITS}
    names = {split: f"{name}/{split}" for split in SPLITS}
    if any(path.exists() for path in paths.values()):
        for path in paths.values():
            count_lines(path)
        return load_lines(paths, corpus.render, names)
    return load_from_hub(name, corpus, names)


def load_from_hub(name: str, corpus: HubCorpus, names: Mapping[str, str]) -> dict[str, StreamedDocuments]:
    """The splits of `corpus`, streamed.

    Raises:
        DataError: the Hub cannot be reached, or does not have the corpus in this form.
    """
    check_reachable(name)
    import datasets

    errors: tuple[type[Exception], ...] = (*source_errors(), RuntimeError)
    try:
        loaded = datasets.load_dataset(corpus.hub_id, corpus.config, revision=corpus.revision, streaming=True)
    except errors as error:
        raise DataError(f"{name} cannot be read from the Hub ({corpus.hub_id}: {first_line(error)}): {INSTEAD}") from error
    absent = [split for split in SPLITS.values() if split not in loaded]
    if absent:
        raise DataError(f"{corpus.hub_id} on the Hub has no split {', '.join(absent)}: {INSTEAD}")
    return {
        split: StreamedDocuments(
            names[split], loaded[theirs], column=corpus.column, render=corpus.render, small=corpus.small
        )
        for split, theirs in SPLITS.items()
    }


def check_reachable(name: str) -> None:
    """Ask the Hub for a sign of life, because `datasets` waits for minutes where there is none.

    Raises:
        DataError: no answer within `PREFLIGHT_SECONDS`, or the Hub is switched off by HF_HUB_OFFLINE.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    failure = [f"no answer within {PREFLIGHT_SECONDS:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=PREFLIGHT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # Any status at all is a sign of life.
        except (OSError, ValueError) as error:
            failure[:] = [first_line(error)]
            return
        failure.clear()

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise DataError(f"{name} is on the Hub and HF_HUB_OFFLINE is set: {INSTEAD}")
    # A thread, because the timeout covers neither name resolution nor a server that answers byte by byte.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PREFLIGHT_SECONDS)
    if failure:
        raise DataError(f"{name} is not here and the Hub at {endpoint} cannot be reached ({failure[0]}): {INSTEAD}")
