"""The pictures of docs/images are no older than the defaults that they show."""

from __future__ import annotations

import json
from types import MappingProxyType

import pytest

from dni_seq.app.lm import options
from docs.images import settings

RECORD = json.loads(settings.RECORD.read_text(encoding="utf-8"))


def test_every_picture_has_a_record():
    assert sorted(RECORD) == sorted(path.name for path in settings.FOLDER.glob("*.png")) == sorted(settings.PICTURES)


@pytest.mark.parametrize("name", sorted(RECORD))
def test_a_picture_shows_the_defaults_of_the_code(name):
    """Where this fails: make the picture again as its script says, then python -m docs.images.settings NAME"""
    assert len(settings.flat(RECORD[name]["settings"])) > 10
    assert settings.differences(name, RECORD[name]) == []


def test_another_default_and_another_file_are_found(monkeypatch):
    words = {**options.DEFAULTS["word"], "bptt": 7}
    monkeypatch.setattr(settings, "DEFAULTS", MappingProxyType({**options.DEFAULTS, "word": words}))
    recorded = {**RECORD["dashboard.png"], "file": "another"}
    file, *others = settings.differences("dashboard.png", recorded)
    assert file == "dashboard.png is another file than the recorded one"
    assert "dashboard.png shows run/bptt = 5, the default is 7" in others
