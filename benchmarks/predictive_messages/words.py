"""Penn Treebank by words: do predictive messages win over longer windows, exact gradients and multi-token heads?

python benchmarks/predictive_messages/words.py time --data DIR
    A step's CPU time of each method, in turns on an idle machine: what budgets are made of.
python benchmarks/predictive_messages/words.py run --data DIR --max-minutes 60
    The trials that are missing; several processes may run side by side.
python benchmarks/predictive_messages/words.py table
    What is on record, as Markdown.

DIR holds ptb.train.txt, ptb.valid.txt and ptb.test.txt. LSTM 2x200, 20 lanes, clip 0.25, fused Adam, one thread. A budget is
the CPU time of 1, 3 or 6 epochs of truncated BPTT at T = 35: a method makes as many steps as fit in it, by its step's time
measured idle, and its learning rate falls to zero linearly over them. docs/results/predictive_messages.md has the results.

Legend: T = window length in steps, B = lanes, m = steps predicted, S = numbers in a lane's packed state.
"""

from __future__ import annotations

import argparse
import collections
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trials import Line, Trial, best_value, key_of, lines_by_key, work

import dni_seq as dni
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.studies.records import append_line, read_lines
from dni_seq.models.language_model import LanguageModel, token_losses

LANES, UNITS, CLIP = 20, 200, 0.25
STEPS_PREDICTED = 5
"""m: the steps that predictors and multi-token heads predict."""

WORDS_PREDICTED = 500
"""Words that they distinguish: the most frequent ones, and one class for all others."""

EMBED, PREDICTOR_UNITS, PREDICTOR_RATE = 32, 256, 1e-3
REFERENCE = {"method": "none", "T": 35}
CURVE_POINTS = 6
DROPOUTS = (0.2, 0.35, 0.5)
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
RATES_OF_COMMAND = (1e-3, *RATES)


class Text:
    """A split as lanes of word ids [steps, B]."""

    def __init__(self, folder: Path, split: str, vocabulary: dict[str, int] | None = None) -> None:
        words = (folder / f"ptb.{split}.txt").read_text().replace("\n", " <eos> ").split()
        if vocabulary is None:
            vocabulary = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common())}
        self.vocabulary = vocabulary
        ids = torch.tensor([vocabulary.get(word, vocabulary["<unk>"]) for word in words])
        steps = len(ids) // LANES
        self.lanes = ids[: steps * LANES].view(LANES, steps).t().contiguous()

    def window(self, start: int, steps: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [T, B]."""
        return self.lanes[start : start + steps], self.lanes[start + 1 : start + steps + 1]

    def lookahead(self, starts: list[int], steps: int) -> dni.Lookahead:
        """The steps from each of `starts` on, side by side along the batch dimension: [m, len(starts) B]."""
        inputs, targets = zip(*(self.window(start, steps) for start in starts), strict=True)
        side_by_side = torch.cat(inputs, 1)
        return dni.Lookahead(side_by_side, torch.cat(targets, 1), torch.ones_like(side_by_side, dtype=torch.bool))


class FirstWords(nn.Embedding):
    """An embedding of the most frequent words; the others share the last row."""

    def forward(self, ids: Tensor) -> Tensor:
        """[..., E] of ids [...]."""
        return super().forward(ids.clamp(max=self.num_embeddings - 1))


def first_words_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [m, B] among the most frequent words and one class for the others."""
    return token_losses(logits, targets.clamp(max=WORDS_PREDICTED - 1))


class Truncated:
    """Truncated BPTT by a plain loop; methods that are not in the library add to its `roots`.

    Args:
        model: the language model.
        trial: the settings.

    Attributes:
        reach: steps after the window that a method reads.
        extra: what trains beside the model, None for nothing.
    """

    reach = 0

    def __init__(self, model: LanguageModel, trial: Trial) -> None:
        self.model, self.window, self.weight = model, trial["T"], trial.get("weight", 1.0)
        self.optimizer = torch.optim.Adam(model.parameters(), trial["lr"], fused=True)
        self.extra = self.build_extra(model)
        self.extra_optimizer = None
        if self.extra is not None:
            self.extra_optimizer = torch.optim.Adam(self.extra.parameters(), PREDICTOR_RATE, fused=True)
        self.restart()

    def build_extra(self, model: LanguageModel) -> nn.Module | None:
        """The module that trains beside the model."""
        return None

    def restart(self) -> None:
        """The lanes start from the initial state."""
        self.state: Any = self.model.initial_state(LANES)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those whose rates follow the schedule."""
        return [self.optimizer] + ([] if self.extra_optimizer is None else [self.extra_optimizer])

    def step(self, text: Text, start: int) -> None:
        """One update, from the window at `start`."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.state = tuple(leaf.detach() for leaf in self.state)
        roots, gradients = self.roots(text, start)
        torch.autograd.backward(roots, gradients)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()

    def roots(self, text: Text, start: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """What the backward pass starts from, with the gradients that arrive there (None at a loss)."""
        inputs, targets = text.window(start, self.window)
        outputs, self.state = self.model(inputs, self.state)
        return [token_losses(outputs, targets).mean()], [None]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        modules = [self.model] + ([] if self.extra is None else [self.extra])
        parts = [part.state_dict() for part in (*modules, *self.optimizers)]
        return {"parts": parts, "state": [leaf.detach() for leaf in self.state]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        modules = [self.model] + ([] if self.extra is None else [self.extra])
        for part, value in zip((*modules, *self.optimizers), saved["parts"], strict=True):
            part.load_state_dict(value)
        self.state = tuple(saved["state"])


class MultiToken(Truncated):
    """Heads on the top layer's output at every step predict the words 2 to m steps ahead; their losses share `weight`."""

    reach = STEPS_PREDICTED

    def build_extra(self, model: LanguageModel) -> nn.Module:
        """m - 1 heads of one hidden layer, and a layer to the words that they share."""
        heads = [nn.Sequential(nn.Linear(UNITS, PREDICTOR_UNITS), nn.Tanh()) for _ in range(STEPS_PREDICTED - 1)]
        model.projection.register_forward_pre_hook(self.keep_top)
        return nn.ModuleList([*heads, nn.Linear(PREDICTOR_UNITS, WORDS_PREDICTED)])

    def keep_top(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keeps what the projection reads, [T, B, H]."""
        self.top = inputs[0]

    def roots(self, text: Text, start: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """The window's loss plus the mean loss of each head."""
        (loss,), _ = super().roots(text, start)
        assert isinstance(self.extra, nn.ModuleList)
        *heads, words = self.extra
        further = loss.new_zeros(())
        for distance, head in enumerate(heads, start=1):
            _, targets = text.window(start + distance, self.window)
            further = further + first_words_losses(words(head(self.top)), targets).mean()
        return [loss + self.weight / len(heads) * further], [None]


class Messages(Truncated):
    """A predictor of the next m steps reads states in the window and at its end, and sends each the gradient of its loss.

    The predictor's loss at one state is the mean over its m steps and the lanes, times `weight`.
    """

    reach = STEPS_PREDICTED
    inner, end = True, True

    def __init__(self, model: LanguageModel, trial: Trial) -> None:
        super().__init__(model, trial)
        self.every = trial.get("every", self.window)

    def build_extra(self, model: LanguageModel) -> nn.Module:
        """The predictor: one tanh layer on the packed state and the inputs ahead, and a layer to the words."""
        size = sum(leaf.numel() for leaf in model.initial_state(1))
        embedding = FirstWords(WORDS_PREDICTED, EMBED)
        sizes = {"inputs_width": EMBED, "outputs": WORDS_PREDICTED, "units": PREDICTOR_UNITS}
        return dni.FutureModel(size, STEPS_PREDICTED, inputs=embedding, loss_fn=first_words_losses, **sizes)

    def roots(self, text: Text, start: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """The window's loss, and the states with their messages."""
        inputs, targets = text.window(start, self.window)
        outputs, states, starts = [], [], []
        for first in range(0, self.window, self.every):
            last = min(first + self.every, self.window)
            output, self.state = self.model(inputs[first:last], self.state)
            outputs.append(output)
            if self.end if last == self.window else self.inner:
                states.append(self.state)
                starts.append(start + last)
        loss = token_losses(torch.cat(outputs), targets).mean()
        leaves = [torch.cat([state[i] for state in states], 1) for i in range(2)]
        gradients = self.messages(leaves, text.lookahead(starts, STEPS_PREDICTED), len(states))
        return [loss, *leaves], [None, *gradients]

    def messages(self, leaves: list[Tensor], lookahead: dni.Lookahead, count: int) -> list[Tensor]:
        """The gradient of the predictor's loss with respect to (h, c) [L, count B, H]; it trains in the same pass."""
        assert isinstance(self.extra, dni.FutureModel)
        hidden, cells = (leaf.detach().requires_grad_() for leaf in leaves)
        packed = torch.cat([*hidden.unbind(), *torch.tanh(cells).unbind()], 1)
        self.extra.loss(packed, lookahead).backward()
        # The loss is a mean over all states: with a weight of its own each state has the mean over its lanes.
        return [leaf.grad * (count * self.weight) for leaf in (hidden, cells) if leaf.grad is not None]


class InnerMessages(Messages):
    """Messages inside the window alone: an auxiliary objective, without credit from after the window."""

    end = False


class EndMessage(Messages):
    """The message at the window's end alone, which is credit from the steps after the window."""

    inner = False


class Trained:
    """`SequenceTrainer` with a synthesizer of the library, so that a column is what a user gets."""

    reach = STEPS_PREDICTED

    def __init__(self, model: LanguageModel, trial: Trial) -> None:
        optimizer = torch.optim.Adam(model.parameters(), trial["lr"], fused=True)
        synthesizer, learns = self.synthesizer(model, trial["T"])
        second = None
        if synthesizer is not None and learns:
            second = torch.optim.Adam(synthesizer.parameters(), PREDICTOR_RATE, fused=True)
        self.trainer = dni.SequenceTrainer(
            model,
            optimizer,
            token_losses,
            synthesizer=synthesizer,
            synthesizer_optimizer=second,
            synthetic_scale=1.0,
            discount=1.0,
            clip=CLIP,
            synthesizer_clip=None,
            regress_every=100 if learns else 1,
        )
        self.optimizers = [optimizer] + ([] if second is None else [second])
        self.window = trial["T"]

    def synthesizer(self, model: LanguageModel, window: int) -> tuple[nn.Module | None, bool]:
        """The synthesizer, and whether it has parameters to train."""
        raise NotImplementedError

    def restart(self) -> None:
        """The lanes start from the initial state."""
        self.trainer.reset()

    def step(self, text: Text, start: int) -> None:
        """One update, from the window at `start`."""
        lookahead = text.lookahead([start + self.window], self.reach) if self.reach else None
        self.trainer.step(*text.window(start, self.window), lookahead=lookahead)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return self.trainer.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.trainer.load_state_dict(saved, LANES)


class Plain(Trained):
    """Truncated BPTT by the library."""

    reach = 0

    def synthesizer(self, model: LanguageModel, window: int) -> tuple[nn.Module | None, bool]:
        """None."""
        return None, False


class Exact(Trained):
    """The exact gradient of the next 4 steps at the window's end."""

    reach = 4

    def synthesizer(self, model: LanguageModel, window: int) -> tuple[nn.Module, bool]:
        """`ExactFuture` of 4 steps."""
        return dni.ExactFuture(model, token_losses, steps=self.reach, window=window), False


class MultiHorizon(Trained):
    """The command's default by words: the gradient of a predictor of the next window."""

    def synthesizer(self, model: LanguageModel, window: int) -> tuple[nn.Module, bool]:
        """One horizon of `FutureGradient`."""

        def future(size: int) -> dni.FutureModel:
            embedding = FirstWords(WORDS_PREDICTED, EMBED)
            sizes = {"inputs_width": EMBED, "outputs": WORDS_PREDICTED, "units": PREDICTOR_UNITS}
            return dni.FutureModel(size, self.reach, inputs=embedding, loss_fn=first_words_losses, **sizes)

        messages = dni.FutureGradient(model.initial_state(1), future, window=window, cells=dni.LSTM_CELLS, limit=10.0)
        return dni.Horizons(messages, horizons=1), True


METHODS: dict[str, type[Truncated] | type[Trained]] = {
    "none": Plain,
    "multi-token": MultiToken,
    "dense": Messages,
    "dense, no end": InnerMessages,
    "end alone": EndMessage,
    "exact": Exact,
    "multi-horizon": MultiHorizon,
}


@torch.no_grad()
def perplexity(model: LanguageModel, text: Text) -> float:
    """Of a split, with the state carried through it."""
    model.eval()
    state, total, count = model.initial_state(LANES), 0.0, 0
    for start in range(0, len(text.lanes) - 1, 70):
        inputs, targets = text.window(start, min(70, len(text.lanes) - 1 - start))
        outputs, state = model(inputs, state)
        total += float(token_losses(outputs, targets).sum())
        count += targets.numel()
    model.train()
    return math.exp(min(total / count, 50.0))


def learner_of(trial: Trial, vocabulary: int) -> tuple[LanguageModel, Truncated | Trained]:
    """The model and what trains it. Weights and dropout are drawn from the trial's seed."""
    torch.manual_seed(trial["seed"])
    model = LanguageModel(vocabulary, embed=UNITS, hidden=UNITS, layers=2, dropout=trial["dropout"])
    return model, METHODS[trial["method"]](model, trial)


class Runner:
    """Runs trials on texts that are read once.

    Args:
        folder: of the three files.
        results: the JSON lines; step times are read from there.
    """

    def __init__(self, folder: Path, results: Path) -> None:
        self.train = Text(folder, "train")
        self.valid, self.test = (Text(folder, split, self.train.vocabulary) for split in ("valid", "test"))
        self.results = results

    def steps_of(self, trial: Trial) -> int:
        """Updates that fit in the trial's budget, or that its epochs take."""
        if "epochs" in trial:
            return int(trial["epochs"] * ((len(self.train.lanes) - 1) // trial["T"]))
        times = step_times(self.results)
        epoch = (len(self.train.lanes) - 1) // REFERENCE["T"] * times[kind_of(REFERENCE)]
        return round(trial["budget"] * epoch / times[kind_of(trial)])

    def __call__(self, trial: Trial, checkpoint: Path) -> Line:
        """Trains to the end of the budget."""
        total = self.steps_of(trial)
        model, learner = learner_of(trial, len(self.train.vocabulary))
        done, position, curve = 0, 0, []
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            learner.load_state_dict(saved["learner"])
            done, position, curve = saved["done"], saved["position"], saved["curve"]
            torch.set_rng_state(saved["random"])
        rates = [[group["lr"] for group in o.param_groups] for o in optimizers_at(learner, trial)]
        while done < total:
            if position + learner.window + learner.reach + 1 > len(self.train.lanes):
                position = 0
                learner.restart()
            if trial["schedule"] == "linear":
                set_rates(learner, rates, 1 - done / total)
            learner.step(self.train, position)
            position += learner.window
            done += 1
            if done % math.ceil(total / CURVE_POINTS) == 0 and done < total:
                curve.append([done, round(perplexity(model, self.valid), 3)])
                torch.save(
                    {
                        "learner": learner.state_dict(),
                        "done": done,
                        "position": position,
                        "curve": curve,
                        "random": torch.get_rng_state(),
                    },
                    checkpoint,
                )
        scores = {"valid": round(perplexity(model, self.valid), 3), "test": round(perplexity(model, self.test), 3)}
        checkpoint.unlink(missing_ok=True)
        return {**scores, "steps": total, "curve": [*curve, [total, scores["valid"]]]}


def optimizers_at(learner: Truncated | Trained, trial: Trial) -> list[torch.optim.Optimizer]:
    """The learner's optimizers with the rates that the schedule starts from, whatever a checkpoint held."""
    first, *others = learner.optimizers
    for optimizer, rate in ((first, trial["lr"]), *((other, PREDICTOR_RATE) for other in others)):
        for group in optimizer.param_groups:
            group["lr"] = rate
    return learner.optimizers


def set_rates(learner: Truncated | Trained, rates: list[list[float]], factor: float) -> None:
    """Sets every learning rate to a share of what it starts from."""
    for optimizer, of_groups in zip(learner.optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, of_groups, strict=True):
            group["lr"] = rate * factor


def kind_of(trial: Trial) -> str:
    """What decides the time of a step: the method, T and the distance between messages."""
    every = f" every {trial['every']}" if "every" in trial else ""
    return f"{trial['method']} T={trial['T']}{every}"


TIMED: list[Trial] = [
    *({"method": "none", "T": bptt} for bptt in (5, 10, 20, 35)),
    {"method": "exact", "T": 5},
    {"method": "exact", "T": 20},
    {"method": "multi-token", "T": 35},
    {"method": "dense", "T": 35, "every": 5},
    {"method": "dense, no end", "T": 35, "every": 5},
    {"method": "end alone", "T": 35},
    {"method": "multi-horizon", "T": 5},
]


def measure_steps(folder: Path, results: Path, rounds: int = 9) -> None:
    """CPU seconds of a step of each method, median over rounds in which all take turns; one line on record.

    Each method has a process of its own, as a user's run has, since what lies in memory decides a part of the time.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in TIMED]
    processes = [
        context.Process(target=serve_steps, args=(folder, trial, theirs), daemon=True)
        for trial, (_, theirs) in zip(TIMED, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    for ours, _ in pipes:
        ours.recv()  # ready: nobody loads beside a measurement
    samples: dict[str, list[float]] = {kind_of(trial): [] for trial in TIMED}
    for round_number in range(rounds + 1):
        for trial, (ours, _) in zip(TIMED, pipes, strict=True):
            ours.send(max(3, 280 // trial["T"]))
            seconds = ours.recv()
            if round_number:  # the first round warms up
                samples[kind_of(trial)].append(seconds)
    for process in processes:
        process.terminate()
    medians = {kind: round(statistics.median(values), 6) for kind, values in samples.items()}
    ranges = {kind: [round(min(values), 6), round(max(values), 6)] for kind, values in samples.items()}
    line = {"step_seconds": medians, "ranges": ranges, "rounds": rounds, "date": time.strftime("%Y-%m-%d")}
    append_line(results, {"study": "words", **line})
    for kind, value in medians.items():
        print(f"{1000 * value:8.2f} ms  {value / medians[kind_of(REFERENCE)]:5.2f}  {kind}")


def serve_steps(folder: Path, trial: Trial, pipe: Any) -> None:
    """In a process of its own: makes as many steps as it is told, and returns CPU seconds a step."""
    torch.set_num_threads(1)
    keep_freed_memory()
    text = Text(folder, "train")
    learner = learner_of({**trial, "lr": 1e-3, "dropout": 0.2, "seed": 0}, len(text.vocabulary))[1]
    position = 0
    pipe.send("ready")
    while True:
        steps = pipe.recv()
        begun = time.process_time()
        for _ in range(steps):
            learner.step(text, position)
            position += trial["T"]
        pipe.send((time.process_time() - begun) / steps)


def step_times(results: Path) -> dict[str, float]:
    """The latest step times on record, in seconds.

    Raises:
        SystemExit: none are.
    """
    found = [line["step_seconds"] for line in read_lines(results) if line.get("study") == "words"]
    if not found:
        raise SystemExit(f"{results} has no step times: run the part 'time' on an idle machine first")
    return dict(found[-1])


def trial_of(method: str, bptt: int, lr: float, budget: float, dropout: float = 0.2, seed: int = 1, **more: Any) -> Trial:
    """A trial's settings."""
    settings = {"task": "words", "method": method, "T": bptt, "lr": lr, "budget": budget, "dropout": dropout, "seed": seed}
    return {**settings, "schedule": "linear", **more}


def score(line: Line) -> float:
    """What trials are chosen by."""
    return float(line["valid"])


def tuned(known: dict[str, Line], make: Any, values: tuple[float, ...], first: int) -> tuple[list[Trial], float | None]:
    """The trials of a search along `values`, from the two at `first` outwards, and the best value once it is bracketed."""
    low, high = first, first + 1
    while True:
        trials = [make(value) for value in values[low : high + 1]]
        if any(key_of(trial) not in known for trial in trials):
            return trials, None
        scores = [score(known[key_of(trial)]) for trial in trials]
        if scores[-1] == min(scores) and high + 1 < len(values):
            high += 1
        elif scores[0] == min(scores) and low > 0:
            low -= 1
        else:
            return trials, values[low + scores.index(min(scores))]


class Column:
    """The trials of one method: its rate at the budget of 1, its rate and dropout at 3, then the largest budget.

    Args:
        method: its name.
        windows: the window lengths among which the budget of 1 decides.
        more: settings of every trial.
        weights: message or head weights among which the budget of 1 decides, after the rate.
    """

    def __init__(self, method: str, windows: tuple[int, ...], weights: tuple[float, ...] = (), **more: Any) -> None:
        self.method, self.windows, self.weights, self.more = method, windows, weights, more

    def chosen(self, known: dict[str, Line]) -> tuple[list[Trial], dict[str, Any] | None]:
        """All trials so far wanted, and the settings that the budget of 1 chose, None while trials are missing."""
        wanted: list[Trial] = []
        best: list[Trial] = []
        first = {"weight": self.weights[0]} if self.weights else {}
        for bptt in self.windows:

            def make(lr: float, bptt: int = bptt) -> Trial:
                return trial_of(self.method, bptt, lr, 1, **first, **self.more)

            trials, rate = tuned(known, make, RATES, first=1)
            wanted += trials
            if rate is not None:
                best.append(make(rate))
        if len(best) < len(self.windows):
            return wanted, None
        settings = min(best, key=lambda trial: score(known[key_of(trial)]))
        others = [{**settings, "weight": weight} for weight in self.weights[1:]]
        wanted += others
        weight = best_value(known, [settings, *others], "weight", score) if others else None
        if others and weight is None:
            return wanted, None
        return wanted, {**settings, **({"weight": weight} if others else {})}

    def trials(self, known: dict[str, Line]) -> Iterator[Trial]:
        """All trials that can be run now."""
        wanted, settings = self.chosen(known)
        yield from wanted
        if settings is None:
            return
        lower = max((rate for rate in RATES if rate < settings["lr"]), default=settings["lr"])
        pair = [{**settings, "budget": 3, "lr": rate} for rate in dict.fromkeys((lower, settings["lr"]))]
        yield from pair
        rate = best_value(known, pair, "lr", score)
        if rate is None:
            return
        settings = {**settings, "lr": rate}
        found, dropout = tuned(known, lambda value: {**settings, "budget": 3, "dropout": value}, DROPOUTS, first=0)
        yield from found
        if dropout is not None:
            yield {**settings, "budget": 6, "dropout": dropout}

    def final(self, known: dict[str, Line]) -> Trial | None:
        """The trial at the largest budget, None while it is not decided."""
        last = list(self.trials(known))[-1]
        return last if last["budget"] == 6 else None


COLUMNS = {
    "none": Column("none", (35, 20, 10)),
    "dense": Column("dense", (35,), (1.0, 0.3, 0.1), every=5),
    "multi-token": Column("multi-token", (35,), (1.0, 0.3, 0.1, 4.0)),
    "exact": Column("exact", (20, 5)),
    "multi-horizon": Column("multi-horizon", (5,)),
}


def constant_rates(known: dict[str, Line]) -> Iterator[Trial]:
    """One epoch at a constant rate, as the command trains: truncated BPTT at each T, and the command's default."""
    for method, windows in (("none", (5, 10, 20, 35)), ("multi-horizon", (5,))):
        for bptt in windows:

            def make(lr: float, method: str = method, bptt: int = bptt) -> Trial:
                trial = trial_of(method, bptt, lr, 1)
                del trial["budget"]
                return {**trial, "epochs": 1, "schedule": "constant"}

            yield from tuned(known, make, RATES_OF_COMMAND, first=1)[0]


def plan(known: dict[str, Line]) -> Iterator[Trial]:
    """Every trial that can be run now, in order of value: columns to the budget of 1, then 3, then 6, then the rest."""
    wanted = [trial for column in COLUMNS.values() for trial in column.trials(known)]
    yield from (trial for trial in wanted if trial["budget"] == 1)
    yield from constant_rates(known)
    yield from (trial for trial in wanted if trial["budget"] == 3)
    yield from (trial for trial in wanted if trial["budget"] == 6)
    dense = COLUMNS["dense"].final(known)
    if dense is not None:  # parts of it, at its own settings
        whole = {name: value for name, value in dense.items() if name != "every"}
        for part in ({**dense, "method": "dense, no end"}, {**whole, "method": "end alone"}):
            yield from ({**part, "budget": budget} for budget in (3, 6))
    finals = [column.final(known) for column in COLUMNS.values()]
    done = [trial for trial in finals if trial is not None and key_of(trial) in known]
    if len(done) == len(finals):
        for trial in sorted(done, key=lambda trial: score(known[key_of(trial)]))[:2]:
            yield {**trial, "seed": 2}


def table(results: Path) -> Iterable[str]:
    """The lines on record as a table of Markdown."""
    yield "| method | T | rate | dropout | weight | budget | seed | schedule | steps | validation | test |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    lines = [line for line in lines_by_key(results).values() if line["trial"]["task"] == "words"]
    for line in sorted(lines, key=lambda line: (line["trial"]["method"], line["trial"].get("budget", 0), line["valid"])):
        trial = line["trial"]
        cells = [
            trial["method"],
            trial["T"],
            trial["lr"],
            trial["dropout"],
            trial.get("weight", ""),
            trial.get("budget", "an epoch"),
        ]
        cells += [trial["seed"], trial["schedule"], line["steps"], f"{line['valid']:.1f}", f"{line['test']:.1f}"]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("time", "run", "table", "plan"))
    parser.add_argument("--data", type=Path, default=Path("data/ptb"), metavar="DIR")
    parser.add_argument("--results", type=Path, default=Path("docs/results/predictive_messages.jsonl"), metavar="FILE")
    parser.add_argument("--scratch", type=Path, default=Path("runs/predictive_messages"), metavar="DIR")
    parser.add_argument("--max-minutes", type=float, default=math.inf, metavar="M", help="start no trial later than this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.part == "table":
        print("\n".join(table(options.results)))
    elif options.part == "plan":
        known = lines_by_key(options.results)
        print("\n".join(key_of(trial) for trial in plan(known) if key_of(trial) not in known))
    elif options.part == "time":
        measure_steps(options.data, options.results)
    else:
        work(options.results, options.scratch, plan, Runner(options.data, options.results), options.max_minutes)


if __name__ == "__main__":
    main()
