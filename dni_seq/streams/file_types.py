"""Recognizes files that are not text, by the ending of their name and by their first bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from dni_seq.streams.compression import packing_of, unpacked_ending
from dni_seq.streams.documents import DataError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
"""Endings of files with one JSON object per line."""

PARQUET = ".parquet"

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""The byte-order mark of UTF-8, which does not belong to the text if a file starts with it."""

START = 4096
"""Number of first bytes that are examined."""

_ARCHIVE = "an archive: unpack it, and give the text files in it"
_TABLE = (
    "a table: convert it to .parquet or .jsonl, which --text-column reads (pandas writes both), or rename it to .txt "
    "to train on its lines as they are"
)
_OTHER_PACKING = "compressed in a format without a reader here: compress it as .gz, .xz, .bz2 or .zst instead"

NOT_TEXT: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys((".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar"), _ARCHIVE),
        **dict.fromkeys((".csv", ".tsv"), _TABLE),
        ".lzma": _OTHER_PACKING,
        ".gzip": "named unlike a compressed file: rename it to .gz",
        ".bzip2": "named unlike a compressed file: rename it to .bz2",
        ".zstd": "named unlike a compressed file: rename it to .zst",
    }
)
"""For each ending of files that are not text: what such a file is, and what to do with it."""

_UTF_16 = "UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8"
_UTF_32 = "UTF-32, not UTF-8: convert it, for example with iconv -f UTF-32 -t UTF-8"

FIRST_BYTES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xfe\0\0", _UTF_32),
    (b"\0\0\xfe\xff", _UTF_32),
    (b"\xff\xfe", _UTF_16),
    (b"\xfe\xff", _UTF_16),
    (b"\x1f\x8b\x08", "gzip data: add .gz to its name, or decompress it"),
    (b"\xfd7zXZ\0", "xz data: add .xz to its name, or decompress it"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data: add .zst to its name, or decompress it"),
    *((b"BZh%d1AY&SY" % level, "bzip2 data: add .bz2 to its name, or decompress it") for level in range(1, 10)),
    (b"\x1f\x9d", f"data of compress, {_OTHER_PACKING}"),
    (b"\x04\x22\x4d\x18", f"LZ4 data, {_OTHER_PACKING}"),
    (b"LZIP\x01", f"lzip data, {_OTHER_PACKING}"),
    (b"PK\x03\x04", "a zip archive (or a document such as .docx and .epub): extract its text"),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
    (b"Rar!\x1a\x07", _ARCHIVE),
    (b"PAR1\x15", "Parquet data: give it uncompressed, with a name that ends in .parquet"),
    (b"ARROW1\0\0", "an Arrow file: convert it to .parquet"),
    (b"%PDF-", "a PDF document: extract its text"),
    (b"SQLite format 3\0", "a database: export its text as .parquet or .jsonl"),
)
"""First bytes of files that are not text in UTF-8, each with a text: what such a file is, and what to do with it."""

TAR_MARK, TAR_MARK_AT = b"ustar", 257
"""A tar archive has the bytes `TAR_MARK` at byte `TAR_MARK_AT`, counted from 0."""


def check_ending(path: Path) -> None:
    """Checks that a file's name does not have the ending of an archive, a table, or another file that is not text.

    Raises:
        DataError: the name has such an ending.
    """
    for ending in (path.suffix.lower(), unpacked_ending(path)):
        if ending in NOT_TEXT:
            raise DataError(f"{path} is {NOT_TEXT[ending]}")
    if packing_of(path) and unpacked_ending(path) == PARQUET:
        raise DataError(f"{path} is a compressed Parquet file: decompress it, because Parquet compresses its columns itself")


def has_columns(path: Path) -> bool:
    """Returns whether the name has the ending of a file with columns or fields; --text-column chooses one of them."""
    return unpacked_ending(path) in (*JSON_LINES, PARQUET)


def check_start(path: Path, data: bytes) -> None:
    """Checks that the first uncompressed bytes of a file may be text in UTF-8.

    Raises:
        DataError: the bytes are those of a file in another format, or more than a quarter of the first 4,096 bytes are NUL.
    """
    for first, kind in FIRST_BYTES:
        if data.startswith(first):
            raise DataError(f"{path} holds {kind}")
    if data.startswith(TAR_MARK, TAR_MARK_AT):
        raise DataError(f"{path} holds {_ARCHIVE}")
    start = data[:START]
    if 4 * start.count(0) > len(start):
        raise DataError(
            f"{path} is not text in UTF-8: {start.count(0)} of its first {len(start)} bytes are NUL; convert it to UTF-8 "
            "if it is text, for example with iconv -f UTF-16LE -t UTF-8"
        )
