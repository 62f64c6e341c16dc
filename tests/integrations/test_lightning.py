"""Lightning: its runs train the numbers of the plain loop, also resumed, and log what our commands log."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import dni_seq as dni
from dni_seq.app.runs.loop import measurements
from dni_seq.app.runs.metrics_file import read_curves
from dni_seq.app.runs.run_log import RunLog
from dni_seq.app.runs.trackers import METRICS
from dni_seq.integrations import datasets
from dni_seq.integrations.lightning import KEY, ResumableWindows, SequenceMixin
from dni_seq.models.language_model import LanguageModel
from tests.events import points
from tests.nests import assert_same

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
arrow = pytest.importorskip("datasets")

# Lightning reads a name that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

VOCABULARY, LANES, STEPS = 5, 2, 3


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def stream(lookahead: int = STEPS) -> datasets.DatasetWindows:
    """Twenty windows an epoch, and some."""
    ids = torch.randint(VOCABULARY, (127,), generator=torch.Generator().manual_seed(3)).tolist()
    table = arrow.Dataset.from_dict({"input_ids": [ids[:50], ids[50:]]})
    return datasets.windows(table, lanes=LANES, bptt=STEPS, lookahead=lookahead)


class Parts(torch.nn.Module):
    """A model with dropout, and a synthesizer that draws its messages from a part of the windows."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LanguageModel(VOCABULARY, embed=4, hidden=6, layers=1, dropout=0.3)
        encoder = dni.LookaheadEncoder(STEPS, torch.nn.Embedding(VOCABULARY, 3), torch.nn.Embedding(VOCABULARY, 3))
        state = self.model.initial_state(1)
        self.synthesizer = dni.MultiHorizonSynthesizer(state, hidden=(8,), encoder=encoder, cells=dni.LSTM_CELLS)

    def trainer(self, clip: float = 1.0) -> dni.SequenceTrainer:
        config = dni.SyntheticGradientConfig(synthetic_scale="auto", fidelity_every=6, regress_every=2, replay_windows=2)
        adam = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        both: dict[str, Any] = {"synthesizer": self.synthesizer, "config": config}
        return dni.SequenceTrainer(self.model, adam, losses, clip=clip, **both)


class Module(SequenceMixin, lightning.LightningModule):
    """A module as a user writes it; `stop_at` is the window at which the process dies."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.parts, self.stop_at, self.seen = Parts(), stop_at, []

    def configure_trainer(self) -> dni.SequenceTrainer:
        return self.parts.trainer()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        result = self.train_window(batch)
        self.seen.append(float(result.loss))
        if self.stop_at is not None and self.sequence_trainer.steps == self.stop_at:
            raise RuntimeError("killed")
        return result.loss


def trainer_of(directory: Path, **settings: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=directory, **{"enable_checkpointing": False, **quiet, **settings})


def plain(windows: int, log: RunLog | None = None) -> tuple[dni.SequenceTrainer, list[float]]:
    """The same training without Lightning, and the loss of each window."""
    torch.manual_seed(1)
    trainer, data, seen = Parts().trainer(), stream(), []
    while trainer.steps < windows:
        for inputs, targets, mask, ends, lookahead in data:
            result = trainer.step(inputs, targets, mask=mask, ends=ends, lookahead=lookahead)
            seen.append(float(result.loss))
            if log is not None:
                log.add({"train/loss": result.loss, **measurements(result)}, weight=targets.numel(), skipped=result.skipped)
                if trainer.steps % 5 == 0:
                    log.write(trainer.steps)
                    log.scalars(trainer.steps, trainer.skip_counts())
                    log.clear()
            if trainer.steps == windows:
                break
    return trainer, seen


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dni.SequenceTrainer, list[float], Path]:
    """Fifty windows of the plain loop: the trainer, the losses, and what it has logged."""
    directory = tmp_path_factory.mktemp("plain")
    log = RunLog(directory, logger="none")
    trainer, seen = plain(50, log)
    log.close()
    return trainer, seen, directory


def assert_like(module: Module, reference: Any, losses_from: int = 0) -> None:
    trainer, seen, _ = reference
    assert module.seen == seen[losses_from:]
    assert_same(module.sequence_trainer.state_dict(), trainer.state_dict())


def test_a_run_is_bit_identical_to_the_plain_loop_and_logs_the_same(reference, tmp_path):
    """Over three epochs, with dropout and a synthesizer. A rare point, such as one of fidelity, is logged once."""
    torch.manual_seed(1)
    module = Module()
    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path, name="", version="")
    trainer = trainer_of(tmp_path, max_steps=50, logger=logger, log_every_n_steps=5)
    trainer.fit(module, ResumableWindows(stream()))
    assert_like(module, reference)
    assert trainer.global_step == 50
    assert trainer.current_epoch >= 2
    expected = read_curves(reference[2] / METRICS)
    assert expected.keys() >= {"train/loss", "gradient/norm", "synthetic/r2", "synthetic/cosine", "fidelity/cosine_1"}
    found = points(tmp_path)
    assert found.keys() - {"hp_metric"} == expected.keys()
    for key, curve in expected.items():
        assert found[key] == pytest.approx(curve, rel=1e-6), key
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected["train/loss"][50], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_killed_run_resumes_bit_identically(reference, tmp_path):
    """It dies at window 30, in the second epoch; its last checkpoint is that of window 23."""
    torch.manual_seed(1)
    saves = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=23)
    killed = trainer_of(tmp_path, max_steps=50, callbacks=[saves], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="killed"):
        killed.fit(Module(stop_at=30), ResumableWindows(stream()))
    (file,) = tmp_path.glob("*.ckpt")
    torch.manual_seed(99)
    module = Module()
    trainer = trainer_of(tmp_path, max_steps=50, callbacks=[saves], enable_checkpointing=True)
    trainer.fit(module, ResumableWindows(stream()), ckpt_path=file)
    assert_like(module, reference, losses_from=23)
    assert trainer.global_step == 50


def test_a_stopped_run_resumes_with_its_averages(reference, tmp_path):
    """It stops at window 23, between two points of the curves."""
    torch.manual_seed(1)
    first = trainer_of(tmp_path, max_steps=23, log_every_n_steps=5)
    first.fit(Module(), ResumableWindows(stream()))
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path, name="", version="")
    module = Module()
    second = trainer_of(tmp_path, max_steps=50, logger=logger, log_every_n_steps=5)
    second.fit(module, ResumableWindows(stream()), ckpt_path=tmp_path / "stopped.ckpt")
    assert_like(module, reference, losses_from=23)
    later = {step: loss for step, loss in read_curves(reference[2] / METRICS)["train/loss"].items() if step > 23}
    found = points(tmp_path)["train/loss"]
    assert {step: found[step] for step in later} == pytest.approx(later, rel=1e-6)


def test_short_epochs_lose_no_window(reference, tmp_path):
    torch.manual_seed(1)
    module = Module()
    trainer_of(tmp_path, max_epochs=4, limit_train_batches=3).fit(module, ResumableWindows(stream()))
    assert module.seen == reference[1][:12]


def test_windows_that_were_only_read_come_again():
    """Lightning reads one window in advance; the next call of fit must not lose it."""
    windows, every = ResumableWindows(stream()), [*stream()]
    read = iter(windows)
    for _ in range(3):
        next(read)
    windows.window_trained()
    place = windows.state_dict()
    for again in (windows, ResumableWindows(stream())):
        if again is not windows:
            again.load_state_dict(place)
        assert torch.equal(next(iter(again)).inputs, every[1].inputs)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_data_loader_of_windows_is_training_data_too(tmp_path):
    torch.manual_seed(1)
    module = Module()
    loader = torch.utils.data.DataLoader([*stream()], batch_size=None, generator=torch.Generator())
    trainer_of(tmp_path, max_steps=4).fit(module, loader)
    assert module.seen == plain(4)[1]


def test_weights_alone_start_a_new_run(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.fit(Module(), ResumableWindows(stream()))
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "three.ckpt", weights_only=True)
    trainer_of(tmp_path, max_steps=2).fit(loaded, ResumableWindows(stream()))
    assert loaded.sequence_trainer.steps == 2


def test_other_data_settings_and_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one window too far: pass ResumableWindows\(stream\)"):
        trainer_of(tmp_path, max_steps=2).fit(Module(), stream())
    with pytest.raises(TypeError, match="needs a stream with state_dict and load_state_dict, got list"):
        ResumableWindows([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision='bf16-mixed' has no effect"):
        trainer_of(tmp_path, max_steps=1, precision="bf16-mixed").fit(Module(), ResumableWindows(stream()))
    several, module = trainer_of(tmp_path, devices=2, strategy="ddp"), Module()
    module.trainer = several
    with pytest.raises(ValueError, match="SequenceMixin trains on one device"):
        module.configure_optimizers()
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(Module(), ResumableWindows(stream()))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)  # nothing in it needs pickle
    del content[KEY]
    torch.save(content, tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="the checkpoint holds no SequenceTrainer"):
        trainer_of(tmp_path, max_steps=2).fit(Module(), ResumableWindows(stream()), ckpt_path=tmp_path / "one.ckpt")


def test_a_module_without_a_trainer_says_what_to_define(tmp_path):
    class Empty(SequenceMixin, lightning.LightningModule):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define configure_trainer"):
        trainer_of(tmp_path, max_steps=1).fit(Empty(), [(torch.zeros(1, 1), torch.zeros(1, 1))])


def test_the_older_package_and_masks(tmp_path):
    """The package pytorch_lightning; and windows in which few steps count, whose losses weigh less in the averages."""
    older = pytest.importorskip("pytorch_lightning")

    class Older(SequenceMixin, older.LightningModule):
        configure_trainer = Module.configure_trainer

        def __init__(self) -> None:
            super().__init__()
            self.parts = Parts()

    torch.manual_seed(1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    trainer = older.Trainer(max_steps=2, log_every_n_steps=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    windows = list(dni.burn_in(stream(), STEPS + 1))[1:3]  # two steps of three count, then all
    module = Older()
    seen = []
    module.train_window = lambda batch: seen.append(SequenceMixin.train_window(module, batch)) or seen[-1]
    loader = torch.utils.data.DataLoader(windows, batch_size=None, generator=torch.Generator())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        trainer.fit(module, loader)
    first, second = (float(result.loss) for result in seen)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx((2 * first + 3 * second) / 5)


def test_the_module_imports_no_lightning():
    code = "import sys, dni_seq.integrations.lightning; print({'lightning', 'pytorch_lightning'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
