"""Models as safetensors: saved, loaded, read from runs, and exchanged with plain PyTorch modules."""

from __future__ import annotations

import inspect
import json
import shutil
import sys

import pytest
import torch
from torch import nn

from dni_seq.integrations import pretrained
from dni_seq.models.language_model import LanguageModel

safetensors = pytest.importorskip("safetensors.torch")

SIZES = {"embed": 6, "hidden": 6, "layers": 2}
MODELS = {
    "lstm": {},
    "lstm tied": {"tied": True, "dropout": 0.25},
    "gru sparse": {"cell": "gru", "sparse_embedding": True},
    "mingru traces": {"cell": "mingru", "traces": "exact"},
    "lru": {"cell": "lru"},
    "lstm snap1": {"traces": "snap1"},
    "gru factored": {"cell": "gru", "traces": "factored"},
}
TOKENS = torch.arange(12).reshape(4, 3) % 9


def build(dtype: torch.dtype = torch.float32, **settings) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(9, **{**SIZES, **settings}).to(dtype)


def logits(model: LanguageModel, lanes: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, model.initial_state(lanes))[0]


def test_a_model_has_both_as_methods(two_runs, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    of_run = LanguageModel.from_pretrained(two_runs / "none")
    assert of_run.state_dict().keys() == pretrained.load(two_runs / "none").state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back(name, tmp_path):
    model = build(**MODELS[name])
    pretrained.save(model, tmp_path / "new" / "model")
    loaded = pretrained.load(tmp_path / "new" / "model")
    assert loaded.settings == model.settings
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded), logits(model))
    tied = name == "lstm tied"
    assert (loaded.projection.weight is loaded.embedding.weight) == tied
    names = safetensors.load_file(tmp_path / "new" / "model" / "model.safetensors").keys()
    assert names == model.state_dict().keys() - ({"projection.weight"} if tied else set())


def test_config_holds_every_argument_and_weights_their_names(tmp_path):
    pretrained.save(build(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    parameters = inspect.signature(LanguageModel).parameters
    assert config["model"].keys() == parameters.keys()
    rnn = {f"rnn.{name}" for name in nn.LSTM(6, 6, 2).state_dict()}
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    assert weights.keys() == {"embedding.weight", "projection.weight", "projection.bias", *rnn}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_settings_are_what_was_given():
    given = {"cell": "gru", "embed": 5, "hidden": 7, "layers": 3, "dropout": 0.5, "tied": False}
    given |= {"sparse_embedding": True, "traces": "factored", "trace_decay": 0.5}
    assert LanguageModel(9, **given).settings == {"vocabulary_size": 9, **given}


def test_dtype_and_random_state_are_kept(tmp_path):
    pretrained.save(build(torch.float64), tmp_path)
    assert pretrained.load(tmp_path, device="meta").projection.bias.is_meta
    before = torch.get_rng_state()
    assert pretrained.load(tmp_path).projection.bias.dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), before)


def test_a_directory_of_save_is_replaced_and_nothing_else(tmp_path):
    pretrained.save(build(), tmp_path / "mine")
    other = build(cell="gru")
    pretrained.save(other, tmp_path / "mine")
    assert torch.equal(logits(pretrained.load(tmp_path / "mine")), logits(other))
    (tmp_path / "config.json").write_text('{"dataset": "ptb"}')
    with pytest.raises(ValueError, match=r"holds another config\.json: choose another directory"):
        pretrained.save(other, tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"dataset": "ptb"}'
    with pytest.raises(ValueError, match="is a file"):
        pretrained.save(other, tmp_path / "config.json")
    with pytest.raises(TypeError, match="got LSTM"):
        pretrained.save(nn.LSTM(2, 2), tmp_path / "rnn")


def test_a_run_gives_its_best_checkpoint_and_needs_no_safetensors(two_runs, tmp_path, monkeypatch):
    run = shutil.copytree(two_runs / "none", tmp_path / "run")
    for name in ("last", "previous"):
        (run / "checkpoints" / f"{name}.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        patch.setitem(sys.modules, "safetensors.torch", None)
        model = pretrained.load(run)
        with pytest.raises(ImportError, match=r"pip install 'dni-seq\[pretrained\]'"):
            pretrained.save(model, tmp_path / "saved")
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["trainer"]["model"]
    assert model.state_dict().keys() == best.keys()
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())
    pretrained.save(model, tmp_path / "saved")
    assert torch.equal(logits(pretrained.load(tmp_path / "saved")), logits(model))
    config = (run / "config.json").read_text()
    with pytest.raises(ValueError, match="choose another directory"):
        pretrained.save(model, run)
    assert (run / "config.json").read_text() == config


def damage_weights(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def change_config(model=None, **changes):
    def change(directory):
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config["model"] |= model or {}
        path.write_text(json.dumps(config | changes))

    return change


DAMAGE = {
    "empty": (lambda directory: [path.unlink() for path in directory.iterdir()], "no model.safetensors and no run"),
    "no config": (lambda directory: (directory / "config.json").write_text("{"), "is not JSON"),
    "a list": (lambda directory: (directory / "config.json").write_text("[]"), "does not describe a language model"),
    "another format": (change_config(format="other"), "does not describe a language model"),
    "newer": (change_config(version=2), "upgrade dni_seq"),
    "short": (damage_weights, "is damaged"),
    "other sizes": (change_config(model={"hidden": 7}), "do not fit its config.json"),
    "other argument": (change_config(model={"heads": 7}), "do not fit its config.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(case, tmp_path):
    pretrained.save(build(), tmp_path)
    change, message = DAMAGE[case]
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.load(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("traces", [None, "snap1"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weights_of_plain_modules_come_and_go(cell, traces):
    model = build(cell=cell, traces=traces, embed=5)
    torch.manual_seed(8)
    theirs = (nn.LSTM if cell == "lstm" else nn.GRU)(5, 6, 2, batch_first=True)
    before = pretrained.plain_rnn(model).state_dict()
    ours = pretrained.plain_rnn(model)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        embedded = model.embedding(TOKENS)
        outputs, _ = theirs(embedded.transpose(0, 1))
        expected = model.projection(outputs.transpose(0, 1))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)  # kernels differ in the order of sums
    back = (nn.LSTM if cell == "lstm" else nn.GRU)(5, 6, 2)
    back.load_state_dict(ours.state_dict())
    assert before.keys() == back.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_diagonal_cells_have_no_counterpart():
    with pytest.raises(ValueError, match="cell 'lru' has no counterpart in PyTorch"):
        pretrained.plain_rnn(build(cell="lru"))
