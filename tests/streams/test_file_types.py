"""Files that are not text in UTF-8: recognized by name and by content, in one line that says what to do."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dni_seq.streams import DataError, open_corpus

LINES = [f"line {i} of the text\n" for i in range(100)]
TEXT = "".join(LINES)
ROWS = "".join(json.dumps({"text": line.strip()}) + "\n" for line in LINES)
MARK = "\ufeff"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def whole(path: Path, **options: str) -> str:
    corpus = open_corpus(data_file=path, **options)
    return "".join(text for split in (corpus.train, corpus.valid, corpus.test) for text in split)


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("corpus/a.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT.encode()))
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr("a.txt", TEXT)
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [line.strip() for line in LINES]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", (MARK + TEXT).encode()),
        ("a.TXT.GZ", gzip.compress((MARK + TEXT).encode())),
        ("a.jsonl", (MARK + ROWS).encode()),
        ("A.JSONL", ROWS.encode()),
        ("a.jsonlines", ROWS.encode()),
        ("a.NDJSON.Xz", lzma.compress(ROWS.encode())),
        ("A.PARQUET", parquet()),
        ("a", TEXT.encode()),
    ],
)
def test_marks_are_no_text_and_endings_have_any_case(name: str, content: bytes, tmp_path: Path) -> None:
    assert whole(write(tmp_path / name, content)) == TEXT


def test_every_file_of_a_pattern_may_begin_with_a_mark(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.txt", f"{MARK}{name} {MARK}\n".encode() * 20)
    expected = "".join(f"{name} {MARK}\n" + f"{MARK}{name} {MARK}\n" * 19 for name in "abc")
    assert whole(tmp_path / "*.txt") == expected  # a mark that does not start a file is a character


def test_positions_in_a_file_with_a_mark_lead_to_the_same_text(tmp_path: Path) -> None:
    documents = open_corpus(data_file=write(tmp_path / "a.txt", (MARK + TEXT).encode())).train
    reader = documents.read()
    for number in range(5):
        assert next(documents.read(json.loads(json.dumps(reader.position())))).text == LINES[number]
        next(reader)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.tar", tar(), "is an archive: unpack it"),
        ("a.TAR.GZ", gzip.compress(tar()), "is an archive: unpack it"),
        ("a.tgz", gzip.compress(tar()), "is an archive: unpack it"),
        ("a.zip", archive(), "is an archive: unpack it"),
        ("a.gz", gzip.compress(tar()), "holds an archive: unpack it"),
        ("a.txt", tar(), "holds an archive: unpack it"),
        ("a.txt", archive(), "holds a zip archive"),
        ("a.txt", gzip.compress(TEXT.encode()), r"holds gzip data: add \.gz to its name"),
        ("a.txt.gz", gzip.compress(gzip.compress(TEXT.encode())), r"holds gzip data: add \.gz to its name"),
        ("a.txt", parquet(), r"holds Parquet data: .*ends in \.parquet"),
        ("a.parquet.gz", gzip.compress(parquet()), "is a compressed Parquet file: decompress it"),
        ("a.csv", b"id,text\n1,some words\n" * 100, r"is a table: convert it to \.parquet or \.jsonl"),
        ("a.tsv.gz", gzip.compress(b"id\ttext\n1\tsome words\n" * 100), r"is a table: convert it"),
        ("a.txt.gzip", gzip.compress(TEXT.encode()), r"rename it to \.gz"),
        ("a.txt", TEXT.encode("utf-16"), "holds UTF-16, not UTF-8: convert it, .*iconv"),
        ("a.jsonl", ROWS.encode("utf-16"), "holds UTF-16, not UTF-8"),
        ("a.txt", b"\xfe\xff" + TEXT.encode("utf-16-be"), "holds UTF-16, not UTF-8"),
        ("a.txt", TEXT.encode("utf-32"), "holds UTF-32, not UTF-8"),
        ("a.txt", TEXT.encode("utf-16-le"), "is not text in UTF-8: .* are NUL"),
        ("a.txt", bytes(1000), "is not text in UTF-8: 1000 of its first 1000 bytes are NUL"),
        ("a.txt", b"%PDF-1.7\nsome text\n" * 100, "holds a PDF document"),
        ("a.txt", b"\x89PNG\r\n" + bytes(range(256)) * 100, "not UTF-8 at byte 0 and holds NUL bytes"),
    ],
)
@pytest.mark.parametrize("invalid_utf8", ["error", "replace"])
def test_what_is_not_text_is_refused(name: str, content: bytes, complaint: str, invalid_utf8: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    if invalid_utf8 == "replace" and "not UTF-8 at byte" in complaint:
        pytest.skip("it is read as asked")
    with pytest.raises(DataError, match=complaint) as caught:
        open_corpus(data_file=path, invalid_utf8=invalid_utf8)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_text_column_needs_a_file_with_columns(tmp_path: Path) -> None:
    text, rows = write(tmp_path / "a.txt", TEXT.encode()), write(tmp_path / "a.jsonl", ROWS.encode())
    with pytest.raises(DataError, match=r"--text-column text cannot be used with .*a\.txt, which has no columns: remove it"):
        open_corpus(data_file=text, text_column="text")
    assert whole(rows, text_column="text") == TEXT
    open_corpus(data_file=text, valid_file=rows, test_file=rows, text_column="text")
