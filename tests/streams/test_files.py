"""Which files a name means, what is held out of them, blank text, and rows without text."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dni_seq.core.paths import expand_home
from dni_seq.streams import CharTokenizer, DataError, Documents, WindowStream, files, formats, held_out, open_corpus
from dni_seq.streams.files import FileDocuments, matching
from dni_seq.streams.formats import FileFormat

LINES = [f"line {i} of the text\n" for i in range(100)]
TEXT = "".join(LINES)


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")
    return path


def whole(documents: Documents) -> str:
    return "".join(documents)


# Names.


def test_folders_that_exist_are_no_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = [write(tmp_path / "[set] a*" / "deep?" / f"{name}.txt", TEXT) for name in "ba"]
    write(tmp_path / "s" / "deep?" / "c.txt", TEXT)  # what the first folder's name matches as a pattern
    for pattern in ("[set] a*/**/*.txt", "[set] a*/deep?/*.txt", "[set] a*/deep?/[ab].txt"):
        assert matching(tmp_path / pattern) == sorted(inside)
    monkeypatch.chdir(tmp_path)
    assert matching("[set] a*/deep?/*.txt") == [path.relative_to(tmp_path) for path in sorted(inside)]
    assert matching("s*/deep?/*.txt") == [Path("s/deep?/c.txt")]
    with pytest.raises(DataError, match=r"no such file: .*\[set\] a\*/\*\.md"):
        matching(tmp_path / "[set] a*" / "*.md")


def test_a_tilde_is_the_home_directory_unless_a_file_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "home" / "corpus" / "a.txt", TEXT)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(write(tmp_path / "here" / "b.txt", TEXT).parent)
    assert matching("~/corpus/*.txt") == matching("~/corpus/a.txt") == [path]
    assert expand_home("a~/~") == Path("a~/~")
    assert expand_home("~no user of this name/a") == Path("~no user of this name/a")
    own = write(Path("~") / "corpus" / "own.txt", TEXT)
    assert matching("~/corpus/*.txt") == [own]
    write(tmp_path / "home" / "data" / "ptb" / "ptb.train.txt", TEXT)
    for split in ("valid", "test"):
        write(tmp_path / "home" / "data" / "ptb" / f"ptb.{split}.txt", TEXT)
    own.unlink()
    own.parent.rmdir()
    Path("~").rmdir()
    assert whole(open_corpus("ptb", data_dir="~/data").train) == TEXT
    monkeypatch.setenv("DNI_SEQ_DATA", "~/data")
    assert whole(open_corpus("ptb").train) == TEXT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "closed" / "a.txt", TEXT)
    path.chmod(0)
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(Permission denied\): make it readable"):
        open_corpus(data_file=path)
    path.parent.chmod(0)
    try:
        for name in (path, path.parent / "*.txt"):
            with pytest.raises(DataError, match=r"cannot be read \(Permission denied\): make it readable"):
                open_corpus(data_file=name)
    finally:
        path.parent.chmod(0o700)


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_corpus(data_file=tmp_path / ("a" * 5000))


# Held-out text.


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("given", [(), ("valid",), ("test",)])
def test_a_text_of_one_line_is_split_by_characters(
    given: tuple[str, ...], kind: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The borders are exact, whatever the pieces; any position leads on to the same text."""
    monkeypatch.setattr(formats, "CHUNK", 50)
    monkeypatch.setattr(held_out, "MARKS", 8)
    if streamed:
        monkeypatch.setattr(files, "IN_MEMORY_BYTES", 0)
    text = "".join(f"é{i} words " for i in range(400))
    path = write(tmp_path / f"a.{kind}", text if kind == "txt" else json.dumps({"text": text}))
    own = {f"{split}_file": write(tmp_path / f"{split}.txt", TEXT) for split in given}
    corpus = open_corpus(data_file=path, **own)
    share = (len(text) + 1) // 20
    splits = {split: getattr(corpus, split) for split in ("train", "valid", "test") if split not in given}
    missing = list(splits)[1:]
    borders = [0, *(len(text) + 1 - share * number for number in range(len(missing), 0, -1)), len(text) + 1]
    for number, (split, documents) in enumerate(splits.items()):
        expected = (text + "\n")[borders[number] : borders[number + 1]].removesuffix("\n") + "\n"
        assert whole(documents) == expected, split
        assert documents.small is not streamed
        pieces, reader = list(documents.read()), documents.read()
        for index in range(len(pieces) + 1):
            position = json.loads(json.dumps(reader.position()))
            assert list(documents.read(position)) == pieces[index:]
            next(reader, None)
    held = ", ".join(f"{share:,} for {split}" for split in missing)
    assert corpus.notes == (f"{path} has 1 document (lines or rows), so characters at its end are held out: {held}",)


def test_two_long_lines_are_split_by_characters_and_three_by_lines(tmp_path: Path) -> None:
    two = open_corpus(data_file=write(tmp_path / "2.txt", "ab" * 500 + "\n" + "cd" * 500 + "\n"))
    assert [len(whole(split)) for split in (two.train, two.valid, two.test)] == [2002 - 200 + 1, 101, 100]
    assert len(two.notes) == 1
    three = open_corpus(data_file=write(tmp_path / "3.txt", "a" * 500 + "\nb\nc\n"))
    assert [whole(split) for split in (three.train, three.valid, three.test)] == ["a" * 500 + "\n", "b\n", "c\n"]
    assert three.notes == ()


def test_a_line_of_few_characters_is_too_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a" * 38)
    with pytest.raises(DataError, match=r"has 1 document .* and 39 characters, too few .*--valid-file and --test-file"):
        open_corpus(data_file=path)
    assert open_corpus(data_file=write(path, "a" * 39)).notes


@pytest.mark.parametrize("blank", ["\n" * 200, " \t\u2028\n" * 200, "\ufeff \u200b\n" * 200, ("\0" * 20 + "\n" * 80) * 3])
def test_blank_text_is_refused(blank: str, tmp_path: Path) -> None:
    """Its score would be a number without meaning."""
    path, empty = write(tmp_path / "a.txt", TEXT), write(tmp_path / "blank.txt", blank)
    end = write(tmp_path / "end.txt", TEXT + blank)
    with pytest.raises(DataError, match=r"end\.txt \(valid\) has no visible character.*remove blank text at the end"):
        open_corpus(data_file=end)
    with pytest.raises(DataError, match=r"end\.txt \(test\) has no visible character.*or give --test-file"):
        open_corpus(data_file=end, valid_file=path)
    assert whole(open_corpus(data_file=end, valid_file=path, test_file=path).train) == TEXT + blank
    for options in ({"data_file": empty}, {"data_file": path, "valid_file": empty}, {"data_file": path, "test_file": empty}):
        with pytest.raises(DataError, match=r"blank\.txt has no visible character.*: give a file with text"):
            open_corpus(**options)
    for split, text in {"train": TEXT, "valid": blank, "test": TEXT}.items():
        write(tmp_path / "ptb" / f"ptb.{split}.txt", text)
    with pytest.raises(DataError, match=r"ptb/valid has no visible character.*ptb\.valid\.txt with text"):
        open_corpus("ptb", data_dir=tmp_path)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
def test_a_mark_alone_is_no_text(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match="has no visible character"):
        open_corpus(data_file=path)


def test_a_pattern_that_includes_held_out_text_is_reported(tmp_path: Path) -> None:
    valid, other = write(tmp_path / "valid.txt", TEXT), write(tmp_path / "other" / "test.txt", TEXT)
    write(tmp_path / "train.txt", TEXT)
    corpus = open_corpus(data_file=tmp_path / "*.txt", valid_file=valid, test_file=other)
    (note,) = corpus.notes
    assert note.startswith(f"--valid-file: {valid} is training text too")
    assert open_corpus(data_file=valid, valid_file=other, test_file=other).notes == ()


def test_a_file_and_its_compressed_copy_are_reported(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", TEXT)
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    corpus = open_corpus(data_file=tmp_path / "*")
    assert corpus.notes == (f"{plain} and {packed} are both read: give a pattern that matches one of them",)
    assert open_corpus(data_file=packed).notes == ()


@pytest.mark.parametrize("name", ["part-00000", "a.jsonl.bak", "a.gz"])
def test_json_lines_by_another_name_are_reported(name: str, tmp_path: Path) -> None:
    path, rows = tmp_path / name, "".join(json.dumps({"text": line.strip()}) + "\n" for line in LINES)
    path.write_bytes(gzip.compress(rows.encode()) if name.endswith(".gz") else rows.encode())
    corpus = open_corpus(data_file=path)
    assert whole(corpus.train).startswith('{"text": ')
    (note,) = corpus.notes
    assert note.startswith(f"{path} looks like JSON lines, but is read as plain text")
    assert open_corpus(data_file=write(tmp_path / "a.txt", '{"a": 1}\n' + TEXT)).notes == ()
    assert open_corpus(data_file=write(tmp_path / "b.txt", "{text}\n" + TEXT)).notes == ()


def test_text_in_another_encoding_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\u0441\u043b\u043e\u0432\u043e и caf\u00e9\n".encode("koi8-r", "ignore") * 100)
    (note,) = open_corpus(data_file=path, invalid_utf8="replace").notes
    assert note == f"{path} may be in another encoding: 600 of its first 1200 characters are not UTF-8"
    path.write_bytes("caf\u00e9 and other words\n".encode("latin-1") * 100)
    assert open_corpus(data_file=path, invalid_utf8="replace").notes == ()


def test_a_file_as_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d" / "a.txt", TEXT)
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.txt", "./d/a.txt", str(tmp_path / "d" / "a.txt")):
        with pytest.raises(DataError, match=f"--dataset {name} is a file: give it with --data-file"):
            open_corpus(name)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="there is no /proc")
def test_a_file_without_a_size_is_refused() -> None:
    with pytest.raises(DataError, match="/proc/cpuinfo has no fixed size"):
        open_corpus(data_file="/proc/cpuinfo")


def test_a_short_copy_of_text8_is_refused(tmp_path: Path) -> None:
    """Its last bytes would be another validation and test text than the published one."""
    path = write(tmp_path / "text8" / "text8", "words " * 1000)
    with pytest.raises(DataError, match=r"text8 has 6,000 bytes instead of 100,000,000: download it again"):
        open_corpus("text8", data_dir=tmp_path)
    assert whole(open_corpus(data_file=path).train)


# Rows without text.


def rows_with_nulls(directory: Path, kind: str, column: str = "text") -> Path:
    """Rows 31 and 73 of 102 are null."""
    texts: list[str | None] = [line.strip() for line in LINES]
    texts.insert(30, None)
    texts.insert(72, None)
    path = directory / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({column: texts}), path, row_group_size=20)
    else:
        path.write_text("".join(json.dumps({column: text}) + "\r\n" for text in texts), newline="")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_null_is_named_by_its_row_or_skipped_and_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "CHUNK", 64)
    path = rows_with_nulls(tmp_path, kind)
    word = "row" if kind == "parquet" else "line"
    with pytest.raises(
        DataError, match=rf"a\.{kind}: {word} 31 has no text in column 'text', but null: use --null-text skip"
    ):
        open_corpus(data_file=path)
    (tmp_path / "more").mkdir()
    skipping = FileDocuments("a", [path, rows_with_nulls(tmp_path / "more", kind)], FileFormat(nulls="skip"))
    reader = skipping.read()
    pieces = list(reader)
    assert [piece.text for piece in pieces] == LINES * 2
    assert reader.skipped == 4
    reader = skipping.read()
    for index in range(len(pieces)):
        if index % 7 == 0 or 28 <= index <= 32:
            assert list(skipping.read(json.loads(json.dumps(reader.position())))) == pieces[index:]
        next(reader)
    corpus = open_corpus(data_file=path, null_text="skip")
    assert whole(corpus.train) + whole(corpus.valid) + whole(corpus.test) == TEXT
    assert corpus.notes == (f"{path}: rows skipped because their column 'text' is null: 2",)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_row_is_right_after_resuming_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK", 64)
    path = rows_with_nulls(tmp_path, kind)
    reader = FileDocuments("a", [path], FileFormat(nulls="skip")).read()
    for _ in range(50):
        next(reader)
    strict = FileDocuments("a", [path], FileFormat()).read(reader.position())
    with pytest.raises(DataError, match=r"(line|row) 73 has no text"):
        list(strict)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("chunk", [4, 5, 7, 1 << 20])
def test_lines_are_counted_from_one(end: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK", chunk)
    path = write(tmp_path / "a.jsonl", end.join([*['{"text": "é"}'] * 9, "", "[]"]))
    with pytest.raises(DataError, match=r"a\.jsonl: line 11 is not a JSON object"):
        open_corpus(data_file=path)


def test_a_held_out_text_shorter_than_a_window_is_a_short_window(tmp_path: Path) -> None:
    corpus = open_corpus(data_file=write(tmp_path / "a.txt", TEXT), valid_file=write(tmp_path / "b.txt", "abcd\n"))
    (window,) = WindowStream(corpus.valid, CharTokenizer.train(corpus.valid), lanes=2, bptt=32)
    assert window.inputs.shape == (1, 2)
