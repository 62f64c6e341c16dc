"""The site builds without a warning, needs no network, and its search answers what a new user asks."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.images.browser import Browser, find_chromium
from tests.paths import ROOT

QUESTIONS = {
    "data loader": {"guides/trainer.html", "guides/data.html"},
    "choosing T lookahead": {"guides/choosing.html"},
    "limitations": {"about/limitations.html"},
    "curve": {"dashboard.html"},
    "GPU": {"guides/gpu.html"},
    "cite": {"about/citation.html"},
    "SequenceTrainer": {"reference/trainer.html", "guides/trainer.html"},
    "R² below zero": {"concepts/synthesizers.html"},
    "Lightning": {"guides/migrating.html"},
    "resume": {"guides/language-models.html", "reliability.html", "guides/failures.html", "reference/train.html"},
}
"""What a new user searches for, and pages of which one must be among the first results."""

TYPE = """(() => {
  document.querySelector("#__search").click();
  const input = document.querySelector(".md-search__input");
  input.focus();
  input.value = QUERY;
  input.dispatchEvent(new Event("input", {bubbles: true}));
  input.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
})()"""

FOUND = """(() => {
  const shown = [...document.querySelectorAll(".md-search-result__link")].map((link) => link.href);
  return document.querySelector(".md-search-result__meta").innerText.match(/^\\d/) ? shown.slice(0, 6) : null;
})()"""

LOADED = "performance.getEntriesByType('resource').map((entry) => entry.name)"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `.ci/run` has built it, or built here."""
    if "DNI_SEQ_SITE" in os.environ:
        return Path(os.environ["DNI_SEQ_SITE"])
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason=f"{name}, of the extra docs, is not installed; .ci/run builds the site")
    directory = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module", params=["file", "server"])
def address(request, site) -> Iterator[str]:
    """Where a browser finds the site."""
    if request.param == "file":
        yield site.as_uri()
        return

    class Silent(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given, **named):
            super().__init__(*given, directory=str(site), **named)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_no_page_loads_from_a_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    elements = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
    for path in pages:
        assert not elements.findall(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_public_name_is_on_its_page(site):
    import dni_seq
    from docs import tables

    text = "".join((site / "reference" / f"{page}.html").read_text(encoding="utf-8") for page in tables.REFERENCE)
    for name in dni_seq.__all__:
        assert f'id="dni_seq.{name}"' in text, name


def test_the_search_answers_what_a_new_user_asks(site, address):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with Browser(chromium) as browser:
        for number, (question, pages) in enumerate(QUESTIONS.items()):
            browser.open(f"{address}/index.html?{number}")  # a new address, so that the page before is not meant
            browser.wait(f"location.search === '?{number}' && document.readyState === 'complete'")
            browser.run(TYPE.replace("QUERY", repr(question)))
            results = browser.wait(FOUND)
            shown = [result.split("?")[0].split("#")[0].removeprefix(f"{address}/") for result in results]
            assert pages & set(shown), f"{question}: {shown}"
        for resource in browser.run(LOADED):
            assert resource.startswith((address, "file:")), resource
