"""Where text comes from: local files, the embedded corpus, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dni_seq.streams import DataError, Documents, open_corpus, train_tokenizer
from dni_seq.streams.embedded_corpus import distinct_topics
from dni_seq.streams.formats import CHUNK
from dni_seq.streams.lanes import HeldLanes

PTB = {"train": " one two <unk> \n three \n", "valid": " four \n", "test": " five \n six \n"}


def write_ptb(directory: Path, texts: dict[str, str] = PTB) -> Path:
    """Files laid out as PTB's."""
    (directory / "ptb").mkdir(parents=True)
    for split, text in texts.items():
        (directory / "ptb" / f"ptb.{split}.txt").write_text(text, encoding="utf-8")
    return directory


def write(path: Path, text: str | bytes) -> Path:
    """A file with these bytes, newlines as they are."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_importing_streams_imports_no_datasets() -> None:
    code = "import sys, dni_seq.streams; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ptb_is_read_from_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody there: a look at the network would fail
    corpus = open_corpus("ptb", data_dir=write_ptb(tmp_path))
    assert (corpus.name, corpus.level) == ("ptb", "word")
    assert list(corpus.train) == ["one two <unk>\n", "three\n"]
    assert list(corpus.valid) == ["four\n"]
    assert list(corpus.test) == ["five\n", "six\n"]
    assert corpus.train.small
    monkeypatch.setenv("DNI_SEQ_DATA", str(tmp_path))
    assert list(open_corpus("ptb").train) == list(corpus.train)


def test_a_missing_local_split_is_named(tmp_path: Path) -> None:
    write_ptb(tmp_path, {"train": "a\n", "test": "b\n"})
    with pytest.raises(DataError, match=r"no such file: .*ptb\.valid\.txt"):
        open_corpus("ptb", data_dir=tmp_path)


def test_own_files_are_kept_as_they_are(tmp_path: Path) -> None:
    # Brackets and stars are patterns to `datasets`, U+2028 and \x0b are line ends to str.splitlines.
    text = "  def f():\r\n\n\treturn\u2028 1\x0b\n\x00 é\U0001f600\nlast"
    paths = [write(tmp_path / f"my [{name}]*.txt", text) for name in "abc"]
    corpus = open_corpus(data_file=paths[0], valid_file=paths[1], test_file=paths[2])
    for documents in (corpus.train, corpus.valid, corpus.test):
        assert "".join(documents) == text.replace("\r\n", "\n") + "\n"
    assert (corpus.name, corpus.level) == (str(paths[0]), "char")


@pytest.mark.parametrize("given", [(), ("valid",), ("test",)])
@pytest.mark.parametrize("lines", [3, 19, 40, 101])
def test_missing_splits_are_held_out_at_the_end(lines: int, given: tuple[str, ...], tmp_path: Path) -> None:
    text = [f"line {i}\n" for i in range(lines)]
    own = {f"{split}_file": write(tmp_path / split, f"{split}\n") for split in given}
    corpus = open_corpus(data_file=write(tmp_path / "own.txt", "".join(text)), **own)
    share = max(1, lines // 20)
    splits = {split: list(getattr(corpus, split)) for split in ("train", "valid", "test")}
    for split in given:
        assert splits.pop(split) == [f"{split}\n"]
    assert [line for split in splits.values() for line in split] == text
    assert [len(part) for part in splits.values()][1:] == [share] * (len(splits) - 1)


def test_too_few_lines_to_hold_out_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "own.txt", "one line\nanother")
    with pytest.raises(DataError, match=r"2 documents.*--valid-file and --test-file"):
        open_corpus(data_file=path)
    assert list(open_corpus(data_file=path, valid_file=path).test) == ["another\n"]


@pytest.mark.parametrize("before", ["", "é" * 10, "x" * (CHUNK - 1), "é" * CHUNK, "x" * (2 * CHUNK - 2)])
@pytest.mark.parametrize("bad", [b"\xff\n", b"\xe2\x28\xa1", b"\xc3", b"\xe2\x82"])
def test_text_that_is_not_utf8_is_named_with_the_byte(before: str, bad: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "own.txt", before.encode() + bad)
    with pytest.raises(DataError, match=rf"own\.txt is not UTF-8 at byte {len(before.encode())}:"):
        open_corpus(data_file=path)


@pytest.mark.parametrize("role", ["data_file", "valid_file", "test_file"])
def test_unusable_files_are_named(role: str, tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", "a\n" * 100)
    empty = write(tmp_path / "empty.txt", "")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    cases = {tmp_path / "absent.txt": "no such file", tmp_path: "a directory", empty: "empty", pipe: "regular file"}
    for path, complaint in cases.items():
        with pytest.raises(DataError, match=complaint) as caught:
            open_corpus(**{"data_file": good, role: path})
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ptbb", "did you mean ptb?"), ("PTB", "did you mean ptb?"), ("wikitext", "did you mean wikitext-2?"), ("", "'': use")],
)
def test_an_unknown_data_set_lists_the_known_ones(name: str, hint: str) -> None:
    with pytest.raises(DataError, match=r"use one of ptb, .*pydoc, or OWNER/NAME on the Hub") as caught:
        open_corpus(name)
    assert hint in str(caught.value)


def test_options_that_contradict_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "own.txt", "a\n" * 100)
    with pytest.raises(DataError, match="exclude each other"):
        open_corpus("ptb", data_file=path)
    with pytest.raises(DataError, match="cannot be used with --data-file"):
        open_corpus(data_file=path, revision="main")
    with pytest.raises(DataError, match="give --data-file too"):
        open_corpus(valid_file=path)
    with pytest.raises(DataError, match="cannot be used with the embedded corpus pydoc"):
        open_corpus(text_column="title")


def test_a_file_that_goes_away_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "own.txt", "a\n" * 100)
    corpus = open_corpus(data_file=path)
    path.unlink()
    with pytest.raises(DataError, match=r"own\.txt: reading failed"):
        list(corpus.train)


def everything(documents: Documents) -> list[str]:
    texts = list(documents)
    assert len(texts) > 4  # else the positions below are not different ones
    return texts


@pytest.mark.parametrize("source", ["embedded", "file", "held out"])
def test_reading_resumes_at_any_position(source: str, tmp_path: Path) -> None:
    if source == "embedded":
        documents = open_corpus().train
    else:
        corpus = open_corpus(data_file=write(tmp_path / "own.txt", "".join(f"{i}\n" for i in range(120))))
        documents = corpus.train if source == "file" else corpus.valid
    texts = everything(documents)
    reader = documents.read()
    for count in range(len(texts) + 1):
        position = json.loads(json.dumps(reader.position()))
        again = documents.read(position)
        assert again.position() == position
        assert [piece.text for piece in again] == texts[count:]
        # A second resume, from a reader that was itself resumed.
        second = documents.read(position)
        assert next(second, None) == next(reader, None)
        assert [piece.text for piece in documents.read(second.position())] == texts[count + 1 :]


def test_readers_do_not_disturb_each_other(tmp_path: Path) -> None:
    documents = open_corpus(data_file=write(tmp_path / "own.txt", "".join(f"{i}\n" for i in range(40)))).train
    first, second = documents.read(), documents.read()
    pairs = [(next(first), next(second)) for _ in range(3)]
    assert [(mine.text, yours.text) for mine, yours in pairs] == [(f"{i}\n", f"{i}\n") for i in range(3)]
    next(first)
    assert next(documents.read(second.position())).text == "3\n"


def test_the_embedded_corpus_is_english_in_three_disjoint_splits() -> None:
    corpus = open_corpus()
    assert (corpus.name, corpus.level) == ("pydoc", "char")
    splits = [list(corpus.train), list(corpus.valid), list(corpus.test)]
    assert splits == [list(documents) for documents in (open_corpus("pydoc").train, corpus.valid, corpus.test)]
    total = sum(len(text) for split in splits for text in split)
    assert total > 200_000
    assert all(0.02 * total < sum(map(len, split)) < 0.12 * total for split in splits[1:])
    paragraphs = [{part.strip() for text in split for part in text.split("\n\n") if len(part) > 80} for split in splits]
    for held_out in paragraphs[1:]:
        assert len(held_out & paragraphs[0]) <= 0.05 * len(held_out)
    words = "".join(splits[0]).split()
    assert words.count("the") > len(words) / 50


def test_topics_that_repeat_longer_ones_are_skipped() -> None:
    part, other = "a passage of the long topic " * 3, "something else entirely, as long as that " * 3
    topics = {"short": part, "long": f"{other}\n\n{part}\n\nand more", "own": other[::-1]}
    assert distinct_topics(topics) == [topics["long"], topics["own"]]


def test_ptb_has_the_counts_that_papers_report() -> None:
    directory = os.environ.get("DNI_SEQ_DATA")
    if not directory or not (Path(directory) / "ptb").is_dir():
        pytest.skip("PTB's licence keeps it out of the project: set DNI_SEQ_DATA to a directory that holds ptb/")
    corpus = open_corpus("ptb", data_dir=directory)
    splits = (corpus.train, corpus.valid, corpus.test)
    words, characters = (train_tokenizer(kind, corpus.train) for kind in ("word", "char"))
    assert words.vocabulary_size == 10_000
    tallies = [HeldLanes(documents, words, 20).stats for documents in splits]
    assert [stats.tokens for stats in tallies] == [929_589, 73_760, 82_430]
    assert [stats.unknown for stats in tallies] == [0, 0, 0]
    letters = [HeldLanes(documents, characters, 20).stats for documents in splits]
    assert [stats.tokens for stats in letters] == [stats.characters for stats in tallies]
    assert characters.vocabulary_size == 51  # 50 characters and the unknown one
