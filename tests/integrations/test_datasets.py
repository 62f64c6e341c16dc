"""Windows over data sets of `datasets`, against the plain stream over the same text, and resumed at every window."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch

from dni_seq.core.windows import Window
from dni_seq.integrations import datasets as datasets_module
from dni_seq.integrations.datasets import IDS, windows
from dni_seq.streams import DataError, WindowStream, hub_rows
from dni_seq.streams import lanes as lanes_module
from tests.streams.test_window_stream import LINES, TEXT, TOKENIZER, Listed, assert_same

ROWS = [line + "\n" for line in LINES]
TABLE = datasets.Dataset.from_dict({"text": ROWS, "number": list(range(len(ROWS)))})
IDS_TABLE = datasets.Dataset.from_dict({"input_ids": [TOKENIZER.encode(row).tolist() for row in ROWS]})


def generate() -> Any:
    for row in ROWS:
        yield {"text": row}


def local_function() -> datasets.IterableDataset:
    return TABLE.to_iterable_dataset().map(lambda row: {"text": row["text"]})


SOURCES: dict[str, tuple[Callable[[], Any], Any, bool]] = {
    "table": (lambda: TABLE, TOKENIZER, True),
    "table of ids": (lambda: IDS_TABLE, None, True),
    "arrays": (lambda: IDS_TABLE.with_format("numpy"), None, True),
    "stream": (lambda: TABLE.to_iterable_dataset(num_shards=3), TOKENIZER.encode, False),
    "stream of ids": (lambda: IDS_TABLE.to_iterable_dataset(), None, False),
    "generator": (lambda: datasets.IterableDataset.from_generator(generate), TOKENIZER, False),
    "local function": (local_function, TOKENIZER, False),
}
"""A data set, its tokenizer, and whether it is held in memory."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "RUN", 23)
    monkeypatch.setattr(datasets_module, "ROWS", 7)


def build(source: str, **options: Any) -> Any:
    make, tokenizer, _ = SOURCES[source]
    return windows(make(), tokenizer=tokenizer, **{"lanes": 3, "bptt": 5, "lookahead": 4, **options})


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_windows_are_those_of_the_plain_stream(source: str, reset: bool) -> None:
    documents = Listed(small=SOURCES[source][2])
    plain = WindowStream(documents, TOKENIZER, lanes=3, bptt=5, lookahead=4, document_reset=reset)
    ours = build(source, document_reset=reset)
    assert ours.windows_per_epoch == plain.windows_per_epoch
    for epoch in range(2):
        pairs = list(zip(ours, plain, strict=True))
        assert len(pairs) > 50
        for mine, theirs in pairs:
            assert_same(mine, theirs)
            assert (mine.mask is None) == (theirs.mask is None)
            assert mine.mask is None or torch.equal(mine.mask, theirs.mask)
        assert ours.epoch == epoch + 1


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("source", ["table of ids", "stream", "generator", "local function"])
def test_a_saved_position_resumes(source: str, reset: bool) -> None:
    stream = build(source, document_reset=reset)
    states: list[str] = []
    seen: list[Window] = []
    for epoch in range(2):
        for window in stream:
            seen.append(window)
            states.append(json.dumps(stream.state_dict()))
        assert stream.epoch == epoch + 1
    for at in (0, 7, 31, len(seen) // 2 - 1, len(seen) // 2 + 2):
        other = build(source, document_reset=reset)
        next(iter(other))
        other.load_state_dict(json.loads(states[at]))
        while at + 1 < len(seen):
            for window in other:
                at += 1
                assert_same(window, seen[at])
    stream.load_state_dict(json.loads(states[3]))
    stream.restart()
    assert_same(next(iter(stream)), seen[0])


def test_a_real_tokenizer_encodes_row_by_row() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    rows = ["to be or not", "to be", "", "that is"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[E]": 0, "to": 1, "be": 2, "or": 3, "[U]": 4}, "[U]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A [E]", special_tokens=[("[E]", 0)])
    stream = windows(datasets.Dataset.from_dict({"line": rows}), tokenizer=tokenizer, lanes=1, bptt=100)
    (window,) = stream
    ids = [*window.inputs[:, 0].tolist(), int(window.targets[-1, 0])]
    assert ids == [1, 2, 3, 4, 0, 1, 2, 0, 0, 4, 4, 0]


def test_every_id_travels() -> None:
    """Also those of surrogates, of a byte-order mark, of spaces and of line ends; long rows are cut and joined again."""
    ids = [0, 10, 13, 32, 0xD800, 0xDC00, 0xFEFF, 0xFFFF, 0x10000, IDS - 1] * 30_000
    (window,) = windows(datasets.Dataset.from_dict({"input_ids": [ids, []]}), lanes=1, bptt=IDS)
    assert window.inputs[:, 0].tolist() == ids[:-1]
    assert window.targets[:, 0].tolist() == ids[1:]


def test_another_text_or_tokenizer_is_noticed() -> None:
    state = build("table").state_dict()
    with pytest.raises(DataError, match="has changed since the position was saved"):
        windows(TABLE, tokenizer=lambda text: TOKENIZER.encode(text)[::-1], lanes=3, bptt=5).load_state_dict(state)


def test_columns_are_found_and_chosen() -> None:
    only = datasets.Dataset.from_dict({"line": ["ab", "cd"], "number": [1, 2]})
    (window,) = windows(only, tokenizer=TOKENIZER, lanes=1, bptt=9)
    assert TOKENIZER.decode(window.inputs[:, 0]) == "abc"
    two = datasets.Dataset.from_dict({"a": ["ab", "cd"], "b": ["xy", "z"], "tokens": [[1, 2], [3]]})
    (window,) = windows(two, tokenizer=TOKENIZER, lanes=1, bptt=9, text_column="b")
    assert TOKENIZER.decode(window.targets[:, 0]) == "yz"
    (window,) = windows(two.to_iterable_dataset(), lanes=1, bptt=9)
    assert window.targets[:, 0].tolist() == [2, 3]


def uncopied() -> datasets.IterableDataset:
    rows = (row for row in ROWS)
    return TABLE.to_iterable_dataset().map(lambda row: {"text": next(rows)})


def stream_of_two() -> datasets.IterableDataset:
    return TABLE.to_iterable_dataset(num_shards=2)


def shuffled_inside() -> datasets.IterableDataset:
    parts = [stream_of_two(), stream_of_two().shuffle(seed=1).map(lambda row: row)]
    return datasets.concatenate_datasets(parts)


def nothing() -> datasets.IterableDataset:
    return TABLE.to_iterable_dataset().filter(lambda row: False)


def table(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


MISTAKES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "splits": (datasets.DatasetDict(train=TABLE), {}, TypeError, "choose one split of a DatasetDict"),
    "tokenizer": (TABLE, {"tokenizer": 3}, TypeError, "tokenizer must have a method encode, or be callable, got int"),
    "no tokenizer": (TABLE, {"text_column": "text"}, DataError, "pass a tokenizer"),
    "no column of ids": (TABLE, {}, DataError, r"no column 'input_ids' \(columns: 'text', 'number'\)"),
    "no such column": (TABLE, {"tokenizer": TOKENIZER, "text_column": "x"}, DataError, "no column 'x'"),
    "ids as text": (IDS_TABLE, {"tokenizer": TOKENIZER, "text_column": "input_ids"}, DataError, "holds list, no text"),
    "null": (table(text=["ab", None]), {"tokenizer": TOKENIZER}, DataError, "holds NoneType, no text: filter such rows out"),
    "floats": (table(input_ids=[[0.5, 1.0]]), {"text_column": "input_ids"}, DataError, "holds no list of ids"),
    "lists of lists": (table(input_ids=[[[1], [2, 3]]]), {"text_column": "input_ids"}, DataError, "holds no list of ids"),
    "negative": (table(input_ids=[[1, -100]]), {}, DataError, "has the id -100"),
    "too large": (table(input_ids=[[1, IDS]]), {}, DataError, f"has the id {IDS}"),
    "bad tokenizer": (TABLE, {"tokenizer": str.upper}, DataError, "for which the tokenizer returned no list of ids"),
    "no rows": (table(text=[]), {"tokenizer": TOKENIZER}, DataError, "has no rows"),
    "nothing left": (nothing(), {"tokenizer": TOKENIZER}, DataError, "has no rows"),
    "generator": (uncopied(), {"tokenizer": TOKENIZER}, DataError, "cannot be copied, which resuming needs"),
    "shuffled": (stream_of_two().shuffle(seed=1), {"tokenizer": TOKENIZER}, DataError, "shuffle a Dataset"),
    "shuffled inside": (shuffled_inside(), {"tokenizer": TOKENIZER}, DataError, "shuffle a Dataset"),
    "short": (table(input_ids=[[1, 2, 3]]), {}, DataError, "is too short"),
    "lanes": (IDS_TABLE, {"lanes": 0}, ValueError, "lanes must be 1 or more"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(case: str, streamed: bool) -> None:
    dataset, options, kind, message = MISTAKES[case]
    if streamed and isinstance(dataset, datasets.Dataset) and len(dataset) > 0:
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(kind, match=message) as raised:
        list(windows(dataset, **{"lanes": 3, "bptt": 5, **options}))
    assert len(str(raised.value).splitlines()) == 1


def test_the_rows_are_the_documents_of_the_plain_stream() -> None:
    assert "".join(ROWS) == TEXT


def refused() -> datasets.IterableDataset:
    """A data set whose function raises the same error each time."""

    def unreadable(row: dict[str, Any]) -> dict[str, Any]:
        if row["number"] == 2:
            raise ValueError("no number 2")
        return row

    return TABLE.to_iterable_dataset().map(unreadable)


def test_an_error_of_the_users_own_function_is_not_retried_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(hub_rows.time, "sleep", pauses.append)
    with pytest.raises(DataError, match="reading failed 3 times: no number 2"):
        list(windows(refused(), tokenizer=TOKENIZER, lanes=3, bptt=5))
    assert pauses == [1.0, 2.0]


def test_errors_of_a_network_that_are_alike_are_retried() -> None:
    assert hub_rows.may_pass([TimeoutError("read timed out")] * 5)
    assert hub_rows.may_pass([ValueError("line 1"), ValueError("line 2"), ValueError("line 2")])
    assert not hub_rows.may_pass([ValueError("line 1")] * 3)
