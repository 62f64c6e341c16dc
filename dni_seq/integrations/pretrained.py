"""Saves language models as safetensors with a config.json, loads them again, and loads the best model of a run.

`config.json` holds the arguments of `LanguageModel`, `model.safetensors` its weights under the names of its state_dict:
`embedding.weight`, `rnn.*`, `projection.weight` (absent if tied) and `projection.bias`. For the cells "lstm" and "gru"
without traces the names after `rnn.` are those of `nn.LSTM` and `nn.GRU`, so that any program which reads safetensors can
use the weights. Needs the package safetensors: `pip install 'dni-seq[pretrained]'`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.app.runs.checkpoint import write_atomically, write_json
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.models.dense_cells import DenseRNN
from dni_seq.models.language_model import LanguageModel

FORMAT = "dni_seq language model"
VERSION = 1

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: LanguageModel, directory: str | Path) -> None:
    """Writes the model to `directory` as config.json and model.safetensors, each atomically.

    The directory is created if it does not exist. A model that `save` wrote there before is replaced.

    Raises:
        TypeError: `model` is not a `LanguageModel`.
        ValueError: `directory` is a file, or holds a config.json that `save` did not write.
        ImportError: safetensors is not installed.
        OSError: a file cannot be written.
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"save needs a LanguageModel, got {type(model).__name__}")
    torch_files, directory = _safetensors(), Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: choose another directory")
    if (directory / CONFIG).exists() and _config(directory).get("format") != FORMAT:
        raise ValueError(f"{directory} holds another {CONFIG}: choose another directory")
    # Copies, since safetensors rejects tensors that share memory, as the weights of cuDNN do.
    weights = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    if model.settings["tied"]:
        del weights["projection.weight"]
    content = torch_files.save(weights, metadata={"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / WEIGHTS, lambda file: file.write(content))
    write_json(directory / CONFIG, {"format": FORMAT, "version": VERSION, "model": model.settings})


def load(directory: str | Path, *, device: torch.device | str = "cpu") -> LanguageModel:
    """Returns the model that `save` wrote to `directory`, or the best checkpoint of a run, in evaluation mode.

    Weights keep their dtype. The global random state does not change.

    Args:
        directory: a directory of `save`, or the directory of a run of `train_lm.py`, such as "runs/mine".
        device: the device to move the model to.

    Raises:
        ValueError: the directory holds neither a saved model nor a run, a file is damaged, or the model that config.json
            describes has other weights.
        ImportError: safetensors is not installed; the directory of a run does not need it.
    """
    directory, device = Path(directory), torch.device(device)
    with torch.random.fork_rng(devices=[]):  # construction draws initial weights
        if (directory / WEIGHTS).is_file():
            model = _saved(directory)
        elif (directory / CONFIG).is_file():
            model = _of_run(directory)
        else:
            raise ValueError(
                f"{directory} holds no {WEIGHTS} and no run: give a directory that save wrote, or the directory of a run"
            )
    return model.to(device).eval()


def plain_rnn(model: LanguageModel) -> nn.LSTM | nn.GRU:
    """Returns the `nn.LSTM` or `nn.GRU` that holds the recurrent weights of `model`, with or without traces.

    `plain_rnn(model).load_state_dict(theirs.state_dict())` takes over the weights of a plain PyTorch model, and
    `theirs.load_state_dict(plain_rnn(model).state_dict())` hands them back. `theirs` must have the class, the
    input size, the hidden size and the number of layers of the returned module. It must have biases, one direction and no
    projection. Its `batch_first` may differ. `model.embedding` and `model.projection` are an
    `nn.Embedding` and an `nn.Linear`; PyTorch's word_language_model calls them `encoder` and `decoder`.

    Raises:
        ValueError: the cell is neither "lstm" nor "gru".
    """
    rnn = model.rnn.rnn if isinstance(model.rnn, DenseRNN) else model.rnn
    if not isinstance(rnn, nn.LSTM | nn.GRU):
        raise ValueError(f"cell {model.cell!r} has no counterpart in PyTorch: only lstm and gru have")
    return rnn


def _saved(directory: Path) -> LanguageModel:
    """Returns the model that `save` wrote.

    Raises:
        ValueError: a file is damaged, or the model that config.json describes has other weights.
        ImportError: safetensors is not installed.
    """
    torch_files, config = _safetensors(), _config(directory)
    if config.get("format") != FORMAT or not isinstance(config.get("model"), dict):
        raise ValueError(f"{directory / CONFIG} does not describe a language model of dni_seq")
    if config.get("version") != VERSION:
        raise ValueError(
            f"{directory} has version {config.get('version')}, but this dni_seq reads version {VERSION}: upgrade dni_seq"
        )
    content = (directory / WEIGHTS).read_bytes()
    try:
        weights: dict[str, Tensor] = torch_files.load(content)
    except Exception as error:  # safetensors raises errors of a class of its own, and damaged bytes can fail anywhere
        raise ValueError(f"{directory / WEIGHTS} is not a safetensors file, or is damaged") from error
    try:
        return _filled(config["model"], weights)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights in {directory} do not fit its {CONFIG}: {reason}") from error


def _filled(settings: Mapping[str, Any], weights: dict[str, Tensor]) -> LanguageModel:
    """Returns a model with `settings` and `weights`."""
    model = LanguageModel(**settings).to(weights["embedding.weight"].dtype)
    if model.settings["tied"]:
        weights = {**weights, "projection.weight": weights["embedding.weight"]}
    model.load_state_dict(weights)
    return model


def _of_run(directory: Path) -> LanguageModel:
    """Returns the model of a run's best checkpoint.

    Raises:
        ValueError: the directory holds no run, its best checkpoint is missing, or a file is damaged.
    """
    from dni_seq.app.lm.build import load_run  # imports all that the commands need; a saved model needs none of it

    run = RunDirectory(directory)
    return load_run(run, run.best, torch.device("cpu")).model


def _config(directory: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
        ValueError: the file is not JSON, or its content is not a dict.
    """
    try:
        content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{directory / CONFIG} is not JSON, or is damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{directory / CONFIG} does not describe a language model of dni_seq")
    return content


def _safetensors() -> Any:
    """Returns the module `safetensors.torch`.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("this needs the package safetensors: pip install 'dni-seq[pretrained]'") from error
    return safetensors.torch
