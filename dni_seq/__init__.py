"""dni_seq: train recurrent networks on long streams with synthetic-gradient truncated BPTT.

Three levels of use: the command `python scripts/train_lm.py`, `SequenceTrainer` in a loop of one's own, and the bare
interfaces. `import dni_seq` needs torch alone.
"""

from .credit import Synthetic
from .deferred import GradientAccumulator, backward, defer_backward
from .exact_future import ExactFuture
from .future_gradient import FutureGradient
from .future_model import FutureModel
from .interfaces import BackwardInterface, BidirectionalInterface, ForwardInterface, synthesizer_context
from .least_squares import LeastSquaresHeads
from .state_synthesizers import (
    AuxiliaryTask,
    Horizons,
    LookaheadEncoder,
    MultiHorizonSynthesizer,
    StateHeads,
    StateSynthesizer,
)
from .synthesizers import LSTM_CELLS, BasicSynthesizer, GatedCells, Normalized
from .trainer import SequenceTrainer, StepResult
from .windows import Lookahead, Window, with_lookahead

__all__ = [
    "LSTM_CELLS",
    "AuxiliaryTask",
    "BackwardInterface",
    "BasicSynthesizer",
    "BidirectionalInterface",
    "ExactFuture",
    "ForwardInterface",
    "FutureGradient",
    "FutureModel",
    "GatedCells",
    "GradientAccumulator",
    "Horizons",
    "LeastSquaresHeads",
    "Lookahead",
    "LookaheadEncoder",
    "MultiHorizonSynthesizer",
    "Normalized",
    "SequenceTrainer",
    "StateHeads",
    "StateSynthesizer",
    "StepResult",
    "Synthetic",
    "Window",
    "backward",
    "defer_backward",
    "synthesizer_context",
    "with_lookahead",
]
