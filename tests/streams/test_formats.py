"""Local files of every format, whole, from any position, and hostile ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dni_seq.streams import DataError, Documents, WindowStream, files, formats, held_out, open_corpus, train_tokenizer
from dni_seq.streams import documents as documents_module
from dni_seq.streams.documents import LONGEST_PIECE, Piece
from dni_seq.streams.files import FileDocuments
from dni_seq.streams.formats import FileFormat

TEXTS = [f"document {i} " + "é\u0301 \u202eאב\u202c " * (i % 5) + "x" * i for i in range(150)]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def lines(texts: list[str]) -> bytes:
    return "".join(text + "\n" for text in texts).encode()


def json_lines(texts: list[str], column: str = "text") -> bytes:
    return lines([json.dumps({"id": i, column: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)])


def parquet(path: Path, texts: list[str], column: str = "text") -> Path:
    """Several row groups, the last one shorter."""
    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path, row_group_size=40)
    return path


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def whole(documents: Documents) -> str:
    return "".join(documents)


def of(path: Path, **form: str) -> FileDocuments:
    return FileDocuments(path.name, [path], FileFormat(**form))


@pytest.fixture(params=["text", "json", "parquet", "glob"])
def documents(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Documents:
    """The same documents in each format; chunks, batches and pieces so small that there are many."""
    monkeypatch.setattr(formats, "CHUNK", 64)
    monkeypatch.setattr(formats, "ROWS", 7)
    monkeypatch.setattr(documents_module, "LONGEST_PIECE", 50)
    if request.param == "parquet":
        return of(parquet(tmp_path / "a.parquet", TEXTS))
    if request.param == "json":
        return of(write(tmp_path / "a.jsonl", json_lines(TEXTS)))
    if request.param == "text":
        return of(write(tmp_path / "a.txt", lines(TEXTS)))
    write(tmp_path / "1.txt", lines(TEXTS[:50]))
    write(tmp_path / "2.jsonl.gz", gzip.compress(json_lines(TEXTS[50:90])))
    parquet(tmp_path / "3.parquet", TEXTS[90:])
    return FileDocuments("all", files.matching(tmp_path / "[123].*"), FileFormat())


def test_formats_give_the_same_documents(documents: Documents) -> None:
    found, parts = [], []
    for piece in documents.read():
        parts.append(piece.text)
        if piece.ends:
            found.append("".join(parts))
            parts = []
    assert not parts
    assert found == [text + "\n" for text in TEXTS]


def test_every_position_leads_to_the_same_pieces(documents: Documents) -> None:
    reader, positions = documents.read(), []
    pieces: list[Piece] = []
    while True:
        positions.append(json.loads(json.dumps(reader.position())))
        try:
            pieces.append(next(reader))
        except StopIteration:
            break
    assert len(pieces) > len(TEXTS)  # some were cut
    for index in range(0, len(positions), 13):
        again = documents.read(positions[index])
        assert again.position() == positions[index]
        assert list(again) == pieces[index:]


@pytest.mark.parametrize("packing", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_compressed_files_are_unpacked(packing: str, kind: str, tmp_path: Path) -> None:
    content = lines(TEXTS) if kind == ".txt" else json_lines(TEXTS)
    packed = COMPRESS[packing](content)
    documents = of(write(tmp_path / f"a{kind}{packing}", packed))
    assert whole(documents) == lines(TEXTS).decode()
    if packing:
        # Both the end and the middle of the file are missing.
        damaged = of(write(tmp_path / f"b{kind}{packing}", packed[: len(packed) // 2]))
        with pytest.raises(DataError, match=rf"b{kind}{packing}: reading failed") as caught:
            whole(damaged)
        assert "\n" not in str(caught.value)


def test_zst_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"a\.txt\.zst needs the package zstandard: pip install zstandard"):
        whole(of(write(tmp_path / "a.txt.zst", b"?")))


def test_zst_is_unpacked_where_its_package_is_installed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = lines(TEXTS)
    frames = b"".join(zstandard.compress(part) for part in (content[:1000], content[1000:]))
    documents = of(write(tmp_path / "a.txt.zst", frames))
    assert whole(documents) == content.decode()
    reader = documents.read()
    next(reader)
    assert "".join(piece.text for piece in documents.read(reader.position())) == lines(TEXTS[1:]).decode()
    with pytest.raises(DataError, match="reading failed"):
        whole(of(write(tmp_path / "b.txt.zst", b"not zst")))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl: line 2 is not JSON \(Expecting value, column 11\)"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl: line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', r"a\.jsonl: line 2 has no text in column 'text', but '5'"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"no column 'text' \(columns: 'body', 'id'\).*--text-column"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        ("a.parquet", b"PAR1 but no more", r"a\.parquet: reading failed"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: reading failed"),
        ("a.txt.xz", b"not xz", r"a\.txt\.xz: reading failed"),
        ("a.txt.bz2", b"not bz2", r"a\.txt\.bz2: reading failed"),
        ("a.txt.gz", gzip.compress(b"abc\xff", mtime=0), r"a\.txt\.gz is not UTF-8 at byte 3"),
    ],
)
def test_what_is_damaged_is_named(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        whole(of(write(tmp_path / name, content)))
    assert "\n" not in str(caught.value)


def test_a_column_by_another_name(tmp_path: Path) -> None:
    table = parquet(tmp_path / "a.parquet", TEXTS, "body")
    rows = write(tmp_path / "a.jsonl", json_lines(TEXTS, "body"))
    for path in (table, rows):
        corpus = open_corpus(data_file=path, text_column="body")
        assert whole(corpus.train) + whole(corpus.valid) + whole(corpus.test) == lines(TEXTS).decode()
        with pytest.raises(DataError, match=r"no column 'text' \(columns: 'id', 'body'\)"):
            open_corpus(data_file=path)


def test_a_pattern_names_several_files_and_splits(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.txt", b"b\n" * 10)
    write(tmp_path / "a.txt", b"a\n" * 10)
    write(tmp_path / "deep" / "c.txt", b"c\n" * 20)
    corpus = open_corpus(data_file=tmp_path / "**" / "*.txt")
    assert whole(corpus.train) == "a\n" * 10 + "b\n" * 10 + "c\n" * 16
    assert (len(list(corpus.valid)), len(list(corpus.test))) == (2, 2)
    with pytest.raises(DataError, match=r"no such file: .*nothing\*"):
        open_corpus(data_file=tmp_path / "nothing*")


def test_many_marks_are_thinned_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "MARKS", 8)
    corpus = open_corpus(data_file=write(tmp_path / "a.txt", lines(TEXTS)))
    parts = [whole(documents) for documents in (corpus.train, corpus.valid, corpus.test)]
    assert "".join(parts) == lines(TEXTS).decode()
    assert parts[1] == lines(TEXTS[136:143]).decode()


# Hostile text.


def test_invalid_utf8_is_replaced_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"good\nb\xffd\n\xe2\x82\n" * 20)
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 at byte 6: .*--invalid-utf8 replace"):
        open_corpus(data_file=path)
    corpus = open_corpus(data_file=path, invalid_utf8="replace")
    assert whole(corpus.train)[:11] == "good\nb\ufffdd\n\ufffd\n"


def test_text_that_is_not_utf8_in_parquet_is_named_or_replaced(tmp_path: Path) -> None:
    rows = pa.array([b"good", b"b\xffd", b"more"] * 20)
    unchecked = pa.StringArray.from_buffers(len(rows), *rows.buffers()[1:])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": unchecked}), path, row_group_size=10)
    with pytest.raises(DataError, match=r"a\.parquet is not UTF-8 at byte 1 of row 1 of row group 0.*invalid-utf8 replace"):
        open_corpus(data_file=path)
    documents = of(path, errors="replace")
    assert list(documents) == ["good\n", "b\ufffdd\n", "more\n"] * 20
    reader = documents.read()
    for _ in range(13):
        next(reader)
    assert [piece.text for piece in documents.read(reader.position())] == (["good\n", "b\ufffdd\n", "more\n"] * 20)[13:]


def test_half_a_surrogate_pair_in_json_is_named_or_replaced(tmp_path: Path) -> None:
    """It could be printed nowhere; whole pairs are characters."""
    path = write(tmp_path / "a.jsonl", rb'{"text": "\ud83d\ude00 a\ud800b"}' + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl: line 1 has half of a surrogate pair.*--invalid-utf8 replace") as caught:
        whole(of(path))
    assert str(caught.value).isascii()
    assert whole(of(path, errors="replace")) == "\U0001f600 a\ufffdb\n"


@pytest.mark.parametrize("kind", ["word", "char", "sentencepiece"])
def test_strange_characters_survive(kind: str, tmp_path: Path) -> None:
    text = (
        "NUL \0 and\ttab\n"
        + "שלום עולם \u202eabc\u202c\n"
        + "e\u0301 \U0001f468\u200d\U0001f469\n"
        + "\ufeff\x1c\x85\u2028 \u2581\n"
    )
    corpus = open_corpus(data_file=write(tmp_path / "a.txt", (text * 50).encode()))
    assert whole(corpus.train).startswith(text)
    tokenizer = train_tokenizer(kind, corpus.train)
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == (text if kind != "word" else "\n".join(" ".join(line.split()) for line in text.split("\n")))
    stream = WindowStream(corpus.train, tokenizer, lanes=2, bptt=5)
    assert stream.unknown_tokens == 0
    assert len(list(stream)) > 10


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 1 << 20])
def test_newlines_of_all_kinds_end_lines(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK", max(chunk, 4))  # a character of UTF-8 has up to four bytes
    content = "a\r\nb\rc\nd\n\re\r\r\nf é\U0001f600\n\n\r\n" * 9 + "last\r"
    documents = of(write(tmp_path / "a.txt", content.encode()))
    assert whole(documents) == content.replace("\r\n", "\n").replace("\r", "\n")


def test_one_long_line_is_read_in_pieces_of_bounded_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ("word " * 4_000_000).encode())  # 20 MB
    tracemalloc.start()
    try:
        sizes = [len(piece.text) for piece in of(path).read()]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 20_000_001
    assert max(sizes) <= formats.CHUNK
    assert peak < 8 * formats.CHUNK


@pytest.mark.parametrize("size", [formats.CHUNK - 1, formats.CHUNK, formats.CHUNK + 1, 3 * formats.CHUNK + 17])
def test_a_line_without_blanks_is_cut_between_characters(size: int, tmp_path: Path) -> None:
    text = ("é€\U0001f600x" * (size // 10 + 1))[: size // 2]
    assert whole(of(write(tmp_path / "a.txt", text.encode()))) == text + "\n"


def test_long_documents_are_cut_before_blanks(tmp_path: Path) -> None:
    text = "word " * LONGEST_PIECE
    pieces = list(of(write(tmp_path / "a.jsonl", json_lines([text, "next"]))).read())
    assert "".join(piece.text for piece in pieces) == text + "\nnext\n"
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 2) + [True, True]
    assert all(len(piece.text) <= LONGEST_PIECE for piece in pieces)
    assert all(piece.text.startswith(" word") for piece in pieces[1:-2])


def test_empty_lines_are_tokens_each(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\n" * 200_000 + b"end\n")
    corpus = open_corpus(data_file=path, valid_file=path, test_file=path)
    stream = WindowStream(corpus.train, train_tokenizer("word", corpus.train), lanes=4, bptt=1000)
    assert stream.tokens_per_epoch == 4 * (200_002 // 4 - 1)


def test_a_file_that_grows_is_read_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", lines(TEXTS))
    documents = of(path)
    reader = documents.read()
    first = next(reader).text
    with path.open("ab") as file:
        file.write(b"more\n" * 1_000_000)
    assert first + "".join(piece.text for piece in reader) == lines(TEXTS).decode()
    assert whole(documents) == lines(TEXTS).decode()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", lines(TEXTS) * 1000)
    documents = of(path)
    reader = documents.read()
    next(reader)
    write(path, lines(TEXTS))
    with pytest.raises(DataError, match=r"a\.txt has changed while it was read"):
        list(reader)
    packed = write(tmp_path / "a.txt.gz", gzip.compress(lines(TEXTS)))
    documents = of(packed)
    write(packed, gzip.compress(lines(TEXTS) * 2))
    with pytest.raises(DataError, match="has changed while it was read"):
        whole(documents)
