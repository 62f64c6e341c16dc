"""TensorBoard as the dashboard: what real runs leave for it, and what a real browser shows of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dni_seq.app.runs.tensorboard import FINAL, LAYOUT, OTHER_KEYS
from docs.images.browser import Browser, find_chromium, tensorboard

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
layouts = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")


def read(run: Path):
    events = event_accumulator.EventAccumulator(
        str(run), size_guidance=dict.fromkeys(("scalars", "tensors", "histograms"), 0)
    )
    events.Reload()
    return events


def texts(events, key: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{key}/text_summary")}


def test_every_chart_of_the_layout_has_curves(two_runs):
    events = read(two_runs / "multi-horizon")
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layouts.Layout.FromString(event.tensor_proto.string_val[0])
    keys = events.Tags()["scalars"]
    assert {category.title for category in layout.category} == set(LAYOUT)
    for category in layout.category:
        assert {chart.title for chart in category.chart} == set(LAYOUT[category.title])
        for chart in category.chart:
            for tag in chart.multiline.tag:
                assert any(re.match(tag, key) for key in keys), f"{chart.title}: no curve {tag}"


def test_fidelity_is_charted_by_horizon(two_runs):
    keys = set(read(two_runs / "multi-horizon").Tags()["scalars"])
    assert {"fidelity/cosine_1", "fidelity/cosine_2", "fidelity/r2_1", "fidelity/r2_2"} <= keys
    assert not any(key.startswith(("fidelity", "synthetic")) for key in read(two_runs / "none").Tags()["scalars"])


def test_the_configuration_is_a_table_with_versions(two_runs):
    (table,) = texts(read(two_runs / "none"), "config").values()
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", table, re.MULTILINE))
    assert rows["synthesizer"] == "none"
    assert rows["hidden"] == "8"
    assert {"dni_seq", "torch", "python", "system"} <= set(rows)


def test_text_samples_follow_the_best_validations(two_runs):
    events = read(two_runs / "none")
    losses = [(event.step, event.value) for event in events.Scalars("valid/loss")]
    best = [step for i, (step, loss) in enumerate(losses) if all(loss < earlier for _, earlier in losses[:i])]
    samples = texts(events, "sample/best")
    assert list(samples) == best
    assert all(len(text) > 400 for text in samples.values())
    assert list(texts(events, "sample/regular")) == [30, 60]


def test_messages_have_a_histogram_for_each_horizon(two_runs):
    events = read(two_runs / "multi-horizon")
    assert set(OTHER_KEYS) - {"messages/horizon_n"} == {"config", "sample/best", "sample/regular"}
    for key in ("messages/horizon_1", "messages/horizon_2"):
        points = events.Histograms(key)
        assert [point.step for point in points] == [20, 40, 60]
        # 64 lanes, h and c of 8 units; trained for 20 steps, no message is zero any more.
        assert all(point.histogram_value.num == 64 * 16 for point in points)
        assert all(point.histogram_value.sum_squares > 0 for point in points)
    assert read(two_runs / "none").Tags()["histograms"] == []


def test_hyperparameters_come_with_final_scores(two_runs):
    events = read(two_runs / "none")
    data = {
        key: hparams.HParamsPluginData.FromString(events.SummaryMetadata(key).plugin_data.content)
        for key in ("_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info")
    }
    metrics = [info.name.tag for info in data["_hparams_/experiment"].experiment.metric_infos]
    assert metrics == list(FINAL)
    for key in metrics:
        assert events.Scalars(key)[-1].step == 60
    chosen = data["_hparams_/session_start_info"].session_start_info.hparams
    assert chosen["synthesizer"].string_value == "none"
    assert chosen["tied"].string_value == "False"
    assert chosen["hidden"].number_value == 8
    assert not {"data_dir", "max_steps", "threads"} & set(chosen)
    assert len(list((two_runs / "none").glob("events.*"))) == 1


def test_a_browser_shows_the_charts(two_runs):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    titles = [title for charts in LAYOUT.values() for title in charts]
    with tensorboard(two_runs) as address, Browser(chromium) as page:
        page.open(f"{address}#custom_scalars")
        cards = "findAll('tf-custom-scalar-multi-line-chart-card')"
        page.wait(f"{cards}.length == {len(titles)}")
        assert page.run(f"{cards}.map(card => card.title)") == titles
        # In the chart that compares runs each of the two is drawn: lines of two colours that are longer than a dot.
        lines = f"findAll('path.line', {cards}[1].shadowRoot).filter(line => line.getTotalLength() > 10)"
        page.wait(f"new Set({lines}.map(line => getComputedStyle(line).stroke)).size == 2")
        page.open(f"{address}#hparams")
        wanted = ["none", "multi-horizon", *FINAL]
        cells = "findAll('vaadin-grid-cell-content').map(cell => cell.innerText.trim())"
        page.wait(f"(cells => {wanted}.every(text => cells.includes(text)))({cells})")
        page.open(f"{address}#text")
        page.wait("findAll('table td').some(cell => cell.textContent.trim() == 'synthesizer')")
