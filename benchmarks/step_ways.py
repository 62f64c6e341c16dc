"""Ways of training that benchmarks compare on one model and random tokens: plain loops, dni-pytorch's, the library's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.options import build
from dni_seq.core.windows import Lookahead
from dni_seq.models.language_model import LanguageModel
from dni_seq.trainer import SequenceTrainer

Step = Callable[[], None]


class Setting(NamedTuple):
    """The sizes of a model, its lanes, and the window lengths that are measured."""

    vocabulary: int
    cell: str
    embed: int
    hidden: int
    layers: int
    dropout: float
    lanes: int
    bptt: Sequence[int]


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "word-lstm": Setting(10_000, "lstm", 200, 200, 2, 0.2, 20, (1, 2, 5, 20, 35)),
        "char-lstm": Setting(50, "lstm", 64, 512, 1, 0.0, 32, (1, 2, 5, 8, 20, 40)),
        "word-gru": Setting(10_000, "gru", 200, 200, 2, 0.2, 20, (1, 5, 35)),
        "char-gru": Setting(50, "gru", 64, 512, 1, 0.0, 32, (1, 5, 40)),
    }
)

OURS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {"synthesizer": "none"},
        "multi-horizon, K = 1": {"synthesizer": "multi-horizon", "horizons": 1},
        "multi-horizon, K = 1, no lookahead": {"synthesizer": "multi-horizon", "horizons": 1, "lookahead": 0},
        "multi-horizon, next 4 steps": {"synthesizer": "multi-horizon", "horizons": 1, "lookahead": 4},
        "multi-horizon": {"synthesizer": "multi-horizon"},
        "multi-horizon, K = 4": {"synthesizer": "multi-horizon", "horizons": 4},
        "exact, 1 step": {"synthesizer": "exact", "exact_steps": 1},
        "exact, 4 steps": {"synthesizer": "exact", "exact_steps": 4},
    }
)
"""The ways of the library, as options of scripts/train_lm.py. The other options have the defaults for characters.

So "multi-horizon" has the number of horizons of `default_horizons`, at each T and for words too. The command's default is
one horizon of T steps for words below T = 8, and one horizon of 4 steps from T = 8 on.
"""

ONE = "multi-horizon, K = 1"
"""The way to which dni-pytorch's way is compared."""

PLAIN, PLAIN_FUSED, SEED = "plain", "plain, fused Adam", "dni-pytorch's way"
PLAIN_KEPT = "plain, fused Adam, freed memory kept"
FLOOR = "floor"
FLOORS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys((PLAIN, PLAIN_FUSED, PLAIN_KEPT, "none"), FLOOR),
        **{way: f"{FLOOR} with {way}" for way in (ONE, "multi-horizon")},
    }
)
"""The floor (see `step_floor`) with which a way is compared: that without a synthesizer, or with the way's synthesizer."""

FLOOR_OPTIONS = MappingProxyType({floor: OURS[way] if floor != FLOOR else None for way, floor in FLOORS.items()})
"""The options of the synthesizer in a floor, None for the floor without a synthesizer."""

AS_IT_COMES, KEPT = (PLAIN, PLAIN_FUSED, SEED), (PLAIN_KEPT, *FLOOR_OPTIONS, *OURS)
WAYS = (*AS_IT_COMES, *KEPT)

CLIP = 0.25


def model_of(setting: Setting) -> LanguageModel:
    """Returns the model, with the same initial weights for every way.

    The plain ways and dni-pytorch's way then set `native_steps` to 0, so that they run `nn.LSTM` as PyTorch does.
    """
    torch.manual_seed(0)
    sizes = {name: getattr(setting, name) for name in ("cell", "embed", "hidden", "layers", "dropout")}
    return LanguageModel(setting.vocabulary, **sizes)


def plain_step(setting: Setting, bptt: int, *, fused: bool) -> Step:
    """Returns a function that makes one step of truncated BPTT in a plain loop of PyTorch."""
    model = model_of(setting)
    model.native_steps = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    tokens = torch.randint(setting.vocabulary, (bptt, setting.lanes))
    state: Any = model.initial_state(setting.lanes)

    def step() -> None:
        nonlocal state
        logits, last = model(tokens, state)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        state = tuple(leaf.detach() for leaf in last) if isinstance(last, tuple) else last.detach()

    return step


def seed_step(setting: Setting, bptt: int) -> Step:
    """Returns a function that makes one step of synthetic gradients as in dni-pytorch's README.

    One MLP reads the leaves of the state joined to one tensor, and one Adam updates the parameters of the model and the MLP.
    """
    model = model_of(setting)
    model.native_steps = 0
    parts = 2 if setting.cell == "lstm" else 1
    width = parts * setting.hidden
    synthesizer = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )
    parameters = [*model.parameters(), *synthesizer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    tokens = torch.randint(setting.vocabulary, (bptt, setting.lanes))
    joined = torch.zeros(setting.layers, setting.lanes, width)

    def step() -> None:
        nonlocal joined
        optimizer.zero_grad()
        trigger = joined.detach().requires_grad_()
        start: Any = tuple(part.contiguous() for part in trigger.chunk(2, dim=-1)) if parts == 2 else trigger
        logits, last = model(tokens, start)
        joined = torch.cat(last, dim=-1) if parts == 2 else last
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        with torch.no_grad():
            message = 0.1 * synthesizer(joined)
        torch.autograd.backward([loss, joined], [None, message])
        F.mse_loss(synthesizer(trigger.detach()), trigger.grad).backward()  # type: ignore[arg-type]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return step


def our_trainer(
    setting: Setting, bptt: int, options: Mapping[str, Any]
) -> tuple[SequenceTrainer, torch.Tensor, Lookahead | None]:
    """Returns `SequenceTrainer` as scripts/train_lm.py builds it, a window of tokens [T, B], and a lookahead.

    The lookahead is None if the synthesizer reads none.
    """
    sizes = {name: getattr(setting, name) for name in ("embed", "hidden", "layers", "dropout")}
    common = {"model": setting.cell, "bptt": bptt, "lr": 1e-3, "clip": CLIP, "batch_size": setting.lanes, **sizes}
    settled = build(LanguageModelOptions, common, options)
    trainer = build_trainer(settled, model_of(setting), torch.device("cpu"))
    tokens = torch.randint(setting.vocabulary, (bptt, setting.lanes))
    steps = settled.resolve(bptt).window_lookahead
    ahead = torch.randint(setting.vocabulary, (steps, setting.lanes))
    lookahead = Lookahead(ahead, ahead, torch.ones_like(ahead, dtype=torch.bool)) if steps else None
    return trainer, tokens, lookahead


def our_step(setting: Setting, bptt: int, options: Mapping[str, Any]) -> Step:
    """Returns a function that makes one step of `our_trainer`."""
    trainer, tokens, lookahead = our_trainer(setting, bptt, options)

    def step() -> None:
        trainer.step(tokens, tokens, lookahead=lookahead)

    return step
