"""Step time and memory of training, against plain PyTorch and against dni-pytorch's way, as ratios within one process.

python benchmarks/steps.py --output docs/results/steps.jsonl
    The grid: a quarter of an hour on two cores. One JSON line a cell and way.
python benchmarks/steps.py --only char-lstm --bptt 1 4
    Part of it.
python benchmarks/steps.py --tables docs/results/steps.jsonl
    Measure nothing; print the lines on record as a table of Markdown.
python benchmarks/steps.py --profile word-lstm --bptt 5
    Where the time of a step goes, by operator.
python benchmarks/steps.py --memory --output docs/results/memory.jsonl
    Peak resident memory after 200 steps, each way in a process of its own, and its growth over 10,000 windows.

Ways of training, on the same model and random tokens, take turns, so many steps each that their kinds are all among them, as
a synthesizer's steps with a regression and without. Medians and quartiles over the turns are reported, of the process's CPU
time for a step, which suffers less from other work on the machine than the clock does; with several threads (`--threads`),
whose CPU times add up, of the clock's. Two processes take turns, round by round: in one, freed memory is kept for the
next window, as our scripts have it (`dni_seq.app.runs.allocator`); in the other it is not, as a loop that nobody tuned
has it. Beside them stand the matrix products of a truncated step alone, the floor of them all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.runs.options import build
from dni_seq.app.studies.records import NOTHING, markdown, read_lines
from dni_seq.core.windows import Lookahead
from dni_seq.credit.message_filter import OBSERVED_FIRST
from dni_seq.models.language_model import LanguageModel

Step = Callable[[], None]


class Setting(NamedTuple):
    """A model and its lanes, and the window lengths it is measured at."""

    vocabulary: int
    cell: str
    embed: int
    hidden: int
    layers: int
    dropout: float
    lanes: int
    bptt: Sequence[int]


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "word-lstm": Setting(10_000, "lstm", 200, 200, 2, 0.2, 20, (1, 2, 5, 20, 35)),
        "char-lstm": Setting(50, "lstm", 64, 512, 1, 0.0, 32, (1, 2, 5, 8, 20, 40)),
        "word-gru": Setting(10_000, "gru", 200, 200, 2, 0.2, 20, (1, 5, 35)),
        "char-gru": Setting(50, "gru", 64, 512, 1, 0.0, 32, (1, 5, 40)),
    }
)

OURS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {"synthesizer": "none"},
        "multi-horizon, K = 1": {"synthesizer": "multi-horizon", "horizons": 1},
        "multi-horizon, K = 1, no lookahead": {"synthesizer": "multi-horizon", "horizons": 1, "lookahead": 0},
        "multi-horizon": {"synthesizer": "multi-horizon"},
        "multi-horizon, K = 4": {"synthesizer": "multi-horizon", "horizons": 4},
        "multi-horizon, K = 4, one drawn": {"synthesizer": "multi-horizon", "horizons": 4, "draw_horizon": True},
        "exact, 1 step": {"synthesizer": "exact", "exact_steps": 1},
        "exact, 4 steps": {"synthesizer": "exact", "exact_steps": 4},
    }
)
"""Our ways: options of scripts/train_lm.py, all others its defaults, but for two horizons by words too."""

ONE = "multi-horizon, K = 1"
"""The way that the others are held to."""

PLAIN, PLAIN_FUSED, SEED = "plain", "plain, fused Adam", "dni-pytorch's way"
PLAIN_KEPT = "plain, fused Adam, freed memory kept"
PRODUCTS = "products alone"
AS_IT_COMES, KEPT = (PLAIN, PLAIN_FUSED, SEED), (PLAIN_KEPT, PRODUCTS, *OURS)
WAYS = (*AS_IT_COMES, *KEPT)

CLIP = 0.25

TURN, ROUNDS = 24, 5
"""Steps of a turn, and turns of each way at least. Fitted messages are regressed at one window of 4, the model of what is
ahead is measured at one of 100, a comparison comes at one of 47."""


def model_of(setting: Setting) -> LanguageModel:
    """The model, the same for every way but for its kernels: the plain ones run `nn.LSTM` as it comes."""
    torch.manual_seed(0)
    sizes = {name: getattr(setting, name) for name in ("cell", "embed", "hidden", "layers", "dropout")}
    return LanguageModel(setting.vocabulary, **sizes)


def plain_step(setting: Setting, bptt: int, *, fused: bool) -> Step:
    """Truncated BPTT as everyone writes it."""
    model = model_of(setting)
    model.native_steps = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    tokens = torch.randint(setting.vocabulary, (bptt, setting.lanes))
    state: Any = model.initial_state(setting.lanes)

    def step() -> None:
        nonlocal state
        logits, last = model(tokens, state)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        state = tuple(leaf.detach() for leaf in last) if isinstance(last, tuple) else last.detach()

    return step


def seed_step(setting: Setting, bptt: int) -> Step:
    """Synthetic gradients as dni-pytorch's README has them: one MLP on the joined state, one Adam for everything."""
    model = model_of(setting)
    model.native_steps = 0
    parts = 2 if setting.cell == "lstm" else 1
    width = parts * setting.hidden
    synthesizer = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )
    parameters = [*model.parameters(), *synthesizer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    tokens = torch.randint(setting.vocabulary, (bptt, setting.lanes))
    joined = torch.zeros(setting.layers, setting.lanes, width)

    def step() -> None:
        nonlocal joined
        optimizer.zero_grad()
        trigger = joined.detach().requires_grad_()
        start: Any = tuple(part.contiguous() for part in trigger.chunk(2, dim=-1)) if parts == 2 else trigger
        logits, last = model(tokens, start)
        joined = torch.cat(last, dim=-1) if parts == 2 else last
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        with torch.no_grad():
            message = 0.1 * synthesizer(joined)
        torch.autograd.backward([loss, joined], [None, message])
        F.mse_loss(synthesizer(trigger.detach()), trigger.grad).backward()  # type: ignore[arg-type]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return step


def products_step(setting: Setting, bptt: int) -> Step:
    """The matrix products of a truncated step, forward and backward, and nothing else: no training goes below them."""
    width = {"lstm": 4, "gru": 3}[setting.cell] * setting.hidden
    window = bptt * setting.lanes
    ins = [setting.embed] + [setting.hidden] * (setting.layers - 1)
    # Rows, width in and out, how often forward, back to the input, and for the weights' gradient.
    shapes = [(window, size, width, 1, 1, 1) for size in ins]
    shapes += [(setting.lanes, setting.hidden, width, bptt, bptt - 1, 0)] * setting.layers
    shapes += [(window, setting.hidden, width, 0, 0, 1)] * setting.layers
    shapes += [(window, setting.hidden, setting.vocabulary, 1, 1, 1)]
    products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for rows, size, out, forward, back, weights in shapes:
        x, w, y = torch.rand(rows, size), torch.rand(out, size), torch.rand(rows, out)
        products += [(x, w.t(), torch.empty_like(y))] * forward
        products += [(y, w, torch.empty_like(x))] * back
        products += [(y.t(), x, torch.empty_like(w))] * weights

    def step() -> None:
        for left, right, out in products:
            torch.mm(left, right, out=out)

    return step


def our_step(setting: Setting, bptt: int, options: Mapping[str, Any]) -> Step:
    """`SequenceTrainer` as scripts/train_lm.py builds it."""
    sizes = {name: getattr(setting, name) for name in ("embed", "hidden", "layers", "dropout")}
    common = {"model": setting.cell, "bptt": bptt, "lr": 1e-3, "clip": CLIP, "batch_size": setting.lanes, **sizes}
    settled = build(LanguageModelOptions, common, options)
    trainer = build_trainer(settled, model_of(setting), torch.device("cpu"))
    tokens = torch.randint(setting.vocabulary, (bptt, setting.lanes))
    steps = settled.resolve(bptt).window_lookahead
    ahead = torch.randint(setting.vocabulary, (steps, setting.lanes))
    lookahead = Lookahead(ahead, ahead, torch.ones_like(ahead, dtype=torch.bool)) if steps else None

    def step() -> None:
        trainer.step(tokens, tokens, lookahead=lookahead)

    return step


def step_of(way: str, setting: Setting, bptt: int) -> Step:
    """One way's step on one cell of the grid."""
    if way == SEED:
        return seed_step(setting, bptt)
    if way == PRODUCTS:
        return products_step(setting, bptt)
    if way in OURS:
        return our_step(setting, bptt, OURS[way])
    return plain_step(setting, bptt, fused=way != PLAIN)


def time_ways(name: str, bptt: int, ways: Sequence[str], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a step by way, one number a turn."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    workers = [Worker(name, bptt, [way for way in ways if way in each], kept=each is KEPT) for each in (AS_IT_COMES, KEPT)]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.close)
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(found[ways[0]]) < ROUNDS:
            for worker in workers:
                for way, milliseconds in worker.round().items():
                    found[way].append(milliseconds)
    return found


class Worker:
    """A process of as many threads as this one, that has some ways take turns whenever it is told to."""

    def __init__(self, name: str, bptt: int, ways: Sequence[str], *, kept: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        task = (name, bptt, ways, kept, torch.get_num_threads(), theirs)
        self._process = context.Process(target=take_turns, args=task, daemon=True)
        self._process.start()
        theirs.close()

    def round(self) -> dict[str, float]:
        """Milliseconds of a step, by way, in one turn of each."""
        self._pipe.send(True)
        times: dict[str, float] = self._pipe.recv()
        return times

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def warm_up(way: str) -> int:
    """Steps before the first that is measured: a synthesizer's first windows are observed more closely than later ones."""
    return 3 if way in AS_IT_COMES or way in (PLAIN_KEPT, PRODUCTS, "none") else OBSERVED_FIRST + 1


def take_turns(name: str, bptt: int, ways: Sequence[str], kept: bool, threads: int, pipe: Connection) -> None:
    """The worker's side."""
    torch.set_num_threads(threads)
    now = time.process_time if threads == 1 else time.perf_counter
    if kept:
        keep_freed_memory()
    steps = {way: step_of(way, SETTINGS[name], bptt) for way in ways}
    for way, step in steps.items():
        for _ in range(warm_up(way)):
            step()
    while pipe.recv():
        times = {}
        for way, step in steps.items():
            begin = now()
            for _ in range(TURN):
                step()
            times[way] = 1e3 * (now() - begin) / TURN
        pipe.send(times)


def lines_of(name: str, bptt: int, found: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """One line a way: median, quartiles and mean of a step, and the ratios of medians."""
    lines = []
    medians = {way: statistics.median(times) for way, times in found.items()}
    for way, times in found.items():
        low, _, high = statistics.quantiles(times, n=4)
        ratios = {
            f"over {other}": medians[way] / medians[other]
            for other in (PLAIN, PLAIN_FUSED, PLAIN_KEPT, SEED, "none")
            if other in medians
        }
        lines.append(
            {
                "setting": name,
                "bptt": bptt,
                "way": way,
                "ms": medians[way],
                "quartiles": [low, high],
                "mean_ms": statistics.mean(times),
                "steps": TURN * len(times),
                **ratios,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Ratios of medians, a row for each cell of the grid."""
    cells: dict[tuple[str, int], dict[str, float]] = {(line["setting"], line["bptt"]): {} for line in lines}
    for line in lines:
        cells[line["setting"], line["bptt"]][line["way"]] = line["ms"]

    def ratio(medians: Mapping[str, float], one: str, other: str) -> str:
        return f"{medians[one] / medians[other]:.2f}" if one in medians and other in medians else NOTHING

    rows = [
        [
            name,
            str(bptt),
            *(f"{medians[way]:.1f}" if way in medians else NOTHING for way in ("none", ONE)),
            *(ratio(medians, "none", other) for other in (PLAIN, PLAIN_FUSED, PLAIN_KEPT)),
            *(ratio(medians, way, "none") for way in (PRODUCTS, *OURS) if way != "none"),
            ratio(medians, SEED, ONE),
        ]
        for (name, bptt), medians in cells.items()
    ]
    over = [f"none / {other}" for other in (PLAIN, PLAIN_FUSED, PLAIN_KEPT)]
    costs = [f"{way} / none" for way in (PRODUCTS, *OURS) if way != "none"]
    return markdown(["setting", "T", "none, ms", f"{ONE}, ms", *over, *costs, f"{SEED} / {ONE}"], rows)


def peak_mb() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_of(name: str, bptt: int, way: str, windows: int) -> dict[str, Any]:
    """Peak memory after 200 steps and after `windows`; run in a process of its own."""
    if way in KEPT:
        keep_freed_memory()
    step = step_of(way, SETTINGS[name], bptt)
    for _ in range(200):
        step()
    early = peak_mb()
    for _ in range(windows - 200):
        step()
    return {"setting": name, "bptt": bptt, "way": way, "peak_mb": early, "windows": windows, "peak_mb_at_end": peak_mb()}


def profile(name: str, bptt: int, way: str) -> str:
    """A table of where the time of 30 steps goes."""
    if way in KEPT:
        keep_freed_memory()
    step = step_of(way, SETTINGS[name], bptt)
    for _ in range(warm_up(way)):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(30):
            step()
    return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--bptt", nargs="+", type=int, help="window lengths, in the place of each setting's own")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=0.0, help="for each cell at least")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON lines; printed too")
    parser.add_argument("--profile", choices=SETTINGS, help="print where the time goes, of each --way and --bptt")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--windows", type=int, default=10_000, help="of --memory (default: 10000)")
    parser.add_argument("--one", nargs=3, metavar=("SETTING", "T", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--tables", type=Path, help="print lines that are on record, as a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.tables:
        print(table(read_lines(options.tables)))
        return
    if options.one:
        name, bptt, way = options.one
        print(json.dumps(memory_of(name, int(bptt), way, options.windows)))
        return
    if options.profile:
        for bptt in options.bptt or SETTINGS[options.profile].bptt:
            for way in options.way:
                print(f"{options.profile}, T = {bptt}, {way}\n{profile(options.profile, bptt, way)}")
        return
    lines = []
    for name in options.only:
        for bptt in options.bptt or SETTINGS[name].bptt:
            if options.memory:
                found = [in_process(name, bptt, way, options.windows) for way in options.way]
            else:
                found = lines_of(name, bptt, time_ways(name, bptt, options.way, options.seconds))
            for line in found:
                print(json.dumps(line), flush=True)
            lines += found
    if options.output:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def in_process(name: str, bptt: int, way: str, windows: int) -> dict[str, Any]:
    """`memory_of` in a fresh process."""
    command = [sys.executable, __file__, "--one", name, str(bptt), way, "--windows", str(windows)]
    command += ["--threads", str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    line: dict[str, Any] = json.loads(result.stdout)
    return line


if __name__ == "__main__":
    main()
