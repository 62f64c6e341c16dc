"""Scores a trained run on splits of its own text or on another text. Decides whether a file holds the run's own text.

A checkpoint of a run on local files identifies the held-out texts of the run; see `held_out`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dni_seq.app.lm import build as lm
from dni_seq.app.lm.evaluation import Score
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.streams import Corpus, DataError, WindowStream, open_corpus

HELD_OUT = ("valid", "test")
"""The splits that are scored."""


class ScoredText(NamedTuple):
    """The score of a text.

    Attributes:
        name: the name of the split, or the file name of another text.
        score: the score.
        limit: the number of tokens after which scoring stopped before the end of the text; None for the whole text.
        unknown: a line on the tokens outside the vocabulary, empty if the text has none.
        kind: the tokenizer's kind.
    """

    name: str
    score: Score
    limit: int | None
    unknown: str
    kind: str

    def lines(self) -> Iterator[str]:
        """Yields a line with the score, then a line if a limit ended scoring early, and a line if tokens are unknown."""
        yield lm.describe(self.name, self.score, self.kind)
        if self.limit is not None:
            yield f"{self.name}: a limit of {self.limit:,} tokens cut this score, give --eval-tokens to change it"
        if self.unknown:
            yield self.unknown


def held_out(options: LanguageModelOptions, splits: Mapping[str, WindowStream]) -> dict[str, Any]:
    """Returns what identifies the held-out texts of a run on local files, by split; empty for other data.

    A text in memory is identified by its checksum. A streamed text is identified by the sizes of its files and the checksum
    of its first tokens.

    Args:
        options: the options of the run.
        splits: the splits as `open_split` returns them, before a window is read.
    """
    return {} if options.data_file is None else {split: stream.state_dict() for split, stream in splits.items()}


def check_held_out(checkpoint: Mapping[str, Any], found: Mapping[str, Any], place: str | None) -> None:
    """Checks that the held-out texts found now are those of the run.

    Args:
        checkpoint: content of the run's checkpoint. A checkpoint that does not identify its texts is accepted.
        found: what `held_out` returns for the texts found now.
        place: the training file, for the message.

    Raises:
        DataError: a text differs from the run's.
    """
    saved = checkpoint.get("held_out", {})
    for split, state in found.items():
        if saved.get(split, state) != state:
            raise DataError(f"the {split} text of {place} differs from the run's: give the place of the run's own text")


def score_splits(loaded: lm.LoadedRun, splits: Iterable[str], options: LanguageModelOptions) -> Iterator[ScoredText]:
    """Yields the scores of a run on splits of its own text.

    Args:
        loaded: the run.
        splits: names of the splits, "valid" or "test".
        options: the options of the run, possibly with new paths of its text and another `eval_tokens`.

    Raises:
        ValueError: the text cannot be read, or is not the run's.
    """
    corpus = lm.open_text_again(options)
    for split in splits:
        stream = lm.open_split(corpus, split, loaded.tokenizer, loaded.options)
        check_held_out(loaded.checkpoint, held_out(options, {split: stream}), options.data_file)
        yield _score(loaded, split, stream, options)


def is_own_text(loaded: lm.LoadedRun, options: LanguageModelOptions) -> bool:
    """Returns whether the local files that `options` name hold the held-out texts of the run.

    A checkpoint does not identify the training text. If both held-out texts have files of their own, which have not moved, a
    `data_file` at another path counts as another text.
    """
    saved, run = loaded.checkpoint.get("held_out"), loaded.options
    if not saved:
        return False
    held_out_files = (run.valid_file, run.test_file)
    if all(held_out_files) and held_out_files == (options.valid_file, options.test_file):
        return options.data_file is not None and _same_place(options.data_file, run.data_file)
    try:
        corpus = lm.open_text(options)
        splits = {split: lm.open_split(corpus, split, loaded.tokenizer, loaded.options) for split in HELD_OUT}
    except DataError:  # too short to hold out a part, or unreadable; scoring an unreadable text raises the error again
        return False
    return held_out(options, splits) == saved


def _same_place(file: str, other: str | None) -> bool:
    """Returns whether two paths or patterns name the same place."""
    return other is not None and Path(file).absolute() == Path(other).absolute()


def score_other_text(loaded: lm.LoadedRun, options: LanguageModelOptions, file: str, text_column: str | None) -> ScoredText:
    """Returns the score of a run on the whole of another text. A text too short for the run's lanes is read in one lane.

    Args:
        loaded: the run, whose tokenizer is used.
        options: the options of the run, with the `eval_tokens` to use.
        file: the file, or a pattern for several files.
        text_column: column or field that holds the text. None means the column of `options` if the run trained on local
            files, and otherwise "text".

    Raises:
        ValueError: the text cannot be read.
    """
    column = text_column
    if column is None and loaded.options.data_file is not None:
        column = options.text_column
    corpus = open_corpus(
        data_file=file,
        valid_file=file,
        test_file=file,
        text_column=column,
        invalid_utf8=options.invalid_utf8,
        null_text=options.null_text,
    )
    return _score(loaded, file, _whole(corpus, loaded), options)


def _whole(corpus: Corpus, loaded: lm.LoadedRun) -> WindowStream:
    """Returns the windows of a text in as many lanes as the run has, or in one lane if the text is too short for these."""
    try:
        return lm.open_split(corpus, "test", loaded.tokenizer, loaded.options)
    except DataError:
        one_lane = dataclasses.replace(loaded.options, batch_size=1)
        return lm.open_split(corpus, "test", loaded.tokenizer, one_lane)


def _score(loaded: lm.LoadedRun, name: str, stream: WindowStream, options: LanguageModelOptions) -> ScoredText:
    limited = dataclasses.replace(loaded.options, eval_tokens=options.eval_tokens)
    epoch = stream.epoch
    result = lm.score(loaded.model, stream, limited)
    whole = stream.epoch > epoch  # the last window of the text was read
    limit = None if whole else lm.token_limit(stream, limited)
    return ScoredText(name, result, limit, lm.describe_unknown({name: stream}), loaded.tokenizer.kind)
