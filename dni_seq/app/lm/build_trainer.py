"""Builds the trainer of a language-model run from its options: optimizers, synthesizer, compilation, diagnostics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dni_seq.app.build.backpropagation import set_backpropagation
from dni_seq.app.build.credit import ModelSpec, synthetic_arguments
from dni_seq.app.build.optimizers import build_optimizer
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.core.optimizer_step import JoinedOptimizer
from dni_seq.core.states import floating
from dni_seq.core.windows import Lookahead
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.models.language_model import LanguageModel, token_losses
from dni_seq.models.lstm_kernels import native_up_to
from dni_seq.models.recurrent import state_cells
from dni_seq.synthesizers.for_model import EMBED
from dni_seq.synthesizers.token_classes import token_embedding
from dni_seq.trainer import SequenceTrainer


def build_trainer(
    options: LanguageModelOptions, model: LanguageModel, device: torch.device, parallel: DataParallel | None = None
) -> SequenceTrainer:
    """Returns the trainer with its optimizers. `parallel` selects this rank's lanes; None for a run in one process.

    Raises:
        ValueError: options exclude each other, for example a sparse embedding and several ranks.
    """
    if parallel is not None and options.sparse_embedding:
        raise ValueError("--sparse-embedding works in one process only: remove it under torchrun")
    chosen = options.resolve(options.bptt)
    model.native_steps = native_up_to(chosen.state_products)
    spec = ModelSpec(
        model,
        token_losses,
        example=model.initial_state(1),
        cells=state_cells(model.rnn),
        encode=lambda: token_encoders(model.projection.out_features, options.synthesizer_vocab_size),
        outputs=model.projection.out_features,
        past_loss=token_losses,
        inputs=model.projection.out_features,
        max_classes=options.synthesizer_vocab_size,
        share=None if parallel is None else parallel.share,
    )
    synthetic = synthetic_arguments(chosen, spec, options.synthesizer_lr)
    if options.compile:
        compile_model(model, options, device)
    # The synthesizer has drawn its weights. Seeding again gives the same dropout with and without a synthesizer.
    torch.manual_seed(options.seed)
    trainer = SequenceTrainer(
        model,
        optimizer_of(model, options),
        token_losses,
        clip=options.clip or None,
        autocast=lm.autocast_of(options),
        parallel=parallel,
        **synthetic,
    )
    trainer.accumulate = options.accumulate
    set_backpropagation(trainer, options, options.bptt)
    return trainer


def token_encoders(vocabulary_size: int, max_classes: int) -> tuple[nn.Module, nn.Module]:
    """Returns the encoders of the lookahead's inputs and targets, which are one embedding. Rare tokens share one class.

    The embedding belongs to the synthesizer, not to the model.
    """
    embedding = token_embedding(vocabulary_size, max_classes, EMBED)
    return embedding, embedding


@torch.no_grad()
def messages(trainer: SequenceTrainer, lookahead: Lookahead | None) -> list[Tensor]:
    """Returns the synthesizer's unscaled messages at the trainer's state, one flat tensor per horizon.

    The list is empty without a synthesizer.

    Args:
        trainer: the trainer after a step.
        lookahead: lookahead of that step's window.
    """
    if trainer.credit is None:
        return []
    predicted = trainer.credit.interface.messages(trainer.state, lookahead)
    return [torch.cat([leaf.flatten() for leaf in floating(message)]) for message in predicted]


def cell_size(trainer: SequenceTrainer) -> dict[str, float]:
    """Returns the root mean square and the largest absolute value of an LSTM's cells by TensorBoard key.

    Empty for other models, and before the first step.
    """
    if not isinstance(trainer.model.rnn, nn.LSTM) or trainer.state is None:
        return {}
    cells = trainer.state[1].float()
    return {"state/cell_rms": float(cells.square().mean().sqrt()), "state/cell_max": float(cells.abs().max())}


def compile_model(model: LanguageModel, options: LanguageModelOptions, device: torch.device) -> None:
    """Compiles the model in place, and runs it forward and backward on a window of the run's shape, which compiles it now.

    Raises:
        ValueError: the model cannot be compiled, for example without a C++ compiler.
    """
    model.compile()
    tokens = torch.zeros((options.bptt, options.batch_size), dtype=torch.int64, device=device)
    try:
        model(tokens, model.initial_state(options.batch_size))[0].sum().backward()
    except RuntimeError as error:
        raise ValueError(f"--compile does not work here, remove it: {str(error).splitlines()[0]}") from error
    model.zero_grad()


def optimizer_of(model: LanguageModel, options: LanguageModelOptions) -> torch.optim.Optimizer:
    """Returns the optimizer of all parameters. With `--sparse-embedding`, SparseAdam updates the embedding.

    Raises:
        ValueError: `--sparse-embedding` is combined with another optimizer than adam, or with weight decay.
    """
    if not options.sparse_embedding:
        return build_optimizer(list(model.parameters()), options, options.lr)
    if options.optimizer != "adam" or options.weight_decay:
        raise ValueError("--sparse-embedding works with --optimizer adam without --weight-decay: remove one of them")
    rows = model.embedding.weight
    others = [parameter for parameter in model.parameters() if parameter is not rows]
    return JoinedOptimizer([build_optimizer(others, options, options.lr), torch.optim.SparseAdam([rows], options.lr)])
