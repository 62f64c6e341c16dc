"""Writes README's tables of options and of TensorBoard keys from the code: python docs/tables.py

A test compares README with what this would write.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dni_seq.app.lm.options import PRESETS, LanguageModelOptions
from dni_seq.app.runs.options import default_of, flag, groups
from dni_seq.app.runs.tensorboard import KEYS, OTHER_KEYS

README = Path(__file__).parents[1] / "README.md"


def options() -> list[str]:
    """A row for each option of scripts/train_lm.py, group by group."""
    rows = ["| option | meaning | default |", "|---|---|---|"]
    for title, fields in groups(LanguageModelOptions).items():
        rows.append(f"| **{title}** | | |")
        for field in fields:
            choices = field.metadata["choices"]
            named = f"{field.metadata['help']}: {', '.join(choices)}" if choices else field.metadata["help"]
            cells = (f"`{flag(field.name)}`", named, default_of(field))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    presets = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in values.items())}" for name, values in PRESETS.items())
    rows += ["| **from elsewhere** | | |", f"| `--preset` | options of a known setting: {presets} | |"]
    return [*rows, "| `--config` | options from a JSON file, as a run's config.json is; over the preset, below the line | |"]


def keys() -> list[str]:
    """A row for each TensorBoard key."""
    return [
        "| key | meaning and unit |",
        "|---|---|",
        *(f"| `{key}` | {text} |" for key, text in (KEYS | OTHER_KEYS).items()),
    ]


def written(text: str) -> str:
    """README's text with its tables as they should be."""
    for name, rows in (("options", options()), ("keys", keys())):
        mark = rf"(<!-- {name}: written by docs/tables.py -->\n).*?(<!-- end of {name} -->)"
        body = "\n".join(rows)
        text, count = re.subn(mark, lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md must have the mark of {name} once")
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
