"""Data-parallel training: the numbers of one process, on two ranks, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dni_seq as dni
from dni_seq.distributed.data_parallel import DataParallel, SingleProcess
from dni_seq.distributed.process_group import Ranks
from dni_seq.synthesizers.jaderberg2017 import Jaderberg2017Synthesizer
from dni_seq.synthesizers.least_squares import LeastSquaresHeads
from dni_seq.synthesizers.multi_horizon import Horizons
from tests.nests import assert_same
from tests.training import sequence_trainer

LANES, STEPS, WIDTH = 4, 3, 5
WINDOWS = 16
BROKEN = 6
LARGE = 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, WIDTH, 2)
        self.readout = nn.Linear(WIDTH, 2)

    def forward(self, inputs: Any, state: Any) -> Any:
        outputs, state = self.rnn(inputs, state)
        return self.readout(outputs), state

    def initial_state(self, lanes: int) -> Any:
        zeros = self.readout.weight.new_zeros(2, lanes, WIDTH)
        return zeros, zeros.clone()


class Loud(nn.Module):
    """Says far too much of lanes whose state is large: now one of the first rank, now one of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = dni.BasicSynthesizer(2 * WIDTH, n_hidden=1)

    def forward(self, trigger: Any, context: Any = None) -> Any:
        factor = torch.where(trigger[1].detach().abs().amax((0, 2)) > LARGE, 1e9, 1.0)
        return tuple(leaf * factor[:, None] for leaf in self.quiet(trigger, context))


def losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean(-1)


def windows(masked: bool, broken: bool = False) -> list[dni.Window]:
    """Lanes differ, and with `masked` ranks count different numbers of steps and end at different windows.

    With `broken` one number of the second rank's lanes is a NaN, in a window and in the lookahead of the one before.
    """
    generator = torch.Generator().manual_seed(5)
    found = []
    for i in range(WINDOWS):
        inputs = torch.randn(STEPS, LANES, 3, generator=generator, dtype=torch.float64)
        inputs *= torch.arange(1, LANES + 1)[:, None]
        targets = inputs[..., :2].cumsum(0)
        if broken and i == BROKEN:
            inputs[1, -1, 0] = torch.nan
        mask = torch.rand(STEPS, LANES, generator=generator) < torch.linspace(0.2, 1, LANES) if masked else None
        ends = torch.arange(LANES) == i % (LANES + 1) if masked else None
        found.append(dni.Window(inputs, targets, mask, ends))
    return list(dni.with_lookahead(found, STEPS))


def encoder() -> dni.LookaheadEncoder:
    return dni.LookaheadEncoder(STEPS, nn.Linear(3, 2), nn.Linear(2, 2))


def future(size: int) -> dni.FutureModel:
    """Of what is ahead, given the size of a lane's state."""
    return dni.FutureModel(size, STEPS, inputs=nn.Linear(3, 4), inputs_width=4, outputs=2, loss_fn=losses, units=5)


def future_and_past(size: int) -> dni.JointPredictor:
    return dni.JointPredictor([future(size), dni.GatedPast(size, 4, outputs=3, loss_fn=losses, units=5)])


class Told(nn.Module):
    """A synthesizer of one's own that says what another one does."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = other

    def forward(self, trigger: Any, context: Any = None) -> Any:
        return self.other(trigger, context)


def settings(case: str, model: Net, parallel: DataParallel | None) -> dict[str, Any]:
    """The synthesizer of a case and what goes with it."""
    example = model.initial_state(1)
    several = {"horizons": 2, "tail": True, "cells": dni.LSTM_CELLS, "hidden": (6,), "encoder": encoder()}
    shared = losses if parallel is None else parallel.share(losses)
    if case == "none":
        return {}
    if case == "basic":
        return {"synthesizer": dni.Normalized(dni.BasicSynthesizer(2 * WIDTH, n_hidden=1)), "synthetic_scale": 0.5}
    if case == "horizons":
        return {"synthesizer": dni.MultiHorizonSynthesizer(example, **several), "synthetic_scale": 0.5, "fidelity_every": 2}
    if case == "least-squares":
        size = {key: several[key] for key in ("cells", "hidden", "encoder")}
        heads = LeastSquaresHeads(example, 3, solve_every=2, memory=1.0, future=future, **size)
        return {"synthesizer": Horizons(heads, horizons=2, tail=True), "synthetic_scale": 0.5}
    if case == "future":
        heads = dni.FutureGradient(example, future, window=STEPS, cells=dni.LSTM_CELLS, limit=10.0)
        return {"synthesizer": Horizons(heads, horizons=1), "synthetic_scale": 0.5, "regress_every": 3}
    if case == "inside":  # messages inside windows, of the future and the past
        heads = dni.FutureGradient(example, future_and_past, cells=dni.LSTM_CELLS)
        more = {"message_every": 2, "synthetic_scale": 0.5, "regress_every": 3}
        return {"synthesizer": Horizons(heads, horizons=1), **more}
    if case == "loud":
        return {"synthesizer": dni.Normalized(Loud()), "synthetic_scale": 0.5}
    if case == "lambda":
        synthesizer = dni.StateSynthesizer(example, hidden=(6,), encoder=encoder())
        return {"synthesizer": synthesizer, "targets": "lambda", "replay_windows": 3, "target_network": 4}
    if case == "auxiliary":
        synthesizer = dni.StateSynthesizer(example, hidden=(6,), encoder=encoder())
        return {"synthesizer": synthesizer, "auxiliary": dni.AuxiliaryTask(example, hidden=(6,)).double()}
    if case == "exact":
        return {"synthesizer": dni.ExactFuture(model, shared, steps=3, window=STEPS), "synthetic_scale": 1.0}
    if case == "auto":  # of what is true, so that there is something to send
        told = Told(dni.ExactFuture(model, shared, steps=STEPS, window=STEPS))
        return {"synthesizer": told, "synthetic_scale": "auto", "fidelity_every": 2, "replay_windows": 1}
    network = Jaderberg2017Synthesizer(2 * WIDTH, hidden=WIDTH, encoder=None, horizons=1)
    return {"synthesizer": network, "synthetic_scale": 0.5}


LOOKING = (Horizons, dni.MultiHorizonSynthesizer, dni.StateSynthesizer, dni.ExactFuture, Told)

CASES = ("none", "basic", "horizons", "least-squares", "future", "inside", "lambda", "auxiliary", "exact", "auto", "paper")


def trainer_of(case: str, parallel: DataParallel | None, reduction: str = "mean") -> dni.SequenceTrainer:
    torch.manual_seed(0)
    model = Net().double()
    options = settings(case, model, parallel)
    if "synthesizer" in options:
        options["synthesizer"].double()
        for parameter in options["synthesizer"].parameters():  # from the start on there are messages
            parameter.data += 0.1 * torch.randn_like(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return sequence_trainer(model, optimizer, losses, clip=0.5, parallel=parallel, reduction=reduction, **options)


ROWS = ("loss", "norm", "skipped", "r2", "regression", "scale")


def train(trainer: dni.SequenceTrainer, stream: list[dni.Window]) -> dict[str, list[torch.Tensor]]:
    rows: dict[str, list[torch.Tensor]] = {key: [] for key in ROWS}
    for window in stream:
        if trainer.parallel is not None:
            window = trainer.parallel.window(window)
        inputs, targets, mask, ends, lookahead = window
        looks = trainer.credit is not None and isinstance(trainer.credit.synthesizer, LOOKING)
        result = trainer.step(inputs, targets, mask=mask, ends=ends, lookahead=lookahead if looks else None)
        rows["loss"].append(result.loss)
        rows["norm"].append(result.gradient_norm)
        rows["skipped"].append(result.skipped.double())
        if result.synthetic is not None:
            rows["regression"].append(result.synthetic.loss)
            rows["r2"].append(result.synthetic.r2)
            rows["scale"].append(result.synthetic.scale)
    return rows


def every_case(parallel: DataParallel | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        for masked in (False, True):
            trainer = trainer_of(case, parallel)
            rows = train(trainer, windows(masked))
            found[f"{case}-{masked}"] = {"rows": rows, "saved": trainer.state_dict()}
    for reduction in ("sum", "lane-mean"):
        trainer = trainer_of("horizons", parallel, reduction)
        found[reduction] = {"rows": train(trainer, windows(True)), "saved": trainer.state_dict()}
    for case in ("horizons", "least-squares", "future", "inside", "lambda"):
        trainer = trainer_of(case, parallel)
        found[f"broken {case}"] = {"rows": train(trainer, windows(True, broken=True)), "saved": trainer.state_dict()}
    trainer = trainer_of("loud", parallel)
    found["loud"] = {"rows": train(trainer, windows(False)), "saved": trainer.state_dict()}
    return found


def on_ranks(ranks: Ranks) -> dict[str, Any]:
    """Everything that the tests below compare, in one start of the processes, which takes longer than the work."""
    parallel = DataParallel(ranks)
    found = {"cases": every_case(parallel), "ddp": own_loop(parallel), "partial": partly_without_gradient(parallel)}
    resumed = {}
    for case in ("horizons", "least-squares", "future", "inside", "lambda"):
        first = trainer_of(case, None)
        train(first, windows(True)[:5])
        trainer = trainer_of(case, parallel)
        trainer.load_state_dict(first.state_dict())
        again = trainer.state_dict()  # before a step, lanes are still those of the file
        trainer.load_state_dict(again)
        resumed[case] = train(trainer, windows(True)[5:])
        half = trainer_of(case, parallel)
        train(half, windows(True)[:5])
        resumed[case + "-saved"] = half.state_dict()
    return found | {"resumed": resumed, "where": where_broken(parallel)}


def where_broken(parallel: DataParallel) -> str:
    """What the ranks say of the window that is left out."""
    trainer = trainer_of("none", parallel)
    events = []
    for whole in windows(False, broken=True):
        window = parallel.window(whole)
        events += trainer.step(window.inputs, window.targets).events
    (event,) = events
    return event.split("infinity in ")[1]


def own_loop(parallel: DataParallel | None) -> list[torch.Tensor]:
    """A loop of one's own: the model in DistributedDataParallel, the interface around its forward."""
    torch.manual_seed(0)
    net: nn.Module = Net().double()
    interface = dni.BackwardInterface(dni.Normalized(dni.BasicSynthesizer(2 * WIDTH, n_hidden=1))).double()
    state = net.initial_state(LANES)
    if parallel is not None:
        state = tuple(parallel.own(leaf, 1) for leaf in state)
        net = nn.parallel.DistributedDataParallel(net)
        parallel.synchronize(interface)
    optimizer = torch.optim.Adam([*net.parameters(), *interface.parameters()], lr=1e-2)
    measured = []
    for window in windows(False):
        if parallel is not None:
            window = parallel.window(window)
        optimizer.zero_grad()
        with dni.defer_backward():
            state = interface.make_trigger(state)
            outputs, state = net(window.inputs, state)
            interface.backward(state, 0.5)
            loss = F.mse_loss(outputs, window.targets)
            dni.backward(loss)
        if parallel is not None:
            parallel.average_gradients(interface.parameters())
        optimizer.step()
        measured.append(loss.detach())
    if parallel is not None:
        (mean,) = parallel.mean([torch.stack(measured)])
        return list(mean)
    return measured


def partly_without_gradient(parallel: DataParallel) -> list[Any]:
    """One parameter with a gradient on one rank alone, one with none anywhere."""
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    if parallel.ranks.first:
        first.grad = torch.full((2,), 3.0)
    parallel.sum_gradients([first, second])
    return [first.grad, second.grad]


@pytest.fixture(scope="module")
def ranks(two_ranks) -> list[dict[str, Any]]:
    return [found["training"] for found in two_ranks]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return every_case(None)


def check(found: Any, wanted: Any) -> None:
    """Sums in another order: a few hundred steps of rounding in float64."""
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, equal_nan=True)


def plain(saved: Any) -> Any:
    """A state dict without what is no tensor or number."""
    if isinstance(saved, dict):
        return {str(key): plain(value) for key, value in saved.items() if value is not None and not isinstance(value, bool)}
    if isinstance(saved, (list, tuple)):
        return [plain(value) for value in saved if value is not None and not isinstance(value, bool)]
    return saved.to(torch.float64) if isinstance(saved, torch.Tensor) else saved


BROKEN_CASES = ("broken horizons", "broken least-squares", "broken future", "broken lambda")

EVERY_CASE = [f"{case}-{masked}" for case in CASES for masked in (False, True)]


@pytest.mark.parametrize("case", [*EVERY_CASE, "sum", "lane-mean", *BROKEN_CASES, "loud"])
def test_two_ranks_train_as_one(ranks, alone, case):
    wanted = alone[case]
    for rank in ranks:
        found = rank["cases"][case]
        check(found["rows"]["loss"], wanted["rows"]["loss"])
        for key in ROWS:
            check(found["rows"][key], wanted["rows"][key])
        check(plain(found["saved"]), plain(wanted["saved"]))


def test_the_cases_inject_something(alone):
    plain_losses = torch.stack(alone["none-True"]["rows"]["loss"])
    for case in CASES[1:]:
        assert not torch.allclose(torch.stack(alone[f"{case}-True"]["rows"]["loss"]), plain_losses, rtol=1e-6), case


@pytest.mark.parametrize("case", BROKEN_CASES)
def test_what_is_broken_on_one_rank_is_skipped_on_all(ranks, alone, case):
    for found in (alone, *(rank["cases"] for rank in ranks)):
        skipped = torch.stack(found[case]["rows"]["skipped"])
        assert skipped.nonzero().flatten().tolist() == [BROKEN]
        assert found[case]["saved"]["skipped"]["total"] == 1
        assert found[case]["saved"]["credit"]["bad"]["total"] >= 1  # the lookahead of the window before


def test_ranks_name_where_a_nan_first_appeared(ranks):
    for rank in ranks:
        assert rank["where"] == "the inputs (nan at index [1, 1, 0] of shape [3, 2, 3]) on rank 1"


def test_a_synthesizer_that_is_too_large_on_one_rank_is_reset_on_all(ranks, alone):
    for found in (alone, *(rank["cases"] for rank in ranks)):
        credit = found["loud"]["saved"]["credit"]
        assert credit["bad"]["total"] >= 3
        assert credit["resets"] >= 1


@pytest.mark.parametrize("case", ["horizons", "least-squares", "future", "inside", "lambda"])
def test_a_run_resumes_with_another_number_of_ranks(ranks, alone, case):
    rows = alone[f"{case}-True"]["rows"]
    for rank in ranks:
        check(rank["resumed"][case]["loss"], rows["loss"][5:])
    trainer = trainer_of(case, None)
    trainer.load_state_dict(ranks[0]["resumed"][case + "-saved"])
    check(train(trainer, windows(True)[5:])["loss"], rows["loss"][5:])


def test_distributed_data_parallel_around_a_users_own_model(ranks):
    for rank in ranks:
        check(rank["ddp"], own_loop(None))


def test_gradients_that_some_ranks_lack_count_as_zero(ranks):
    for rank in ranks:
        gradient, nothing = rank["partial"]
        assert gradient.tolist() == [3.0, 3.0]
        assert nothing is None


def results(parallel: DataParallel) -> dict[str, Any]:
    """Returns the result of every method on one rank with all lanes."""
    window = windows(True)[0]
    leaf, mask = window.inputs, window.mask
    module = nn.Linear(2, 1).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
            parameter.grad = torch.full_like(parameter, 3.0)
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    number = torch.tensor(2.0, dtype=torch.float64)
    found = {
        "size": parallel.size,
        "lanes": parallel.lanes(LANES),
        "window": list(parallel.window(window)[:4]),
        "lookahead": list(parallel.window(window).lookahead),
        "own": parallel.own(leaf, 1),
        "all": parallel.all(leaf, 1),
        "share": parallel.share(losses)(leaf[..., :2], window.targets),
        "share_of_mean": [parallel.share_of_mean(leaf.mean(), None), parallel.share_of_mean(leaf.mean(), mask)],
        "sum": parallel.sum(leaf),
        "norm": parallel.norm(leaf.norm()),
        "sums": parallel.sums([leaf, number]),
        "mean": parallel.mean([leaf, None, number]),
    }
    parallel.divide_gradients(module.parameters())
    parallel.sum_gradients(module.parameters(), [number])
    parallel.average_gradients(module.parameters())
    assert_same([parameter.grad for parameter in module.parameters()], gradients)
    assert number == 2
    return found


def test_a_single_process_returns_what_one_rank_returns():
    """Except that its diagnosis names no rank."""
    assert_same(results(SingleProcess()), results(DataParallel(Ranks())))
    assert SingleProcess().first(3, "the loss") == "the loss"
    assert DataParallel(Ranks()).first(3, "the loss") == "the loss on rank 0"


def test_lanes_that_the_ranks_do_not_divide():
    class Three:
        rank, size = 0, 3

    with pytest.raises(ValueError, match="4 lanes cannot be divided among 3 ranks"):
        DataParallel(Three()).lanes(4)  # type: ignore[arg-type]


def test_a_wrapped_model_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(ValueError, match="reduces gradients itself"):
            sequence_trainer(wrapped, torch.optim.SGD(wrapped.parameters(), 0.1), losses)
    finally:
        torch.distributed.destroy_process_group()
