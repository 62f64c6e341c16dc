"""Measures reading, tokenizing and windowing of large local files: speed, memory, and what streamed text costs training.

python benchmarks/streams.py --output docs/results/streams.jsonl
    Measure all cases in a few minutes, one after the other, each in an interpreter of its own.
python benchmarks/streams.py --only lines
    Measure one case.

Memory is the peak of resident memory above that of an interpreter that has imported torch. A speed is given twice: in tokens
per second of wall time, and in tokens per second of CPU time, which other processes on the machine lower less. For
comparison, the case "plain python loop" reads the file of the case "lines" in plain Python.
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
    """Returns the peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_lines(path: Path, size: int) -> None:
    """Writes a file of lines of 5 to 24 random words; the text repeats after one MiB.

    As in a language, a few words are very frequent.
    """
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
    """Runs an action that returns its number of tokens, and returns this number and the tokens per second."""
    wall, processor = time.perf_counter(), time.process_time()
    tokens = action()
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - wall),
        "tokens_per_cpu_second": tokens / (time.process_time() - processor),
    }


def count(windows: Iterable[Any]) -> int:
    """Returns the number of tokens that windows predict."""
    return sum(window.targets.numel() for window in windows)


def stream_of(path: Path, kind: str, valid: Path) -> Any:
    """Returns a stream of windows of a file, with a tokenizer that was trained on the file."""
    from dni_seq.streams import WindowStream, open_corpus, train_tokenizer

    corpus = open_corpus(data_file=path, valid_file=valid, test_file=valid)
    size = {"word": 20_000, "char": None, "sentencepiece": None}[kind]
    tokenizer = train_tokenizer(kind, corpus.train, size)
    return WindowStream(corpus.train, tokenizer, lanes=LANES, bptt=STEPS)


def plain_loop(path: Path) -> int:
    """Reads a file in plain Python: counts words for a vocabulary, then appends the ids line by line to a list.

    Returns:
        The number of ids.
    """
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
    """The case of a file of lines, 100 MB."""
    return pass_over(folder / "lines.txt", kind)


def one_line(folder: Path, kind: str) -> dict[str, Any]:
    """The case of a file of one line, 500 MB."""
    return pass_over(folder / "one_line.txt", kind)


def empty_lines(folder: Path, kind: str) -> dict[str, Any]:
    """The case of a file of 10 million empty lines."""
    return pass_over(folder / "empty.txt", kind)


def pass_over(path: Path, kind: str) -> dict[str, Any]:
    """Reads one epoch of windows of a file and returns the speed and the memory."""
    stream = stream_of(path, kind, path.with_name("valid.txt"))
    return timed(lambda: count(stream)) | {"peak_mb": peak_mb()}


def python(folder: Path, kind: str) -> dict[str, Any]:
    """The case of the plain Python loop over the file of lines, 100 MB."""
    return timed(lambda: plain_loop(folder / "lines.txt")) | {"peak_mb": peak_mb()}


def bare(folder: Path, kind: str) -> dict[str, Any]:
    """The case of an interpreter that has only imported torch."""
    return {"peak_mb": peak_mb()}


def training(folder: Path, kind: str) -> dict[str, Any]:
    """The case of training a small model on a text that is streamed, and on the same text in memory, in turns.

    The result has two ratios, medians over the rounds: time streamed over time in memory, by wall time and by CPU time.
    """
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
    """Writes the files of all cases."""
    write_lines(folder / "lines.txt", 100 * MIB)
    write_lines(folder / "part.txt", 10 * MIB)
    write_lines(folder / "valid.txt", MIB // 10)
    with (folder / "one_line.txt").open("w", encoding="ascii") as out:
        part = (folder / "part.txt").read_text(encoding="ascii").replace("\n", " ")
        for _ in range(50):
            out.write(part)
    (folder / "empty.txt").write_bytes(b"\n" * 10_000_000 + b"end\n")  # a text needs a visible character


def main() -> int:
    """Runs the command and returns its exit status."""
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
    """Writes a result to the file `output`, in place of an older result of the same case."""
    print(json.dumps(result), flush=True)
    if output is None:
        return
    path = Path(output)
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = {each["case"]: each for each in [*map(json.loads, kept), result]}
    path.write_text("".join(json.dumps(results[name]) + "\n" for name in CASES if name in results), encoding="utf-8")


PREPARE = "from pathlib import Path; from streams import *; "


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Runs a case in an interpreter of its own and returns its result."""
    case, kind = CASES[name]
    code = f"{PREPARE}print(json.dumps({case.__name__}(Path({str(folder)!r}), {kind!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"case": name, "tokenizer": kind, **json.loads(done.stdout), **versions}


if __name__ == "__main__":
    sys.exit(main())
