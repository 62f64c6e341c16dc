"""Measure reading, tokenizing and windowing of large local files: speed, memory, and what training waits for.

python benchmarks/streams.py --output docs/results/streams.jsonl
    All cases, a few minutes; each in an interpreter of its own, one at a time.
python benchmarks/streams.py --only lines
    One case.

Memory is the peak of resident memory above an interpreter that has imported torch. Speeds are in tokens a second of wall
time, and of processor time, which other processes on the machine do not lower; each stands beside a plain Python loop over
the same file in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

LANES, STEPS = 20, 35
MIB = 1 << 20
WORDS = [f"{stem}{ending}" for stem in "abcdefghijklmnopqrstuvwxy" for ending in range(400)]  # 10,000


def peak_mb() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_lines(path: Path, size: int) -> None:
    """Lines of 5 to 24 words, drawn like words of a language, frequent ones often; a megabyte of them, repeated."""
    draw = torch.Generator().manual_seed(0)
    ranks = iter((len(WORDS) ** torch.rand(300_000, generator=draw)).long().sub(1).tolist())
    lengths = torch.randint(5, 25, (300_000,), generator=draw).tolist()
    made = []
    while sum(map(len, made)) < MIB and lengths:
        batch = [" ".join(WORDS[next(ranks)] for _ in range(lengths.pop())) + "\n" for _ in range(1000)]
        made.append("".join(batch))
    text = "".join(made)[:MIB]
    with path.open("w", encoding="ascii") as file:
        for _ in range(max(1, size // MIB)):
            file.write(text)


def timed(action: Callable[[], int]) -> dict[str, float]:
    """Tokens a second of an action that returns their number."""
    wall, processor = time.perf_counter(), time.process_time()
    tokens = action()
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - wall),
        "tokens_per_cpu_second": tokens / (time.process_time() - processor),
    }


def count(windows: Iterable[Any]) -> int:
    """The tokens that windows predict."""
    return sum(window.targets.numel() for window in windows)


def stream_of(path: Path, kind: str, valid: Path) -> Any:
    """A stream over a file, its tokenizer trained on it."""
    from dni_seq.streams import WindowStream, open_corpus, train_tokenizer

    corpus = open_corpus(data_file=path, valid_file=valid, test_file=valid)
    size = {"word": 20_000, "char": None, "sentencepiece": None}[kind]
    tokenizer = train_tokenizer(kind, corpus.train, size)
    return WindowStream(corpus.train, tokenizer, lanes=LANES, bptt=STEPS)


def plain_loop(path: Path) -> int:
    """What one would write without a library: a vocabulary, then ids line by line, in a list."""
    counts: Counter[str] = Counter()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            counts.update(line.split())
            if number == 100_000:
                break
    ids_of = {word: index for index, (word, _) in enumerate(counts.most_common(20_000))}
    ids: list[int] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            ids.extend(ids_of.get(word, 0) for word in line.split())
            ids.append(1)
    return len(ids)


def lines(folder: Path, kind: str) -> dict[str, Any]:
    """A file of 100 MB of lines."""
    return pass_over(folder / "lines.txt", kind)


def one_line(folder: Path, kind: str) -> dict[str, Any]:
    """A file of one line of 500 MB."""
    return pass_over(folder / "one_line.txt", kind)


def empty_lines(folder: Path, kind: str) -> dict[str, Any]:
    """A file of 10 million empty lines."""
    return pass_over(folder / "empty.txt", kind)


def pass_over(path: Path, kind: str) -> dict[str, Any]:
    """One epoch of windows of a file."""
    stream = stream_of(path, kind, path.with_name("valid.txt"))
    return timed(lambda: count(stream)) | {"peak_mb": peak_mb()}


def python(folder: Path, kind: str) -> dict[str, Any]:
    """The plain Python loop over the 100 MB of lines."""
    return timed(lambda: plain_loop(folder / "lines.txt")) | {"peak_mb": peak_mb()}


def bare(folder: Path, kind: str) -> dict[str, Any]:
    """An interpreter that has imported torch."""
    return {"peak_mb": peak_mb()}


def training(folder: Path, kind: str) -> dict[str, Any]:
    """Steps of a small model on the same text, streamed and held in memory in turn; the median of their ratios."""
    import dni_seq as dni
    from dni_seq.models.language_model import LanguageModel, token_losses
    from dni_seq.streams import files

    path, valid = folder / "part.txt", folder / "valid.txt"
    files.IN_MEMORY_BYTES = 0
    streamed = stream_of(path, kind, valid)
    files.IN_MEMORY_BYTES = 1 << 40
    held = stream_of(path, kind, valid)
    rounds, seconds = 8, {"streamed": [], "held": []}
    torch.manual_seed(0)
    model = LanguageModel(20_000, embed=64, hidden=64, layers=1)
    trainer = dni.SequenceTrainer(model, torch.optim.Adam(model.parameters()), token_losses)
    sources = {"streamed": streamed, "held": held}
    iterators = {name: iter(source) for name, source in sources.items()}
    for round_ in range(rounds + 1):
        for name in sources:
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(60):
                window = next(iterators[name])
                trainer.step(window.inputs, window.targets, ends=window.ends)
            if round_:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(seconds["streamed"], seconds["held"], strict=True)]
    wall_ratio, cpu_ratio = (float(torch.tensor(column).median()) for column in zip(*ratios, strict=True))
    return {"ratio_of_time": wall_ratio, "ratio_of_cpu_time": cpu_ratio, "steps": rounds * 60}


CASES: dict[str, tuple[Callable[[Path, str], dict[str, Any]], str]] = {
    "bare": (bare, ""),
    "plain python loop": (python, "word"),
    "lines": (lines, "word"),
    "lines, char": (lines, "char"),
    "lines, sentencepiece": (lines, "sentencepiece"),
    "one line of 500 MB": (one_line, "word"),
    "10 million empty lines": (empty_lines, "word"),
    "training, streamed over held": (training, "word"),
}


def prepare(folder: Path) -> None:
    """Write the files."""
    write_lines(folder / "lines.txt", 100 * MIB)
    write_lines(folder / "part.txt", 10 * MIB)
    write_lines(folder / "valid.txt", MIB // 10)
    with (folder / "one_line.txt").open("w", encoding="ascii") as out:
        part = (folder / "part.txt").read_text(encoding="ascii").replace("\n", " ")
        for _ in range(50):
            out.write(part)
    (folder / "empty.txt").write_bytes(b"\n" * 10_000_000 + b"end\n")  # a text needs a visible character


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--folder", help="where the files are kept, 0.7 GB (default: a temporary one)")
    parser.add_argument("--output", help="file of results, a line of JSON a case; those of other cases stay")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "empty.txt").exists():
            subprocess.run(
                [sys.executable, "-c", f"{PREPARE}prepare(Path({str(folder)!r}))"], check=True, cwd=Path(__file__).parent
            )
        for name in CASES:
            if given.only in (None, name):
                keep(measured(name, folder), given.output)
    return 0


def keep(result: dict[str, Any], output: str | None) -> None:
    """Put a result in the place of that of the same case."""
    print(json.dumps(result), flush=True)
    if output is None:
        return
    path = Path(output)
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = {each["case"]: each for each in [*map(json.loads, kept), result]}
    path.write_text("".join(json.dumps(results[name]) + "\n" for name in CASES if name in results), encoding="utf-8")


PREPARE = "from pathlib import Path; from streams import *; "


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The result of a case in an interpreter of its own."""
    case, kind = CASES[name]
    code = f"{PREPARE}print(json.dumps({case.__name__}(Path({str(folder)!r}), {kind!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"case": name, "tokenizer": kind, **json.loads(done.stdout), **versions}


if __name__ == "__main__":
    sys.exit(main())
