"""Small real data sets with features in front of their texts, made into records where they are asked for (data.source).

digits: 1,797 handwritten digits of 8 x 8 pixels (scikit-learn's load_digits, of the UCI repository, CC BY 4.0) as 16
patches of 2 x 2 pixels in [0, 1], row by row; the text is the digit's name. The last 360 are for validation; of the
others each is there five times, as it is and moved by a pixel to every side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.common.extras import package

FEATURES, TEXT = "features", "text"  # fields of the records
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def patches(image: np.ndarray, size: int) -> np.ndarray:
    """[n, size^2] of an image [height, width] whose sides are multiples of `size`: its patches, row by row."""
    rows, columns = (n // size for n in image.shape)
    return image.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(rows * columns, size * size)


def image_of(found: np.ndarray, size: int) -> np.ndarray:
    """The square image that `patches` [n, size^2] are of."""
    side = round(len(found) ** 0.5)
    return found.reshape(side, side, size, size).swapaxes(1, 2).reshape(side * size, side * size)


def moved(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Images [n, height, width] moved by so many pixels (-1, 0 or 1), with zeros where nothing was."""
    height, width = images.shape[1:]
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return wide[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]


def _write(path: str, records: Iterable[dict]) -> str:
    jsons.write_atomic(path, "".join(jsons.dumps(record) + "\n" for record in records).encode())
    return path


def _digits(folder: str) -> tuple[str, str]:
    found = package("sklearn.datasets", "examples", "data.source='digits'").load_digits()
    images, names = found.images / 16, [NAMES[digit] for digit in found.target]
    many = np.concatenate([moved(images[:-360], *by) for by in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))])

    def records(images: np.ndarray, names: list[str]) -> Iterator[dict]:
        for image, name in zip(images, names, strict=True):
            yield {FEATURES: patches(image, 2).tolist(), TEXT: name}

    return (_write(os.path.join(folder, "digits_train.jsonl"), records(many, 5 * names[:-360])),
            _write(os.path.join(folder, "digits_valid.jsonl"), records(images[-360:], names[-360:])))


EXAMPLES: dict[str, Callable[[str], tuple[str, str]]] = {"digits": _digits}


def write(name: str, folder: str) -> tuple[str, str]:
    """The records of an example as two files of JSON lines in a folder, for training and validation; their paths. Files
    that are there are taken as they are.

    Raises:
      ValueError: the package that has the data is not installed.
    """
    files = tuple(os.path.join(folder, f"{name}_{split}.jsonl") for split in ("train", "valid"))
    if all(map(os.path.exists, files)):
        return files[0], files[1]
    os.makedirs(folder, exist_ok=True)
    return EXAMPLES[name](folder)
