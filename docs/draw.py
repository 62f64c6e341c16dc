"""Draws public docstrings at random, to be read without the code: python docs/draw.py --seed 1

The reader counts the docstrings that need a second reading. The public names are those of `dni_seq.__all__` and of
`dni_seq.streams.__all__`, with the public methods and properties of the classes among them.
"""

from __future__ import annotations

import argparse
import inspect
import random
import re
from types import ModuleType

import dni_seq
from dni_seq import streams


def public(module: ModuleType) -> dict[str, str]:
    """Returns signature and docstring by name, for a module's public names and the members that its classes define."""
    found = {}
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        found[f"{module.__name__}.{name}"] = described(name, thing)
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else value
                if not member.startswith("_") and inspect.isfunction(function) and function.__doc__:
                    title = f"{name}.{member}" + (" (property)" if isinstance(value, property) else "")
                    found[f"{module.__name__}.{name}.{member}"] = described(title, function)
    return found


def described(name: str, thing: object) -> str:
    """Returns the signature and the docstring of a class or function as text."""
    try:
        signature = str(inspect.signature(thing))  # type: ignore[arg-type]
        signature = re.sub(r"ForwardRef\('([^']*)'\)", r"\1", signature).replace("'", "")
    except (TypeError, ValueError):
        signature = ""
    return f"{name}{signature}\n{inspect.getdoc(thing)}"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=15)
    options = parser.parse_args()
    every = public(dni_seq) | public(streams)
    for i, name in enumerate(random.Random(options.seed).sample(sorted(every), options.count), start=1):
        print(f"--- {i} of {options.count}, {len(every)} in all: {name}\n{every[name]}\n")


if __name__ == "__main__":
    main()
