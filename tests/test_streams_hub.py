"""Text from the Hub: the real `datasets` code against a hub on the loopback interface.

`datasets` reads HF_ENDPOINT when it is imported, so each hub is read by an interpreter of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dni_seq.streams import DataError, open_corpus
from tests import hub

READ = """
import json, sys
from dni_seq.streams import DataError, WindowStream, open_corpus, train_tokenizer

def read(name):
    corpus = open_corpus(name, data_dir="no such directory")
    splits = {split: list(getattr(corpus, split)) for split in ("train", "valid", "test")}
    stream = WindowStream(corpus.train, train_tokenizer(corpus.level, corpus.train), lanes=2, bptt=4)
    reader = corpus.train.read()
    next(reader)
    again = list(corpus.train.read(json.loads(json.dumps(reader.position()))))
    return {"splits": splits, "again": again, "level": corpus.level, "tokens": stream.tokens_per_epoch}

def attempt(name):
    try:
        return read(name)
    except DataError as error:
        return {"error": str(error)}

print(json.dumps({name: attempt(name) for name in ("ptb", "wikitext-2", "tinyshakespeare")}))
"""

PTB, WIKITEXT, SHAKESPEARE = "ptb-text-only/ptb_text_only", "Salesforce/wikitext", "karpathy/tiny_shakespeare"
ESCAPES = ("--data-dir", "--data-file", "embedded")

SENTENCES = [f"sentence {i} of <unk>" for i in range(25)]
PTB_SCRIPT = {"ptb_text_only.py": b"# a script", "README.md": b"---\n---\n"}
PTB_PARQUET = {
    f"penn_treebank/{split}/0000.parquet": hub.parquet("sentence", SENTENCES[:rows])
    for split, rows in (("train", 25), ("validation", 7), ("test", 5))
}
ARTICLE = ["", " = Title = \n", "", " Some text . \n"]
PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
SPLITS = ("train", "validation", "test")


def wikitext(column: str) -> dict[str, bytes]:
    """Two configurations, of which the card names the wrong one first."""
    files, card = {}, ""
    for config, rows in (("wikitext-103-v1", ["wrong"]), ("wikitext-2-v1", ARTICLE)):
        card += f"- config_name: {config}\n  data_files:\n"
        for split in SPLITS:
            card += f"  - split: {split}\n    path: {config}/{split}-*\n"
            files[f"{config}/{split}-00000-of-00001.parquet"] = hub.parquet(column, rows)
    return {"README.md": f"---\nconfigs:\n{card}---\n".encode(), **files}


def shakespeare(content: bytes) -> dict[str, bytes]:
    """The same file for each split."""
    return {f"default/{split}/0000.parquet": content for split in SPLITS}


def read(repositories: hub.Repositories, home: Path) -> dict[str, dict]:
    """What a new interpreter reads from a hub of `repositories`, by corpus."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with hub.serve(repositories) as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", READ],
            env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_corpora_stream_from_the_hub(tmp_path: Path) -> None:
    results = read(
        {
            PTB: {"main": PTB_SCRIPT, "refs/convert/parquet": PTB_PARQUET},
            WIKITEXT: {"main": wikitext("text")},
            SHAKESPEARE: {"refs/convert/parquet": shakespeare(hub.parquet("text", [PLAY, PLAY]))},
        },
        tmp_path,
    )
    lines = [sentence + "\n" for sentence in SENTENCES]
    ptb = results["ptb"]
    assert ptb["splits"] == {"train": lines, "valid": lines[:7], "test": lines[:5]}
    assert ptb["again"] == lines[1:]
    assert ptb["level"] == "word"
    assert ptb["tokens"] == (25 * 5 // 2 - 1) * 2  # four words and <eos> a line, two lanes
    assert results["wikitext-2"]["splits"]["valid"] == ["\n", " = Title = \n", "\n", " Some text . \n"]
    assert results["tinyshakespeare"]["splits"]["test"] == [PLAY, PLAY]
    assert results["tinyshakespeare"]["level"] == "char"


def test_what_the_hub_lacks_is_one_line(tmp_path: Path) -> None:
    results = read(
        {
            PTB: {"main": PTB_SCRIPT},  # the script alone, which `datasets` no longer runs
            SHAKESPEARE: {
                "refs/convert/parquet": {"default/train/0000.parquet": hub.parquet("text", [PLAY])},
            },
        },
        tmp_path,
    )
    for name, result in results.items():
        assert name in result["error"] or SHAKESPEARE in result["error"]
        assert "\n" not in result["error"]
        assert all(escape in result["error"] for escape in ESCAPES)
    assert "no split validation, test" in results["tinyshakespeare"]["error"]


def test_rows_that_hold_no_text_are_one_line(tmp_path: Path) -> None:
    gaps = {path: hub.parquet("sentence", ["text", None]) for path in PTB_PARQUET}
    results = read(
        {
            PTB: {"refs/convert/parquet": gaps},
            WIKITEXT: {"main": wikitext("line")},
            SHAKESPEARE: {"refs/convert/parquet": shakespeare(b"not parquet at all")},
        },
        tmp_path,
    )
    assert results["ptb"]["error"] == "ptb/train: a row has no text in column 'sentence'"
    assert results["wikitext-2"]["error"] == "wikitext-2/train: a row has no text in column 'text'"
    assert results["tinyshakespeare"]["error"].startswith("tinyshakespeare")
    assert "\n" not in results["tinyshakespeare"]["error"]


@pytest.mark.parametrize("where", ["refuses", "hangs", "drips", "has no name", "is nonsense"])
def test_no_network_is_one_line_within_ten_seconds(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub.hanging() as silent, hub.dripping() as slow:
        endpoints = {"refuses": hub.refusing(), "hangs": silent, "drips": slow, "has no name": "http://host.invalid"}
        monkeypatch.setenv("HF_ENDPOINT", endpoints.get(where, "nonsense"))
        started = time.monotonic()
        with pytest.raises(DataError) as caught:
            open_corpus("ptb", data_dir="no such directory")
        seconds = time.monotonic() - started
    assert "\n" not in str(caught.value)
    assert all(escape in str(caught.value) for escape in ESCAPES)
    assert seconds < 8  # which leaves the script two to start


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        open_corpus("ptb", data_dir="no such directory")
