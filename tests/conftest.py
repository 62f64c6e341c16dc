"""Real runs that several test files look at."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

TINY = ("--embed", "8", "--hidden", "8", "--bptt", "4", "--batch-size", "64", "--seed", "5", "--eval-tokens", "2048")
LIMITS = ("--max-steps", "60", "--eval-every", "20", "--sample-every", "30")
SYNTHETIC = ("--horizons", "2", "--synthesizer-hidden", "16", "--regress-every", "2", "--fidelity-every", "8")


def pytest_configure() -> None:
    """Gives signals their defaults again, which nohup and a shell's background jobs take away from the tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names a case by its argument where the value is bytes: packed files hold the second at which they were made, and the
    processes that share a run of the tests must agree on their names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Restores the number of threads of the process, which the commands set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["here", "on the device"])
def decides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a bad step is skipped. A CPU has the same kernels, so what a GPU does without waiting runs here too."""
    if request.param == "on the device":
        monkeypatch.setattr("dni_seq.core.nonfinite.readable_without_sync", lambda flag: False)
    return request.param


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory) -> Path:
    """A directory with two runs, `none` by truncated BPTT and `multi-horizon` with synthetic gradients: 60 steps each,
    validations every 20, histograms every 20 and points of the training curves every 10."""
    from dni_seq.app.lm import train as train_lm
    from dni_seq.app.lm.training import LanguageModelRun

    directory = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModelRun, "HISTOGRAM_EVERY", 20)
        patch.setattr(LanguageModelRun, "LOG_EVERY", 10)
        for name, options in (("none", ()), ("multi-horizon", SYNTHETIC)):
            line = [*TINY, *LIMITS, *options, "--synthesizer", name, "--run-dir", str(directory / name)]
            assert train_lm.main(line) == 0
    return directory


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found in one start, since starting takes longer than the work."""
    return run_ranks("tests.distributed.on_ranks", "everything", 2, tmp_path_factory.mktemp("ranks"))
