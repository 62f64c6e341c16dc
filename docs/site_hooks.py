"""Hooks of the site: adds pages from files outside of docs, and corrects the links to and from these pages.

`mkdocs.yml` names this file. README and some other files stay at their places in the repository, and are pages of the site
too.
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
"""Files outside of docs, each with its path in the site."""

MOVED: Mapping[str, str] = MappingProxyType({"README.md#tensorboard": "reference/tensorboard.md"})
"""Links to sections of README that have moved to another page, each with the path of that page in the site."""

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside of docs to the files of the site."""
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page, which are paths in the repository, to paths in the site."""
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
"""Matches an HTML element for which a browser loads a file from another server."""


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Returns a page unchanged. Raises a PluginError if a browser would load a part of the page from another server."""
    found = LOADED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from a network: {found[0]}")
    return output
