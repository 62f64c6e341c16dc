"""Compressed files: whole, in several frames, padded, cut short, and followed by other bytes."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dni_seq.streams import DataError
from dni_seq.streams.compression import open_bytes
from dni_seq.streams.files import FileDocuments
from dni_seq.streams.formats import CHUNK, FileFormat

LINES = "".join(f"line {i} of the text, which has {i * i % 977} in it\n" for i in range(500))
TEXT = LINES.encode()


def zst(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(content)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zst,
}


def text_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return "".join(FileDocuments(path.name, [path], FileFormat()))


@pytest.mark.parametrize("packing", PACKINGS)
def test_several_frames_and_padding_are_one_text(packing: str, tmp_path: Path) -> None:
    pack = PACKINGS[packing]
    frames = pack(TEXT[:700]) + pack(b"") + pack(TEXT[700:])
    assert text_of(tmp_path / f"a.txt{packing}", frames) == LINES
    assert text_of(tmp_path / f"b.txt{packing}", frames + bytes(4096)) == LINES
    assert text_of(tmp_path / f"C.TXT{packing.upper()}", frames) == LINES
    assert text_of(tmp_path / f"d.txt{packing}", pack(b"")) == ""


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kept", [1, 3, 0.5, -1])
def test_a_file_that_was_cut_is_an_error(packing: str, kept: float, tmp_path: Path) -> None:
    packed = PACKINGS[packing](TEXT)
    length = int(len(packed) * kept) if isinstance(kept, float) else int(kept)
    for number, before in enumerate((b"", packed)):  # the only frame, and the second one
        with pytest.raises(DataError, match=r"reading failed \(.*\): check that the file is intact") as caught:
            text_of(tmp_path / f"{number}.txt{packing}", before + packed[:length])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("after", [b"", TEXT])
def test_other_bytes_after_a_frame_are_an_error(packing: str, after: bytes, tmp_path: Path) -> None:
    """Python's readers of .xz and .bz2 drop them and all frames after them."""
    pack = PACKINGS[packing]
    with pytest.raises(DataError, match="reading failed"):
        text_of(tmp_path / f"a.txt{packing}", pack(TEXT) + b"damaged" + (pack(after) if after else b""))
    with pytest.raises(DataError, match="reading failed"):
        text_of(tmp_path / f"b.txt{packing}", bytes(100))  # written before a power failure


def test_zst_with_the_longest_window(tmp_path: Path) -> None:
    """As `zstd --long=31` writes from a pipe."""
    zstandard = pytest.importorskip("zstandard")
    rows = "".join(json.dumps({"text": f"words in line {i}"}) + "\n" for i in range(400)).encode()
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    packed = packer.compress(rows) + packer.flush()
    assert text_of(tmp_path / "a.jsonl.zst", packed) == "".join(f"words in line {i}\n" for i in range(400))


@pytest.mark.parametrize("packing", PACKINGS)
def test_memory_does_not_grow_with_the_text(packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKINGS[packing](b"a" * 60_000_000))  # a few KB packed
    tracemalloc.start()
    try:
        with open_bytes(path) as file:
            length = sum(map(len, iter(lambda: file.read(CHUNK), b"")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert length == 60_000_000
    assert peak < 36 * CHUNK
