"""Turns text into windows: reads documents, tokenizes them, and cuts the tokens into lanes and windows."""

from dni_seq.streams.corpus import Corpus, DataError, Documents, known_datasets, open_corpus
from dni_seq.streams.shuffle import ShuffledDocuments
from dni_seq.streams.tokenization import CharTokenizer, Tokenizer, WordTokenizer
from dni_seq.streams.tokenizer_factory import load_tokenizer, train_tokenizer
from dni_seq.streams.window_stream import WindowStream

__all__ = [
    "CharTokenizer",
    "Corpus",
    "DataError",
    "Documents",
    "ShuffledDocuments",
    "Tokenizer",
    "WindowStream",
    "WordTokenizer",
    "known_datasets",
    "load_tokenizer",
    "open_corpus",
    "train_tokenizer",
]
