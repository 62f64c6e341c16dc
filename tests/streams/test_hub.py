"""Text from the Hub: the real `datasets` code against a hub on the loopback interface.

`datasets` reads HF_ENDPOINT when it is imported, so each hub is read by an interpreter of its own.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dni_seq.streams import DataError, known_datasets, open_corpus
from dni_seq.streams import hub as hub_module
from tests.paths import SCRIPTS
from tests.streams import hub_server as hub

READ = """
import json, sys
from dni_seq.streams import DataError, WindowStream, open_corpus, train_tokenizer

def read(name):
    corpus = open_corpus(name, data_dir="no such directory")
    splits = {split: list(getattr(corpus, split)) for split in ("train", "valid", "test")}
    stream = WindowStream(corpus.train, train_tokenizer(corpus.level, corpus.train), lanes=2, bptt=4)
    reader = corpus.train.read()
    next(reader)
    again = [piece.text for piece in corpus.train.read(json.loads(json.dumps(reader.position())))]
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
    assert "1 rows, too few to hold out text for valid and test" in results["tinyshakespeare"]["error"]


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
    assert results["ptb"]["error"] == (
        "ptb/train: the row \"{'sentence': None}\" has no text in column 'sentence', but null: use --null-text skip to skip "
        "such rows, or choose another column with --text-column"
    )
    assert results["wikitext-2"]["error"].startswith("wikitext-2/valid: the row ")
    assert results["wikitext-2"]["error"].endswith("has no column 'text' (columns: 'line'): choose one with --text-column")
    assert results["tinyshakespeare"]["error"].startswith("tinyshakespeare")
    assert "\n" not in results["tinyshakespeare"]["error"]


def test_nulls_are_skipped_on_request_and_blank_held_out_text_is_refused(tmp_path: Path) -> None:
    rows = [f"text {i}" for i in range(100)]
    gaps = {"train.parquet": hub.parquet("text", [None, *rows[:3], None, None, *rows[3:], None])}
    blank = {f"{split}.parquet": hub.parquet("text", rows if split == "train" else ["", " \n"]) for split in SPLITS}
    repositories: hub.Repositories = {
        "any/gaps": {"main": gaps},
        "any/blank": {"main": blank},
        "any/begin": {"main": {"train.parquet": hub.parquet("text", [""] * 5 + rows)}},
    }
    named, skipped, empty, begin = attempt(
        repositories,
        tmp_path,
        [
            {"name": "any/gaps"},
            {"name": "any/gaps", "null_text": "skip"},
            {"name": "any/blank"},
            {"name": "any/begin"},
        ],
    )
    assert "has no text in column 'text', but null: use --null-text skip" in named["error"]
    assert [*skipped["valid"], *skipped["test"], *skipped["texts"]] == [row + "\n" for row in rows]
    assert "any/blank/valid has no visible character" in empty["error"]
    assert "any/begin/valid, held out of the first rows, has no visible character" in begin["error"]


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


OPEN = """
import json, sys, time
from dni_seq.streams import DataError, known_datasets, open_corpus

real = time.sleep
time.sleep = lambda seconds: real(min(seconds, 0.01))  # the pauses between attempts, minutes in all

def attempt(task):
    options = {"data_dir": "no such directory"} | task
    position, name = options.pop("position", None), options.pop("name")
    texts, result = [], {}
    try:
        corpus = open_corpus(name, **options)
        reader = corpus.train.read(position)
        result = {"valid": list(corpus.valid), "test": list(corpus.test), "level": corpus.level}
        for piece in reader:
            texts.append(piece.text)
    except DataError as error:
        result["error"] = str(error)
    try:
        result["position"] = reader.position()
    except NameError:
        pass
    return result | {"texts": texts}

print(json.dumps([attempt(task) for task in json.loads(sys.argv[1])]))
"""

SHARDS = [[f"shard {shard} row {row}" for row in range(100)] for shard in range(3)]
ROWS = [text + "\n" for shard in SHARDS for text in shard]


def attempt(repositories: hub.Repositories, home: Path, tasks: list[dict], faults: hub.Faults | None = None) -> list[dict]:
    """What a new interpreter makes of tasks, options of `open_corpus`, at a hub with faults."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with hub.serve(repositories, faults) as endpoint:
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", OPEN, json.dumps(tasks)],
            env={**kept, **settings, "HF_UPDATE_DOWNLOAD_COUNTS": "0"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sharded(name: str) -> dict[str, bytes]:
    """Three files of training rows, and other splits under other names."""
    shards = {f"{name}/train-{i}.parquet": hub.parquet("text", rows) for i, rows in enumerate(SHARDS)}
    others = {f"{name}/{split}-0.parquet": hub.parquet("text", [split]) for split in ("validation", "test")}
    card = "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("train", "validation", "test"))
    return {"README.md": f"---\nconfigs:\n- config_name: default\n  data_files:\n{card}---\n".encode(), **shards, **others}


def test_a_link_that_dies_in_mid_stream_is_resumed_at_the_exact_row(tmp_path: Path) -> None:
    """Every kind of fault, twice in a row in the second of three files; the last one for ever, then healed."""
    kinds = ["closes", "hangs", "short", "429", "503"]
    repositories = {f"faulty/{kind}": {"main": sharded(kind)} for kind in [*kinds, "dead"]}
    faults: hub.Faults = {f"{kind}/train-1.parquet": [kind] * 2 for kind in kinds}
    faults["dead/train-1.parquet"] = ["503*"]
    results = attempt(repositories, tmp_path, [{"name": name} for name in repositories], faults)
    for result in results[:-1]:
        assert result["texts"] == ROWS
        assert (result["valid"], result["test"]) == (["validation\n"], ["test\n"])
        assert "error" not in result
    dead = results[-1]
    assert dead["texts"] == ROWS[:100]
    assert dead["error"].startswith("faulty/dead/train: reading failed 6 times: ")
    assert "503" in dead["error"]
    assert "\n" not in dead["error"]
    (healed,) = attempt(repositories, tmp_path, [{"name": "faulty/dead", "position": dead["position"]}])
    assert healed["texts"] == ROWS[100:]


def test_any_repository_by_its_id(tmp_path: Path) -> None:
    rows = [f"text {i}" for i in range(100)]
    table = {"train.parquet": hub.parquet("body", rows)}
    configs = {**wikitext("text")}
    empty = {**sharded("empty"), **{f"empty/train-{i}.parquet": hub.parquet("text", []) for i in range(3)}}
    repositories: hub.Repositories = {
        "any/one": {"main": table},
        "any/two": {"main": {"train.parquet": hub.parquet("text", rows[:2])}},
        "any/empty": {"main": empty},
        "any/test-alone": {"main": {"data/test-0.parquet": hub.parquet("text", rows)}},
        WIKITEXT: {"main": configs},
        PTB: {"main": PTB_SCRIPT, "refs/convert/parquet": PTB_PARQUET},
        "HuggingFaceFW/fineweb": {
            "main": {"sample/10BT/0.parquet": hub.parquet("text", rows)}
            | {
                "README.md": b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
                b"  - split: train\n    path: sample/10BT/*\n---\n"
            }
        },
    }
    one, other, two, empty_, alone, wiki, unnamed, script, revision, absent, fine = attempt(
        repositories,
        tmp_path,
        [
            {"name": "any/one"},
            {"name": "any/one", "text_column": "title"},
            {"name": "any/two"},
            {"name": "any/empty"},
            {"name": "any/test-alone"},
            {"name": WIKITEXT, "config": "wikitext-2-v1"},
            {"name": WIKITEXT},
            {"name": PTB},
            {"name": PTB, "revision": "refs/convert/parquet", "text_column": "sentence"},
            {"name": "any/none"},
            {"name": "fineweb"},
        ],
    )
    lines = [row + "\n" for row in rows]
    # The first documents are held out, one twentieth of those looked at for each split.
    for held_out in (one, fine):
        assert (held_out["valid"], held_out["test"], held_out["texts"]) == (lines[:5], lines[5:10], lines[10:])
    assert one["level"] == "sentencepiece"
    assert "no column 'title' (columns: 'body')" in other["error"]
    assert "2 rows, too few to hold out" in two["error"]
    assert empty_["texts"] == []
    assert "no split train (splits: test)" in alone["error"]
    assert wiki["texts"] == ["\n", " = Title = \n", "\n", " Some text . \n"]
    assert "--dataset-config" in unnamed["error"]
    assert "wikitext-2-v1" in unnamed["error"]
    assert "--dataset-revision refs/convert/parquet" in script["error"]
    assert revision["texts"] == [sentence + "\n" for sentence in SENTENCES]
    assert "any/none cannot be read from the Hub" in absent["error"]


def test_every_name_of_the_table_streams(tmp_path: Path) -> None:
    """Repositories with the configuration, revision and column of each row of it; enwik8, a file, is below."""
    texts = {split: [f"{split} text {i}" for i in range(60)] for split in SPLITS}
    names = [name for name in hub_module.CORPORA if name != "enwik8"]
    repositories: dict[str, dict[str, dict[str, bytes]]] = {}
    for corpus in (hub_module.CORPORA[name] for name in names):
        files = repositories.setdefault(corpus.hub_id, {}).setdefault(
            corpus.revision or "main", {"README.md": b"---\nconfigs:\n"}
        )
        config = corpus.config or "default"
        files["README.md"] += f"- config_name: {config}\n  data_files:\n".encode()
        for split, rows in texts.items():
            path = f"{config}/{split}.parquet"
            content = hub.parquet(str(corpus.column), rows)
            if corpus.hub_id == "allenai/c4":
                path = f"{config}/{split}.json.gz"
                content = gzip.compress("".join(json.dumps({"url": "", "text": row}) + "\n" for row in rows).encode())
            files["README.md"] += f"  - split: {split}\n    path: {path}\n".encode()
            files[path] = content
    for revisions in repositories.values():
        for files in revisions.values():
            files["README.md"] += b"---\n"
    results = attempt(repositories, tmp_path, [{"name": name} for name in names])
    for name, result in zip(names, results, strict=True):
        assert "error" not in result, (name, result)
        found = {"train": result["texts"], "validation": result["valid"], "test": result["test"]}
        assert found == {split: [row + "\n" for row in rows] for split, rows in texts.items()}, name
        assert result["level"] == hub_module.CORPORA[name].level
    design = "ptb, wikitext-2, wikitext-103, text8, enwik8, tinyshakespeare, pg19, fineweb, c4, pydoc"
    assert known_datasets() == design.split(", ")


def test_enwik8_is_split_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of the Hub, and as a local one; the borders are in the middle of lines."""
    text = "".join(f"line {i} é\n" for i in range(1000))
    borders = {"train": (0, 9_000), "valid": (9_000, 9_500), "test": (9_500, 10_000)}
    wanted = {split: text.encode()[start:stop].decode("utf-8", "ignore") for split, (start, stop) in borders.items()}
    monkeypatch.setattr(hub_module, "TEXT8_SPLITS", borders)
    (tmp_path / "enwik8").mkdir()
    (tmp_path / "enwik8" / "enwik8.gz").write_bytes(gzip.compress(text.encode()))
    corpus = open_corpus("enwik8", data_dir=tmp_path)
    for split, expected in wanted.items():
        documents = getattr(corpus, split)
        assert "".join(documents) == expected.removesuffix("\n") + "\n"
        pieces, reader = list(documents.read()), documents.read()
        for index in range(len(pieces)):
            assert list(documents.read(json.loads(json.dumps(reader.position())))) == pieces[index:]
            next(reader)
    assert (corpus.level, corpus.train.small, corpus.test.small) == ("char", False, True)
    code = OPEN.replace(
        "real = time.sleep", f"from dni_seq.streams import hub; hub.TEXT8_SPLITS = {borders}; real = time.sleep"
    )
    monkeypatch.setattr(sys.modules[__name__], "OPEN", code)
    repositories: hub.Repositories = {"LTCB/enwik8": {"main": {"enwik8.gz": gzip.compress(text.encode())}}}
    (result,) = attempt(repositories, tmp_path / "home", [{"name": "enwik8"}])
    assert "error" not in result
    assert "".join(result["texts"]).strip() == wanted["train"].strip()
    assert "".join(result["test"]).strip() == wanted["test"].strip()


def test_a_run_whose_stream_dies_is_saved_and_resumes(tmp_path: Path) -> None:
    """The command itself: begins, loses the second file of three, and ends where a run that never lost it ends."""
    files = sharded("long")
    for shard in range(3):
        files[f"long/train-{shard}.parquet"] = hub.parquet(
            "text", [f"row {row} of shard {shard} " * 60 for row in range(150)]
        )
    for split in ("validation", "test"):
        files[f"long/{split}-0.parquet"] = hub.parquet("text", ["row and shard"] * 50)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, str(SCRIPTS / "train_lm.py")]
    options = ["--dataset", "any/long", "--tokenizer", "char", "--batch-size", "2", "--bptt", "600", "--synthesizer", "none"]
    options += ["--embed", "4", "--hidden", "4", "--layers", "1", "--dropout", "0"]

    def call(run: str, *arguments: str, faults: hub.Faults | None = None) -> subprocess.CompletedProcess[str]:
        with hub.serve({"any/long": {"main": files}}, faults) as endpoint:
            settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
            return subprocess.run(
                [*command, "--run-dir", str(tmp_path / run), *arguments],
                env={**kept, **settings, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )

    options = [*options, "--schedule", "constant"]
    whole = call("whole", *options, "--max-steps", "200")
    assert whole.returncode == 0, whole.stderr
    begun = call("dies", *options, "--max-steps", "1")
    assert begun.returncode == 0, begun.stderr
    died = call("dies", "--resume", "auto", "--max-steps", "200", faults={"long/train-1.parquet": ["403*"]})
    assert died.returncode == 2, died.stderr
    (line,) = [line for line in died.stderr.splitlines() if "error" in line]
    assert "any/long/train: reading failed" in line
    assert 10 < int(line.split("saved at step ")[1].split(";")[0]) < 190
    assert "--resume auto" in line
    resumed = call("dies", "--resume", "auto", "--max-steps", "200")
    assert resumed.returncode == 0, resumed.stderr
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "dies")]
    assert summaries[0]["steps"] == summaries[1]["steps"] == 200
    for split in ("valid", "test"):
        assert summaries[0][split] == summaries[1][split]
