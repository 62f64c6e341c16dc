"""The public names of the package. `dni_seq` imports this module when a public name is first used."""

from dni_seq.check import check_model
from dni_seq.core.burn_in import burn_in
from dni_seq.core.deferred_backward import GradientAccumulator, backward, defer_backward
from dni_seq.core.nonfinite import NonFiniteError
from dni_seq.core.windows import Lookahead, Past, Surroundings, Window, with_lookahead
from dni_seq.credit.config import SyntheticGradientConfig
from dni_seq.credit.description import TrainerDescription
from dni_seq.credit.fidelity import fidelity
from dni_seq.credit.replay import RecordedWindow
from dni_seq.credit.results import StepResult, Synthetic
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.interfaces.backward import BackwardInterface
from dni_seq.interfaces.context import synthesizer_context
from dni_seq.interfaces.forward import BidirectionalInterface, ForwardInterface
from dni_seq.model_checks.report import ModelReport
from dni_seq.parameter_fidelity import GradientFidelity, gradient_fidelity
from dni_seq.synthesizers.auxiliary import AuxiliaryTask
from dni_seq.synthesizers.base import Regression
from dni_seq.synthesizers.exact_future import ExactFuture
from dni_seq.synthesizers.future_gradient import FutureGradient
from dni_seq.synthesizers.future_model import FutureModel
from dni_seq.synthesizers.gated_predictors import GatedFuture, GatedPast, JointPredictor
from dni_seq.synthesizers.least_squares import LeastSquaresHeads
from dni_seq.synthesizers.lookahead import LookaheadEncoder
from dni_seq.synthesizers.mlp import BasicSynthesizer
from dni_seq.synthesizers.multi_horizon import Horizons, MultiHorizonSynthesizer
from dni_seq.synthesizers.normalization import LSTM_CELLS, GatedCells, Normalized
from dni_seq.synthesizers.predictor import Predictor, StepLosses
from dni_seq.synthesizers.state_heads import StateHeads, StateSynthesizer
from dni_seq.synthesizers.target_rule import TargetRule
from dni_seq.trainer import SequenceTrainer

__all__ = [
    "LSTM_CELLS",
    "AuxiliaryTask",
    "BackwardInterface",
    "BasicSynthesizer",
    "BidirectionalInterface",
    "DataParallel",
    "ExactFuture",
    "ForwardInterface",
    "FutureGradient",
    "FutureModel",
    "GatedCells",
    "GatedFuture",
    "GatedPast",
    "GradientAccumulator",
    "GradientFidelity",
    "Horizons",
    "JointPredictor",
    "LeastSquaresHeads",
    "Lookahead",
    "LookaheadEncoder",
    "ModelReport",
    "MultiHorizonSynthesizer",
    "NonFiniteError",
    "Normalized",
    "Past",
    "Predictor",
    "RecordedWindow",
    "Regression",
    "SequenceTrainer",
    "StateHeads",
    "StateSynthesizer",
    "StepLosses",
    "StepResult",
    "Surroundings",
    "Synthetic",
    "SyntheticGradientConfig",
    "TargetRule",
    "TrainerDescription",
    "Window",
    "WindowRunner",
    "backward",
    "burn_in",
    "check_model",
    "defer_backward",
    "fidelity",
    "gradient_fidelity",
    "synthesizer_context",
    "with_lookahead",
]
