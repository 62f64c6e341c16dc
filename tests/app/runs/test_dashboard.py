"""TensorBoard as the dashboard: what real runs leave for it, and what a real browser shows of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dni_seq.app.lm import train as train_lm
from dni_seq.app.runs.tensorboard import FINAL, FIRST, LAYOUT, OTHER_KEYS
from docs.images.browser import Browser, find_chromium, tensorboard
from tests.conftest import TINY
from tests.events import layout, points

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")


def read(run: Path):
    events = event_accumulator.EventAccumulator(
        str(run), size_guidance=dict.fromkeys(("scalars", "tensors", "histograms"), 0)
    )
    events.Reload()
    return events


def texts(events, key: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{key}/text_summary")}


NO_CHART = {
    "none": {*LAYOUT["synthetic gradients"], *LAYOUT["estimator"]},
    "multi-horizon": {"share injected, by horizon"},
}
"""The charts that a run leaves out: it writes no such curve, or only a constant that its options say."""


@pytest.mark.parametrize("name", NO_CHART)
def test_every_chart_of_a_run_has_curves(name, two_runs):
    charts, curves = layout(two_runs / name), points(two_runs / name)
    assert charts == {
        category: left
        for category, group in LAYOUT.items()
        if (left := {title: list(keys) for title, keys in group.items() if title not in NO_CHART[name]})
    }
    for title, tags in ((title, tags) for group in charts.values() for title, tags in group.items()):
        for tag in tags:
            assert any(re.match(tag, key) for key in curves), f"{title}: no curve {tag}"


def test_a_gru_has_no_chart_of_cells_and_a_constant_rate_none_of_it(tmp_path):
    options = ("--model", "gru", "--synthesizer", "none", "--schedule", "constant", "--max-steps", "2", "--run-dir")
    assert train_lm.main([*TINY, *options, str(tmp_path / "gru")]) == 0
    assert layout(tmp_path / "gru")["stability"] == {"gradient norm": ["gradient/norm"]}


def test_runs_share_the_charts_of_one_title(two_runs):
    """TensorBoard joins the layouts of runs, and shows a chart twice if its keys differ."""
    one, two = ({t: k for group in layout(two_runs / name).values() for t, k in group.items()} for name in NO_CHART)
    assert one.keys() & two.keys()
    assert all(one[title] == two[title] for title in one.keys() & two.keys())


@pytest.mark.parametrize("name", NO_CHART)
def test_perplexity_is_written_again_for_the_first_group(name, two_runs):
    curves = points(two_runs / name)
    first = {again: key for key, again in FIRST.items() if key in curves}
    assert set(first) == {"Perplexity/train", "Perplexity/valid"}
    assert all(curves[again] == curves[key] for again, key in first.items())
    assert sorted(curves)[:2] == sorted(first)  # capital letters first, as TensorBoard sorts
    assert not any(key.startswith("best/") for key in curves)


def test_a_run_says_what_it_does_and_what_it_reached(two_runs):
    none, synthetic = (read(two_runs / name) for name in NO_CHART)
    assert texts(none, "about/method") == {0: "Truncated BPTT (none): no gradient crosses the end of a window of 4 steps."}
    (sentence,) = texts(synthetic, "about/method").values()
    assert "each of the next 2 windows (multi-horizon) is injected" in sentence
    summary = json.loads((two_runs / "none" / "summary.json").read_text())
    (result,) = texts(none, "about/result").values()
    for split in ("valid", "test"):
        assert f"{split}: loss {summary[split]['loss']:.4f} nats per token, ppl {summary[split]['ppl']:.2f}" in result


def test_fidelity_is_charted_by_horizon(two_runs):
    keys = set(read(two_runs / "multi-horizon").Tags()["scalars"])
    assert {"fidelity/cosine_1", "fidelity/cosine_2", "fidelity/r2_1", "fidelity/r2_2", "fidelity/parameters_cosine"} <= keys
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
    assert set(OTHER_KEYS) - {"messages/horizon_n"} == {
        *("about/method", "about/result", "config", "sample/best", "sample/regular")
    }
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
    experiment = data["_hparams_/experiment"].experiment
    assert {info.name.tag: info.display_name for info in experiment.metric_infos} == FINAL
    for key in FINAL:
        assert events.Scalars(key)[-1].step == 60
    # TensorBoard sorts the columns by name and shows another one.
    shown = {info.name: info.display_name for info in sorted(experiment.hparam_infos, key=lambda info: info.name)}
    assert list(shown.values())[:6] == ["synthesizer", "bptt", "lr", "model", "others", "accumulate"]
    first = {info.display_name for info in experiment.hparam_infos if info.differs}
    assert first - set(list(shown.values())[:5]) == {"tokenizer", "embed", "hidden", "batch_size", "seed"}
    # It takes the columns of all runs from one of them: options without a value here are among them.
    assert {"horizons", "vocab_size", "dropout"} <= set(shown.values())
    assert not {"data_dir", "max_steps", "threads"} & set(shown.values())
    chosen = data["_hparams_/session_start_info"].session_start_info.hparams
    assert "horizons" not in chosen
    assert chosen["1 synthesizer"].string_value == "none"
    assert chosen["tied"].string_value == "False"
    assert chosen["2 bptt"].number_value == 4
    assert chosen["5 others"].string_value == "tokenizer=char embed=8 hidden=8 batch_size=64 seed=5"
    assert len(list((two_runs / "none").glob("events.*"))) == 1


def test_the_others_are_the_options_that_somebody_changed(two_runs):
    content = read(two_runs / "multi-horizon").SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    others = hparams.HParamsPluginData.FromString(content).session_start_info.hparams["5 others"].string_value
    assert "synthesizer_hidden=16 regress_every=2 fidelity_every=8 tokenizer=char" in others
    # 2 horizons are the default here, and 8 steps of lookahead follow from them.
    assert "horizons" not in others
    assert "lookahead" not in others


def test_a_browser_shows_the_charts(two_runs):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    charts = [layout(two_runs / name) for name in sorted(NO_CHART)]  # TensorBoard joins them in this order
    titles = list(dict.fromkeys(title for each in charts for group in each.values() for title in group))
    assert titles == [title for group in charts[0].values() for title in group]
    with tensorboard(two_runs) as address, Browser(chromium) as page:
        page.open(address)  # the first screen, the tab "Time Series"
        groups = "findAll('.group-title').map(group => group.textContent)"
        assert page.wait(f"(names => names.length > 5 && names)({groups})")[:2] == ["Pinned", "Perplexity"]
        first = "findAll('scalar-card tb-truncated-path').slice(0, 2).map(name => name.title)"
        page.wait(f"{first}.join() == 'Perplexity/train,Perplexity/valid'")
        page.open(f"{address}#custom_scalars")
        cards = "findAll('tf-custom-scalar-multi-line-chart-card')"
        page.wait(f"{cards}.length == {len(titles)}")
        assert page.run(f"{cards}.map(card => card.title)") == titles
        # No chart is empty, and in the one that compares runs each of the two is drawn: lines of two colours.
        lines = "(card => findAll('path.line', card.shadowRoot).filter(line => line.getTotalLength() > 10))"
        page.wait(f"{cards}.every(card => {lines}(card).length)")
        page.wait(f"new Set({lines}({cards}[1]).map(line => getComputedStyle(line).stroke)).size == 2")
        page.open(f"{address}#hparams")
        wanted = ["none", "multi-horizon", *FINAL.values()]
        cells = "findAll('vaadin-grid-cell-content').map(cell => cell.innerText.trim())"
        page.wait(f"(cells => {json.dumps(wanted)}.every(text => cells.includes(text)))({cells})")
        heading = ["synthesizer", "bptt", "lr", "model", "others", *FINAL.values()]
        found = [cell for cell in page.run(cells) if cell in heading]
        assert list(dict.fromkeys(found)) == heading
        page.open(f"{address}#text")
        page.wait("findAll('table td').some(cell => cell.textContent.trim() == 'synthesizer')")
        page.wait("findAll('p').some(text => text.textContent.includes('no gradient crosses'))")
