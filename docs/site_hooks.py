"""Hooks of the site: pages from files outside of docs, and links between them.

`mkdocs.yml` names this file. README and others stay where a clone has them, and are pages of the site too.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

OUTSIDE: Mapping[str, str] = MappingProxyType(
    {
        "README.md": "about/readme.md",
        "CHANGELOG.md": "about/changes.md",
        "CONTRIBUTING.md": "about/contributing.md",
        "ARCHITECTURE.md": "about/architecture.md",
        "CITATION.cff": "about/CITATION.cff",
        "data/README.md": "guides/data-directory.md",
    }
)
"""Files outside of docs, and their places in the site."""

MOVED: Mapping[str, str] = MappingProxyType({"README.md#tensorboard": "reference/tensorboard.md"})
"""Sections that older pages still look for in README, and their places in the site."""

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files from outside."""
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at the places in the site."""
    here = page.file.src_uri
    source = {place: name for name, place in OUTSIDE.items()}.get(here, f"docs/{here}")

    def moved(found: re.Match[str]) -> str:
        target = found[2]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        part = found[3] or ""
        place = OUTSIDE.get(name, name.removeprefix("docs/")) + part
        place = MOVED.get(name + part, place)
        return f"{found[1]}{posixpath.relpath(place, posixpath.dirname(here) or '.')})"

    return LINK.sub(moved, markdown)


LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>|<link\b(?![^>]*canonical)[^>]*href=["']?https?:[^>]*>"""
)
"""An element that a browser loads from another server."""


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raises a PluginError if a page would load something from a network."""
    found = LOADED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from a network: {found[0]}")
    return output
