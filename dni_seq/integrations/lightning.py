"""Truncated BPTT and synthetic gradients inside Lightning: a mixin that trains by `SequenceTrainer`, and resumable windows.

    class Forecaster(SequenceMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = MyRNN()

        def configure_trainer(self):
            return dni.SequenceTrainer(self.model, torch.optim.Adam(self.model.parameters()), loss_fn)

    lightning.Trainer(max_epochs=3).fit(Forecaster(), ResumableWindows(stream))

A run through Lightning gives the same parameters as a loop over `SequenceTrainer.step`, also if the run is stopped and
resumed with `ckpt_path`. Needs the package lightning (`pip install 'dni-seq[lightning]'`), or pytorch_lightning. This
module imports neither of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from dni_seq.app.runs.checkpoint import random_state, set_random_state
from dni_seq.app.runs.loop import SavedPosition, measurements
from dni_seq.app.runs.run_log import RunLog
from dni_seq.core.windows import Window, first_tensor
from dni_seq.credit.results import StepResult
from dni_seq.trainer import SequenceTrainer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

KEY = "dni_seq"
"""Entry of a Lightning checkpoint that holds what the mixin saves."""

PRECISIONS = ("32-true", "64-true")


class ResumableWindows:
    """Turns a stream of windows into training data for Lightning, whose checkpoints resume after the last trained window.

    Lightning reads one window in advance, so the position of the stream itself is one window too far. One pass of the stream
    is an epoch of Lightning. Windows that Lightning has read but not trained on come again in the next epoch.

    Args:
        stream: an iterable of `Window`, or of tuples of its first fields. It has `state_dict` and `load_state_dict`, such as
            `dni_seq.integrations.datasets.windows` and `WindowStream`.

    Raises:
        TypeError: the stream has no position that can be saved.
    """

    def __init__(self, stream: SavedPosition) -> None:
        if not (callable(getattr(stream, "state_dict", None)) and callable(getattr(stream, "load_state_dict", None))):
            raise TypeError(
                f"ResumableWindows needs a stream with state_dict and load_state_dict, got {type(stream).__name__}: pass "
                "other windows as torch.utils.data.DataLoader(windows, batch_size=None)"
            )
        self.stream = stream
        self._trained = stream.state_dict()
        self._read: deque[dict[str, Any]] = deque()

    def __iter__(self) -> Iterator[Any]:
        """Yields the windows after the last one that was trained on."""
        if self._read:
            self.load_state_dict(self._trained)
        for window in self.stream:
            self._read.append(self.stream.state_dict())
            yield window

    def window_trained(self) -> None:
        """Moves the saved position by one window; call it after each window that was trained on."""
        self._trained = self._read.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last window that was trained on."""
        return self._trained

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position from `state_dict`."""
        self._read.clear()
        self._trained = state
        self.stream.load_state_dict(state)


class SequenceMixin(_Base):
    """Makes a LightningModule train with a `SequenceTrainer`, one window in each training step, by manual optimization.

    Name the mixin before LightningModule in the list of bases, define `configure_trainer`, and keep model and synthesizer as
    attributes, so that Lightning moves them to the device. Every window counts as a step in Lightning's settings, such as
    `max_steps` and `every_n_train_steps`. Set clipping, accumulation and reduced precision in `SequenceTrainer`: the
    settings of `lightning.Trainer` do not apply to manual optimization.

    Every `log_every_n_steps` windows the mixin logs the curves that the commands of dni_seq log, under the same keys and at
    the same steps: `train/loss`, `gradient/norm`, `synthetic/...` and others. Each point is the average since the last
    point. Callbacks can monitor these keys. The progress bar shows the loss of the latest window as `loss`.

    A Lightning checkpoint holds the state of the `SequenceTrainer` (parameters, optimizers, hidden state, synthesizer), the
    random state, and with `ResumableWindows` the position in the stream. For checkpoints of `every_n_train_steps`, Lightning
    warns that they hold the state after the step. This is no fault: a resumed run needs the state after the step.

    Attributes:
        sequence_trainer: the trainer that `configure_trainer` has returned, None before Lightning calls it.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.automatic_optimization = False
        self.sequence_trainer: SequenceTrainer | None = None
        self._windows: ResumableWindows | None = None
        self._averages = RunLog(None)
        self._loaded: Mapping[str, Any] | None = None
        self._ready = False

    def configure_trainer(self) -> SequenceTrainer:
        """Returns the trainer of the module's model; you must define it. The module is on its device when it is called."""
        raise NotImplementedError(f"{type(self).__name__} must define configure_trainer, which returns a SequenceTrainer")

    def configure_optimizers(self) -> Any:
        """Builds the trainer, and returns an optimizer with which Lightning counts the training steps.

        Raises:
            ValueError: Lightning runs on several devices, or in reduced precision.
        """
        if self.trainer.world_size > 1:
            raise ValueError(
                "SequenceMixin trains on one device, since DistributedDataParallel reduces gradients at other times: set "
                "devices=1, or use torchrun and SequenceTrainer(parallel=DataParallel(ranks))"
            )
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.trainer.precision!r} has no effect on SequenceTrainer: use precision='32-true' and "
                "SequenceTrainer(autocast=torch.bfloat16)"
            )
        self.sequence_trainer = self.configure_trainer()
        self._ready = False
        return _StepCounter(self.sequence_trainer.optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Trains on one window and returns its loss."""
        return self.train_window(batch).loss

    def train_window(self, window: Window | tuple[Any, ...]) -> StepResult:
        """Trains on one window and logs its measurements; call it in a `training_step` of your own.

        Raises:
            ValueError: at the first window, the training data have a position that Lightning would save one window too far
                (wrap them in `ResumableWindows`), or the checkpoint to resume holds no `SequenceTrainer`.
                `SequenceTrainer.step` raises further errors.
        """
        window = window if isinstance(window, Window) else Window(*window)
        trainer = self._begin()
        inputs, targets, mask, ends, lookahead = window
        results: list[StepResult] = []
        counter: Any = self.optimizers()
        counter.step(lambda: results.append(trainer.step(inputs, targets, ends=ends, mask=mask, lookahead=lookahead)))
        (result,) = results
        if self._windows is not None:
            self._windows.window_trained()
        self._log(window, result)
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the trainer's state, the random state and the averages to a checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.sequence_trainer is not None:
            parts = {"trainer": self.sequence_trainer.state_dict(), "averages": self._averages.state_dict()}
            checkpoint[KEY] = {**parts, "random": random_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the saved state until the first window, if Lightning resumes a run. `load_from_checkpoint` ignores it."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None:
            self._loaded = checkpoint.get(KEY, {})

    def _begin(self) -> SequenceTrainer:
        """Returns the trainer. At the first window, checks the training data and restores the state of a checkpoint."""
        trainer = self.sequence_trainer
        assert trainer is not None  # Lightning has called configure_optimizers
        if self._ready:
            return trainer
        data = self.trainer.train_dataloader
        self._windows = data if isinstance(data, ResumableWindows) else None
        if self._windows is None and hasattr(data, "load_state_dict"):
            raise ValueError(
                f"Lightning would save the position of {type(data).__name__} one window too far: pass "
                "ResumableWindows(stream)"
            )
        if self._loaded is not None:
            if not self._loaded:
                raise ValueError(f"the checkpoint holds no SequenceTrainer: its entry {KEY!r} is missing")
            trainer.load_state_dict(self._loaded["trainer"])
            self._averages.load_state_dict(self._loaded["averages"], self.device)
            set_random_state(self._loaded["random"])
            self._loaded = None
        self._ready = True
        return trainer

    def _log(self, window: Window, result: StepResult) -> None:
        """Logs the averages if they are due, and shows the messages of a step."""
        shape = first_tensor(window.targets).shape
        weight = shape[0] * shape[1] if window.mask is None else window.mask.sum()
        self._averages.add({"train/loss": result.loss, **measurements(result)}, weight, result.skipped)
        self.log("loss", result.loss, prog_bar=True, logger=False, batch_size=1)
        for event in result.events:
            self.print(event)
        trainer, lightning = self.sequence_trainer, cast("Any", self.trainer)
        assert trainer is not None
        if lightning.log_every_n_steps and lightning.global_step % lightning.log_every_n_steps == 0:
            points = {**self._averages.points(), **trainer.skip_counts()}
            self.log_dict(points, logger=False, batch_size=1)  # for callbacks
            # Not by `self.log`, which would repeat the latest value of a key that has no point at this step.
            for logger in self.loggers:
                logger.log_metrics(points, step=trainer.steps)
            self._averages.clear()


class _StepCounter:
    """The optimizer that Lightning sees: each step runs a closure, so that Lightning counts the windows.

    It has no state. The `SequenceTrainer` updates its own optimizer, and checkpoints hold that optimizer's state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.defaults: dict[str, Any] = optimizer.defaults
        self.state: dict[Any, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the trainer's optimizer, for LearningRateMonitor."""
        return self._optimizer.param_groups

    def step(self, closure: Callable[[], Any]) -> Any:
        """Runs the closure."""
        return closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: the trainer clears its gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing."""
