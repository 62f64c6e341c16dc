"""TensorBoard points: exact averages, horizons, and no doubled point after a resume."""

from __future__ import annotations

import math
import re

import pytest
import torch

from dni_seq.app.runs.run_log import RunLog
from dni_seq.app.runs.tensorboard import KEYS, LAYOUT, OTHER_KEYS, keys_at, peak_memory_mb, perplexity
from tests.events import wait_for_the_next_second
from tests.paths import ROOT

event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

DIGITS = r"\d+"

CPU = torch.device("cpu")


def points(directory, key) -> list[tuple[int, float]]:
    events = event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


@pytest.mark.parametrize("number", [int, torch.tensor])
def test_averages_are_weighted_by_tokens(tmp_path, number):
    log = RunLog(tmp_path)
    log.add({"train/loss": torch.tensor(1.0), "gradient/norm": torch.tensor(2.0)}, weight=number(3))
    log.add({"train/loss": torch.tensor(2.0), "gradient/norm": torch.tensor(6.0)}, weight=number(1))
    assert log.mean("train/loss") == 1.25
    log.write(2)
    log.clear()
    log.write(3)
    log.close()
    assert points(tmp_path, "train/loss") == [(2, 1.25)]
    assert points(tmp_path, "gradient/norm") == [(2, 3.0)]
    # Event files hold float32.
    assert points(tmp_path, "train/perplexity") == [(2, pytest.approx(math.exp(1.25), rel=1e-6))]


def test_one_horizon_is_one_key_and_several_are_listed(tmp_path):
    log = RunLog(tmp_path)
    log.add({"synthetic/r2": torch.tensor([0.5]), "synthetic/cosine": torch.tensor([0.25, 0.75])}, weight=1)
    log.write(1)
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "synthetic/cosine",
        "synthetic/cosine/horizon_1",
        "synthetic/cosine/horizon_2",
        "synthetic/r2",
    ]
    assert points(tmp_path, "synthetic/cosine") == [(1, 0.5)]
    assert points(tmp_path, "synthetic/cosine/horizon_2") == [(1, 0.75)]


def test_half_precision_is_summed_in_float32(tmp_path):
    log = RunLog(tmp_path)
    for _ in range(1000):
        log.add({"train/loss": torch.tensor(1.0, dtype=torch.bfloat16)}, weight=1)
    log.close()
    # In bfloat16 the sum would stop growing at 256.
    assert log.mean("train/loss") == 1.0


def test_averages_resume_from_a_checkpoint(tmp_path):
    whole, first, second = (RunLog(tmp_path / name) for name in ("whole", "first", "second"))
    losses = [torch.tensor(value) for value in (0.1, 0.7, 0.3)]
    for loss in losses:
        whole.add({"train/loss": loss}, weight=5)
    first.add({"train/loss": losses[0]}, weight=5)
    second.load_state_dict(first.state_dict(), CPU)
    for loss in losses[1:]:
        second.add({"train/loss": loss}, weight=5)
    assert second.mean("train/loss") == whole.mean("train/loss")
    for log in (whole, first, second):
        log.close()


def test_a_resumed_run_hides_what_was_logged_after_its_checkpoint(tmp_path):
    killed = RunLog(tmp_path)
    for step in range(1, 6):
        killed.scalars(step, {"train/loss": step})
    killed.close()
    wait_for_the_next_second()
    resumed = RunLog(tmp_path, resumed_at=3)
    for step in range(4, 7):
        resumed.scalars(step, {"train/loss": 10 * step})
    resumed.close()
    assert points(tmp_path, "train/loss") == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_points_of_the_last_step_that_are_there_are_not_written_again(tmp_path):
    killed = RunLog(tmp_path)
    killed.scalars(2, {"test/loss": 1})
    killed.scalars(3, {"train/loss": 3, "test/loss": 5})
    killed.close()
    assert keys_at(tmp_path, 3) == {"train/loss", "test/loss"}
    assert keys_at(tmp_path, 2) == {"test/loss"}
    (tmp_path / "without").mkdir()
    assert keys_at(tmp_path / "without", 2) == set()
    wait_for_the_next_second()
    resumed = RunLog(tmp_path, resumed_at=3, written=keys_at(tmp_path, 3))
    resumed.scalars(3, {"test/loss": 5, "best/loss": 4})
    resumed.scalars(4, {"test/loss": 6})
    resumed.close()
    assert points(tmp_path, "test/loss") == [(2, 1), (3, 5), (4, 6)]
    assert points(tmp_path, "best/loss") == [(3, 4)]


def test_the_second_key_of_a_curve_is_not_written_again_either(tmp_path):
    killed = RunLog(tmp_path)
    killed.scalars(3, {"valid/perplexity": 9})
    killed.close()
    wait_for_the_next_second()
    resumed = RunLog(tmp_path, resumed_at=3, written=keys_at(tmp_path, 3))
    resumed.scalars(3, {"valid/perplexity": 9})
    resumed.scalars(4, {"valid/perplexity": 8})
    resumed.close()
    assert points(tmp_path, "Perplexity/valid") == points(tmp_path, "valid/perplexity") == [(3, 9), (4, 8)]


def test_a_path_among_the_changed_options_is_a_name(tmp_path):
    log = RunLog(tmp_path)
    changed = {"data_file": "/somewhere/book.txt", "lr": 0.5, "hidden": 8}
    log.hyperparameters({"lr": 0.5, "hidden": 8, "horizons": None}, {"valid/loss": "loss"}, changed)
    log.hyperparameters({"lr": 0.1}, {"valid/loss": "loss"}, {})
    log.close()
    starts = []
    for file in tmp_path.glob("events.*"):
        for event in event_file_loader.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                content = hparams.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                if content.HasField("session_start_info"):
                    starts.append(dict(content.session_start_info.hparams.items()))
    # The learning rate has its own column.
    assert starts[0]["5 others"].string_value == "data_file=book.txt hidden=8"
    assert starts[0].keys() == {"3 lr", "hidden", "5 others"}
    assert starts[1]["5 others"].string_value == "none"


def test_text_keeps_its_lines(tmp_path):
    log = RunLog(tmp_path)
    log.text(4, "sample", "one\n*two*")
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("sample/text_summary")
    assert event.step == 4
    assert event.tensor_proto.string_val == [b"    one\n    *two*"]


def test_perplexity():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_peak_memory_is_of_this_process():
    # A Python with torch loaded takes more than 50 MB, and this test less than 100 GB.
    assert 50 < peak_memory_mb(CPU) < 100_000


def test_the_page_says_what_to_do_for_every_chart():
    page = (ROOT / "docs" / "dashboard.md").read_text(encoding="utf-8")
    rows = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    for keys in (keys for group in LAYOUT.values() for keys in group.values()):
        for key in keys:
            assert f"`{key.replace(DIGITS, 'n')}`" in rows
    # And it names no key that is not written.
    for key in re.findall(r"`((?:train|valid|synthetic|fidelity|gradient|state|speed|memory|progress)/\w+)`", page):
        assert key in KEYS


def test_the_reference_lists_every_key_with_its_meaning():
    page = (ROOT / "docs" / "reference" / "tensorboard.md").read_text(encoding="utf-8")
    for key, meaning in (KEYS | OTHER_KEYS).items():
        assert f"| `{key}` | {meaning} |" in page
