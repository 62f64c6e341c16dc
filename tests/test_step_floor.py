"""The floor of a training step: the products that a step runs, each by its fastest kernel."""

from __future__ import annotations

import importlib
import multiprocessing
import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.paths import ROOT

T = 2


@pytest.fixture
def study(monkeypatch):
    """Imports a module of benchmarks, whose files import each other by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def setting(study):
    return study("step_ways").Setting(37, "lstm", 6, 8, 2, 0.0, 5, (T,))


def operations(products):
    return sum(product.operations * times for product, times in products.items())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_products_are_those_of_a_step(study, setting, cell):
    """All that the native kernel multiplies, forward and backward; there, two layers' inputs and states are apart."""
    floor, ways = study("step_floor"), study("step_ways")
    setting = setting._replace(cell=cell)
    model = ways.model_of(setting)
    model.native_steps = T
    tokens = torch.randint(setting.vocabulary, (T, setting.lanes))
    with FlopCounterMode(display=False) as counter:
        logits, _ = model(tokens, model.initial_state(setting.lanes))
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    rnn = floor.rnn_products(setting, T)
    vocabulary = operations(floor.vocabulary_products(setting, T))
    assert operations(rnn["products, apart"]) + vocabulary == counter.get_total_flops()
    if cell == "lstm":  # joined, the product back to the first state comes along with that to the inputs
        extra = setting.layers * floor.Product(setting.lanes, 4 * setting.hidden, setting.hidden).operations
        assert operations(rnn["products, joined"]) == operations(rnn["products, apart"]) + extra


def test_a_synthesizers_products_are_those_that_it_runs(study, setting):
    floor = study("step_floor")
    options = {"synthesizer": "multi-horizon", "horizons": 1}
    synthesizer, products = floor.synthesizer_products(setting, T, options)
    lanes, size = setting.lanes, 2 * 2 * setting.hidden
    with_state = synthesizer.heads.model.units + setting.vocabulary
    assert floor.Product(lanes, size, with_state, (False, True)) in products
    assert floor.Product(lanes, with_state, size) in products
    assert products.total() == 9
    whole = floor.Floor(setting, T, options)
    assert {str(product) for product in products} <= set(whole.kernels)
    whole()


def test_kernels_compute_the_same_product(study):
    floor = study("step_floor")
    for crossed in ((False, False), (False, True), (True, False)):
        kernels = floor.kernels_of(floor.Product(3, 5, 7, crossed))
        found = {name: step() for name, step in kernels.items()}
        found["mm, transposed"] = found["mm, transposed"].t()
        for each in found.values():
            torch.testing.assert_close(each, found["mm"])


def test_the_quickest_counts(study):
    def busy(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    assert study("step_floor").fastest({"slow": lambda: busy(4e-3), "quick": lambda: busy(1e-4)}) == "quick"


def test_a_floor_takes_its_turn(study):
    steps = study("steps")
    ours, theirs = multiprocessing.Pipe()
    for go_on in (True, False):
        ours.send(go_on)
    steps.take_turns("char-gru", 1, ["floor"], False, 1, theirs)
    kernels, times = ours.recv(), ours.recv()
    assert kernels["floor"]["rnn"] in ("native kernel", "products, apart")
    assert "32 x 512 x 50" in kernels["floor"]
    found = {"none": [9.0, 9.0], "floor": [times["floor"]] * 2}
    none, floor = steps.lines_of("char-gru", 1, found, kernels)
    assert none["over its floor"] == 9.0 / times["floor"]
    assert floor["kernels"] == kernels["floor"]
    assert "over its floor" not in floor


def test_lines_with_and_without_a_floor_are_read(study):
    steps = study("steps")
    new = [{"way": "none", "ms": 3.0}, {"way": "floor", "ms": 2.0}, {"way": "floor with multi-horizon", "ms": 4.0}]
    new.append({"way": "multi-horizon", "ms": 5.0})
    old = [{"way": "none", "ms": 3.0}, {"way": "products alone", "ms": 2.0}]
    lines = [{"setting": "char-lstm", "bptt": bptt, **line} for bptt, some in ((1, new), (2, old)) for line in some]
    header, _, first, second = ([cell.strip() for cell in row.split("|")[1:-1]] for row in steps.table(lines).splitlines())
    assert header[2:5] == ["none / its floor", "multi-horizon, K = 1 / its floor", "multi-horizon / its floor"]
    assert first[2:5] == ["1.50", steps.NOTHING, "1.25"]
    assert second[header.index("products alone / none")] == "0.67"
    assert "products alone / none" not in steps.table([line for line in lines if line["bptt"] == 1])
