"""Records the settings that the pictures of docs/images show: python -m docs.images.settings PICTURE...

Run the command after a picture has been made. A test compares the record with the defaults of the code and with the files of
the pictures. The test fails if a picture shows an older default than the code has, or if a new picture has no record.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

from dni_seq.app.decoupled.train import DecoupledOptions
from dni_seq.app.lm.options import DEFAULTS, LanguageModelOptions, with_default_sizes
from dni_seq.app.runs.options import build
from dni_seq.app.runs.tensorboard import LAYOUT

FOLDER = Path(__file__).parent
RECORD = FOLDER / "settings.json"
ROOT = FOLDER.parents[1]

NOT_SHOWN = frozenset(
    {
        "compile",
        "data_dir",
        "device",
        "dry_run",
        "epochs",
        "eval_only",
        "logger",
        "plot",
        "rank_timeout",
        "run_dir",
        "threads",
    }
)
"""Options that do not change the curves of a picture, and are not recorded."""


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def text_run(level: str, **given: Any) -> dict[str, Any]:
    """Returns the settings in force in a run of `train_lm.py` by words or by characters, defaults included."""
    options = with_default_sizes(build(LanguageModelOptions, {"tokenizer": level, **DEFAULTS[level]}, given))
    return shown({**dataclasses.asdict(options), **dataclasses.asdict(options.resolve(options.bptt))})


def shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that have a value and that a picture depends on."""
    return {name: value for name, value in settings.items() if value is not None and name not in NOT_SHOWN}


def dashboard() -> dict[str, Any]:
    """Returns the settings of dashboard.png: the run with a synthesizer, and the two groups of charts that are in view."""
    run = text_run("word", synthesizer="multi-horizon", max_tokens=200_000, fidelity_every=47)
    return {"run": run, "charts": dict(list(LAYOUT.items())[:2])}


def decoupled() -> dict[str, Any]:
    """Returns the settings of decoupled.png: a run of two parts in two processes with a pause of part B."""
    return shown(dataclasses.asdict(DecoupledOptions(updates=10_000, pause_at=5_000)))


def growth() -> dict[str, Any]:
    """Returns the settings of growth.png and memory.png.

    They are the sizes from which each quantity is varied, the synthesizer at these sizes, and a checksum of the lines drawn.
    """
    folder = ROOT / "benchmarks"
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        point = runpy.run_path(str(folder / "growth.py"))["Point"]()._asdict()
    options = build(LanguageModelOptions, {"tokenizer": "char", **DEFAULTS["char"]}, {"horizons": point["horizons"]})
    return {
        "point": shown({name: value for name, value in point.items() if name != "windows"}),
        "synthesizer": shown(dataclasses.asdict(options.resolve(point["bptt"]))),
        "vocabulary of the synthesizer": options.synthesizer_vocab_size,
        "lines": digest(ROOT / "docs" / "results" / "growth.jsonl"),
    }


PICTURES: Mapping[str, Callable[[], Mapping[str, Any]]] = MappingProxyType(
    {"dashboard.png": dashboard, "decoupled.png": decoupled, "growth.png": growth, "memory.png": growth}
)
"""The function that returns the settings of a picture by the present code, by picture."""


def differences(name: str, recorded: Mapping[str, Any]) -> list[str]:
    """Returns one text for each recorded setting of a picture that differs from the setting by the present code.

    If the picture's file is not the recorded one, another text says so. Options that are newer than the picture are not in
    the record and are not compared: the default of a new option must not change what earlier runs did.
    """
    found = [] if recorded["file"] == digest(FOLDER / name) else [f"{name} is another file than the recorded one"]
    today = flat(json.loads(json.dumps(PICTURES[name]())))
    for setting, value in flat(recorded["settings"]).items():
        if today.get(setting) != value:
            found.append(f"{name} shows {setting} = {value}, the default is {today.get(setting)}")
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as one dict, with the keys joined by slashes."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", choices=sorted(PICTURES), metavar="PICTURE", help=", ".join(sorted(PICTURES)))
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name in parser.parse_args(arguments).pictures:
        record[name] = {"file": digest(FOLDER / name), "settings": PICTURES[name]()}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
