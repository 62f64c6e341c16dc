"""Trials of the frontier study on Penn Treebank by words and by characters. The learning rate falls to zero over the budget.

Legend: T = window length in steps, B = lanes, m = steps of lookahead.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from methods import PREDICTOR_RATE, Parts, kind_of, lookahead_of, modules_of, observed_first, optimizers_of, trainer_of

import dni_seq as dni
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.models.language_model import LanguageModel, token_losses

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "predictive_messages"))
from memory import peak_mib, reset_peak, saved_bytes
from trials import Line, Trial, save_whole, serve_steps
from word_learners import CLIP, LANES, UNITS, Text

CURVE_POINTS = 6
EVALUATION_STEPS = 70


@dataclass(frozen=True)
class TextTask:
    """A text, its model, and the unit of a trial's budget.

    Attributes:
        tokens: "words" or "characters".
        lanes: B.
        model: arguments of `LanguageModel`, without the vocabulary and dropout.
        clip: largest norm of the gradient.
        reference: the T at which an epoch of truncated BPTT, in CPU time on an idle machine, is the unit of budgets.
        curve_steps: number of steps of the validation text on which points of the curve are measured; None for all steps.
        bits: whether the quality is bits a character; otherwise it is perplexity.
    """

    tokens: str
    lanes: int
    model: Mapping[str, Any]
    clip: float
    reference: int
    curve_steps: int | None
    bits: bool

    @property
    def unit(self) -> str:
        """The quality's name."""
        return "bits a character" if self.bits else "perplexity"

    def quality(self, loss: float) -> float:
        """Returns the quality of a mean loss in nats."""
        return round(loss / math.log(2), 4) if self.bits else round(math.exp(min(loss, 50.0)), 3)


TASKS: Mapping[str, TextTask] = MappingProxyType(
    {
        "words": TextTask("words", LANES, {"embed": UNITS, "hidden": UNITS, "layers": 2}, CLIP, 35, None, False),
        "characters": TextTask("characters", 64, {"embed": 64, "hidden": 512, "layers": 1}, 1.0, 50, 1000, True),
    }
)


class Characters(Text):
    """A split as lanes of character ids [steps, B]. The end of a line is a character too."""

    def __init__(self, folder: Path, split: str, lanes: int, vocabulary: dict[str, int] | None = None) -> None:
        text = (folder / f"ptb.{split}.txt").read_text()
        self.vocabulary = {each: i for i, each in enumerate(sorted(set(text)))} if vocabulary is None else vocabulary
        ids = torch.tensor([self.vocabulary[each] for each in text if each in self.vocabulary])
        steps = len(ids) // lanes
        self.lanes = ids[: steps * lanes].view(lanes, steps).t().contiguous()


class Splits:
    """The three splits of a task's text.

    Args:
        task: the task, by words or by characters.
        folder: folder that holds ptb.train.txt, ptb.valid.txt and ptb.test.txt.
    """

    def __init__(self, task: TextTask, folder: Path) -> None:
        self.task = task
        self.train = self.read(folder, "train", None)
        self.valid, self.test = (self.read(folder, split, self.train.vocabulary) for split in ("valid", "test"))

    def read(self, folder: Path, split: str, vocabulary: dict[str, int] | None) -> Text:
        """Reads and returns a split. Without a `vocabulary`, the split has its own."""
        if self.task.tokens == "words":
            return Text(folder, split, vocabulary)
        return Characters(folder, split, self.task.lanes, vocabulary)

    @property
    def steps(self) -> int:
        """Number of steps of a lane of the training text that have a target."""
        return len(self.train.lanes) - 1


def trainer_for(trial: Trial, splits: Splits) -> dni.SequenceTrainer:
    """Returns the trainer of a trial. The trial's seed decides initial weights and dropout."""
    task, known = splits.task, len(splits.train.vocabulary)
    torch.manual_seed(trial["seed"])
    model = LanguageModel(known, dropout=trial["dropout"], **task.model)
    parts = Parts(
        model,
        token_losses,
        torch.zeros(trial["T"], 1, dtype=torch.long),
        vocabulary=known,
        outputs=None,
        past_loss_fn=None,
        clip=task.clip,
        reduction="mean",
    )
    return trainer_of(trial, parts)


class Reader:
    """Trains on the training text window by window. At the end of the text, starts again from its beginning.

    Args:
        trainer: the trainer.
        text: the training text.
        bptt: T.
    """

    def __init__(self, trainer: dni.SequenceTrainer, text: Text, bptt: int) -> None:
        self.trainer, self.text, self.bptt = trainer, text, bptt
        self.reach, self.position = lookahead_of(trainer), 0

    def step(self) -> None:
        """Makes one update."""
        if self.position + self.bptt + self.reach + 1 > len(self.text.lanes):
            self.position = 0
            self.trainer.reset()
        end = self.position + self.bptt
        lookahead = self.text.lookahead([end], self.reach) if self.reach else None
        self.trainer.step(*self.text.window(self.position, self.bptt), lookahead=lookahead)
        self.position = end


@torch.no_grad()
def mean_loss(model: LanguageModel, text: Text, steps: int | None = None) -> float:
    """Returns the mean loss in nats on the first `steps` steps of a split, None for all. The state is carried throughout."""
    model.eval()
    stop = min(len(text.lanes) - 1, steps or len(text.lanes))
    state, total, count = model.initial_state(text.lanes.shape[1]), 0.0, 0
    for start in range(0, stop, EVALUATION_STEPS):
        inputs, targets = text.window(start, min(EVALUATION_STEPS, stop - start))
        outputs, state = model(inputs, state)
        total += float(token_losses(outputs, targets).sum())
        count += targets.numel()
    model.train()
    return total / count


def updates_of(trial: Trial, splits: Splits, seconds: Mapping[str, float]) -> int:
    """Returns the number of updates that fit in a trial's budget.

    Args:
        trial: the settings.
        splits: the text.
        seconds: idle CPU seconds of an update by kind.
    """
    reference = splits.task.reference
    epoch = splits.steps // reference * seconds[kind_of({"method": "none", "T": reference})]
    return max(1, round(trial["budget"] * epoch / seconds[kind_of(trial)]))


def set_rates(trainer: dni.SequenceTrainer, trial: Trial, factor: float) -> None:
    """Sets the learning rates to `factor` times the initial rates."""
    for optimizer, rate in zip(optimizers_of(trainer), (trial["rate"], PREDICTOR_RATE), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def run(trial: Trial, checkpoint: Path, splits: Splits, seconds: Mapping[str, float]) -> Line:
    """Trains to the end of the trial's budget and returns its line. Resumes from the checkpoint if it exists."""
    reset_peak()
    task, total = splits.task, updates_of(trial, splits, seconds)
    trainer = trainer_for(trial, splits)
    reader = Reader(trainer, splits.train, trial["T"])
    model: Any = trainer.model
    done, curve = resume(checkpoint, reader)
    while done < total:
        set_rates(trainer, trial, 1 - done / total)
        reader.step()
        done += 1
        if done % math.ceil(total / CURVE_POINTS) == 0 and done < total:
            curve.append([done, task.quality(mean_loss(model, splits.valid, task.curve_steps))])
            save(checkpoint, reader, done, curve)
    peak = peak_mib()
    valid, test = (task.quality(mean_loss(model, text)) for text in (splits.valid, splits.test))
    checkpoint.unlink(missing_ok=True)
    idle = round(total * seconds[kind_of(trial)], 1)
    counts = {"updates": total, "steps": total * trial["T"], "seconds": idle}
    return {"quality": valid, "test": test, **counts, "curve": [*curve, [total, valid]], "peak_mib": peak}


def resume(checkpoint: Path, reader: Reader) -> tuple[int, list[list[float]]]:
    """Restores the reader from a trial's checkpoint, and returns the updates so far and the curve so far.

    Returns 0 and an empty curve if no checkpoint exists.
    """
    if not checkpoint.exists():
        return 0, []
    saved = torch.load(checkpoint, weights_only=True)
    reader.trainer.load_state_dict(saved["trainer"], reader.text.lanes.shape[1])
    reader.position = saved["position"]
    torch.set_rng_state(saved["random"])
    return saved["done"], saved["curve"]


def save(checkpoint: Path, reader: Reader, done: int, curve: list[list[float]]) -> None:
    """Writes the checkpoint that `resume` reads."""
    parts = {"trainer": reader.trainer.state_dict(), "position": reader.position, "random": torch.get_rng_state()}
    save_whole(checkpoint, {**parts, "done": done, "curve": curve})


def kept_for_backward(trial: Trial, splits: Splits) -> int:
    """Returns the bytes that an update saves for its backward passes.

    The updates before the counted update, as many as the setting `back` says, provide the earlier windows over which the
    loss of the counted update is propagated back.
    """
    trainer = trainer_for({"dropout": 0.0, "rate": 1e-3, **trial, "seed": 0}, splits)
    reader = Reader(trainer, splits.train, trial["T"])
    for _ in range(trial.get("back", 1)):
        reader.step()
    return saved_bytes(reader.step, modules_of(trainer))


def serve(trial: Trial, folder: Path, pipe: Any) -> None:
    """The program of a process that times the updates of a trial; see `measure_in_turns`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    splits = Splits(TASKS[trial["task"]], folder)
    reader = Reader(trainer_for({"dropout": 0.0, "rate": 1e-3, **trial, "seed": 0}, splits), splits.train, trial["T"])
    for _ in range(observed_first(reader.trainer)):
        reader.step()
    serve_steps(reader.step, pipe)
